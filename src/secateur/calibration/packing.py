"""Text into token ids, without reading or tokenising more of it than is asked for."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

__all__ = ["document_tokens", "text_tokens"]

# Characters before a cut whose tokens are not trusted: a tokenizer that would see the text go on may
# split or merge there otherwise. Words, runs of spaces and byte-pair merges are far shorter.
UNSETTLED_CHARACTERS = 4096
CHARACTERS_PER_TOKEN = 5
DOCUMENTS_AT_ONCE = 32


def text_tokens(
    pieces: Iterable[str], tokenizer: Any, needed: int, *, unsettled: int = UNSETTLED_CHARACTERS
) -> list[int]:
    """The first `needed` token ids of the text the pieces make up (all of them if it is shorter).

    Equal to tokenising the whole text without special tokens and cutting the ids. A prefix is
    tokenised and only tokens that end `unsettled` characters before its cut count; while these are
    too few the prefix grows. Text is never cut at lines: byte-pair encoding may merge across them.
    """
    stream = iter(pieces)
    prefix, ended = "", False
    goal = needed * CHARACTERS_PER_TOKEN + unsettled if tokenizer.is_fast else sys.maxsize
    while True:
        prefix, ended = _extend(prefix, stream, goal)
        ids, ends = _encode(tokenizer, prefix)
        settled = len(ids) if ended else bisect_right(ends, len(prefix) - unsettled)
        if ended or settled >= needed:
            return ids[:needed]
        goal = 2 * len(prefix)


def document_tokens(documents: Iterable[str], tokenizer: Any, needed: int) -> list[int]:
    """The first `needed` token ids of documents joined with the end-of-text token.

    A tokenizer without one gets the documents joined with an empty line, as one text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        return text_tokens(_joined(documents, "\n\n"), tokenizer, needed)
    stream, ids = iter(documents), list[int]()
    while len(ids) < needed and (some := list(islice(stream, DOCUMENTS_AT_ONCE))):
        encoded = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for one in encoded["input_ids"]:
            ids.extend([end, *one] if ids else one)
    return ids[:needed]


def _extend(prefix: str, stream: Iterator[str], goal: int) -> tuple[str, bool]:
    """The prefix made at least `goal` characters long, and whether the text ended before that."""
    parts, length = [prefix], len(prefix)
    while length < goal:
        piece = next(stream, None)
        if piece is None:
            return "".join(parts), True
        parts.append(piece)
        length += len(piece)
    return "".join(parts), False


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and the character each token ends before (empty where unknown)."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    return encoded["input_ids"], [end for _, end in encoded.get("offset_mapping", ())]


def _joined(documents: Iterable[str], separator: str) -> Iterator[str]:
    for number, document in enumerate(documents):
        if number:
            yield separator
        yield document
