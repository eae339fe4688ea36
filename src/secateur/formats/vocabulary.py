"""A tokenizer as the keys of a GGUF file, or the reason why llama.cpp could not follow it.

Everything is read off the description that a fast tokenizer gives of itself (the content of tokenizer.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.core.errors import ExportError

__all__ = ["WITHOUT", "Vocabulary", "file_name", "vocabulary"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WITHOUT = "add --no-tokenizer to write the weights alone"
SPACE = "▁"
DIGIT_RUNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SINGLE_DIGITS = DIGIT_RUNS.replace("{1,3}", "")
SPLITS = {DIGIT_RUNS: "dbrx", SINGLE_DIGITS: "qwen2"}
"""Regular expressions that cut text before byte-level merges -> the name llama.cpp has for them."""
PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


@dataclass
class Vocabulary:
    """Attributes:
    keys: of the file, with their full names.
    notes: what was left out, one sentence each.
    """

    keys: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def vocabulary(
    content: Mapping[str, Any], size: int, special: Mapping[str, int | None], ends: tuple[bool, bool]
) -> Vocabulary:
    """The keys of a tokenizer.

    Args:
        content: the tokenizer as in tokenizer.json.
        size: rows of the embedding; entries that are missing become unused ones.
        special: numbers of `bos`, `eos`, `unknown` and `padding` tokens, as far as there are such.
        ends: whether encoding puts bos in front and eos behind.

    Raises:
        ExportError: a kind of model, a normaliser or a way to cut text that llama.cpp has no name for.
    """
    model = content["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"of kind {model.get('type')}")
    kind = _sentencepiece(content) if model.get("byte_fallback") else _byte_level(content)
    pieces = _Pieces(content, size, spaces=bool(model.get("byte_fallback")))
    keys = {
        **kind,
        "tokenizer.ggml.tokens": pieces.texts,
        "tokenizer.ggml.token_type": pieces.kinds,
        "tokenizer.ggml.add_bos_token": ends[0],
        "tokenizer.ggml.add_eos_token": ends[1],
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        keys["tokenizer.ggml.scores"] = pieces.scores(merges)
    else:
        keys["tokenizer.ggml.merges"] = merges
    for name, number in special.items():
        if number is not None and number < size:
            keys[f"tokenizer.ggml.{name}_token_id"] = number
    lost = f"{pieces.beyond} tokens beyond the {size} rows of the embedding are left out"
    return Vocabulary(keys, [lost] if pieces.beyond else [])


def file_name(name: str, keys: Mapping[str, Any]) -> str:
    """`general.name` of the file: llama.cpp expects certain tokens in files named after Phi-3, and does not
    load one that lacks them."""
    plain = name.lower().replace("-", "")
    if "phi3" in plain and not set(keys.get("tokenizer.ggml.tokens", PHI3_TOKENS)) >= PHI3_TOKENS:
        return "model"
    return name


class _Pieces:
    """Text and kind of every row of the embedding."""

    def __init__(self, content: Mapping[str, Any], size: int, spaces: bool) -> None:
        self.texts = [f"[PAD{row}]" for row in range(size)]
        self.kinds = [UNUSED] * size
        self.beyond = 0
        for text, row in content["model"]["vocab"].items():
            self._put(row, text, _kind(text, content, spaces))
        for token in content.get("added_tokens", ()):
            text = token["content"] if token["special"] else token["content"].replace(SPACE, " ")
            unknown = token["content"] == content["model"].get("unk_token")
            kind = UNKNOWN if unknown else CONTROL if token["special"] else USER_DEFINED
            self._put(token["id"], text, kind)

    def scores(self, merges: list[str]) -> list[float]:
        """Pieces that are merged earlier have higher scores; llama.cpp merges the highest first."""
        rank: dict[str, int] = {}
        for place, merge in enumerate(merges):
            rank.setdefault(merge.replace(" ", ""), place)
        return [-float(rank.get(text, len(merges))) for text in self.texts]

    def _put(self, row: int, text: str, kind: int) -> None:
        if row >= len(self.texts):
            self.beyond += 1
            return
        self.texts[row], self.kinds[row] = text, kind


def _kind(text: str, content: Mapping[str, Any], bytes_too: bool) -> int:
    if text == content["model"].get("unk_token"):
        return UNKNOWN
    byte = bytes_too and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return BYTE if byte else NORMAL


def _sentencepiece(content: Mapping[str, Any]) -> dict[str, Any]:
    """Pieces with `▁` for spaces and bytes for what has no piece."""
    steps = [*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))]
    prefix = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix = step.get("prepend_scheme", "always") != "never"
        elif not (_spaces(step) or (kind == "Split" and step["pattern"] == {"String": " "})):
            raise _unknown(f"with {kind} before its pieces")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _spaces(step: Mapping[str, Any]) -> bool:
    return bool(step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE)


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    """Merges over bytes, after text was cut by a regular expression that llama.cpp has a name for."""
    for step in _steps(content.get("normalizer")):
        if step["type"] != "NFC":
            raise _unknown(f"with normaliser {step['type']}")
    *before, last = _steps(content.get("pre_tokenizer")) or [{"type": "nothing"}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise _unknown("with a prefix space" if last["type"] == "ByteLevel" else "that is not of bytes")
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _cut(before, last, content["model"])}


def _cut(before: list[Any], last: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    if not before and last.get("use_regex", True):
        return "gpt-2"
    step: dict[str, Any] = before[0] if len(before) == 1 else {"type": "several steps"}
    if step["type"] == "Digits" and step.get("individual_digits") and last.get("use_regex", True):
        return "starcoder"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not last.get("use_regex", True):
        name = SPLITS.get(step["pattern"].get("Regex", ""))
        if name:
            return "llama-bpe" if name == "dbrx" and model.get("ignore_merges") else name
    raise _unknown(f"that cuts text in a way of its own ({step['type']})")


def _steps(part: Mapping[str, Any] | None) -> list[Any]:
    """A normaliser or pre-tokeniser as a flat list."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [step for each in inner for step in _steps(each)]


def _unknown(what: str) -> ExportError:
    return ExportError(f"a tokenizer {what}", "byte-level or sentencepiece-like BPE", WITHOUT)
