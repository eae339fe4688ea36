"""Reading part of a text gives the very tokens of reading all of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calibration.shared import STORIES, STORIES_TEXT, needs_shared
from secateur.calibration.packing import document_tokens, text_tokens

TEXT = "The cat sat  on the mat.\n\nA naïve café — she'll buy 12,345 cats!\t\tthe end.\r\n the theatre\n" * 30


def trained(model: Any, trainer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The kinds in use: byte-level with words split, byte-pairs across whole texts, unigrams."""
    if kind == "byte-level":
        return tiny_tokenizer()
    if kind == "whole-text":
        trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, max_token_length=12)
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return trained(models.BPE(unk_token=None), trainer, normalizer=spaces)
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>")
    return trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace())


def whole(kind: str, text: str) -> list[int]:
    return tokenizer(kind)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "whole-text", "unigram"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_growing_prefix_gives_the_first_tokens_of_the_whole_text(kind: str, data: st.DataObject) -> None:
    snippets = st.sampled_from([*TEXT.split(" "), " ", "  ", "\n", "the", "é", "日本", "x"])
    text = " ".join(data.draw(st.lists(snippets, min_size=1, max_size=300)))
    size = data.draw(st.integers(1, 97))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    needed = data.draw(st.integers(1, 120))
    assert text_tokens(pieces, tokenizer(kind), needed, unsettled=80) == whole(kind, text)[:needed]


def test_no_more_is_read_than_needed() -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield TEXT

    assert len(text_tokens(endless(), tokenizer("byte-level"), 2000)) == 2000
    assert taken * len(TEXT) < 2000 * 20


def test_documents_are_joined_with_the_end_token() -> None:
    documents = ["the cat", "sat on", "the mat"]
    first, second, third = (whole("byte-level", document) for document in documents)
    end = tiny_tokenizer().eos_token_id
    expected = [*first, end, *second, end, *third]
    assert document_tokens(documents, tiny_tokenizer(), 1000) == expected
    assert document_tokens(documents, tiny_tokenizer(), 5) == expected[:5]


def test_documents_without_an_end_token_are_one_text() -> None:
    documents = ["the cat", "sat on"]
    assert document_tokens(documents, tokenizer("whole-text"), 1000) == whole(
        "whole-text", "the cat\n\nsat on"
    )


@needs_shared
@pytest.mark.parametrize("needed", [1, 700, 5000, 10**6])
def test_a_real_text_is_tokenised_as_a_whole(needed: int) -> None:
    stories = AutoTokenizer.from_pretrained(STORIES)
    text = STORIES_TEXT.read_text(encoding="utf-8")
    pieces = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    expected = stories(text, add_special_tokens=False)["input_ids"]
    assert text_tokens(pieces, stories, needed, unsettled=256) == expected[:needed]
