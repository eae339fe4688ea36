"""Calibration windows: token ids of equal length, and where they come from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur.calibration.documents import is_hub_name, read_hub, read_json, read_parquet, read_text
from secateur.calibration.packing import document_tokens, text_tokens
from secateur.calibration.sampling import Vocabulary, sample_windows
from secateur.core.errors import CalibrationError
from secateur.core.progress import SILENT, Progress

__all__ = ["Windows", "load_windows"]

SELF = "self"
TEXT_SUFFIXES = {".txt", ".text", ".md"}
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Windows:
    """Token sequences of one length.

    Attributes:
        ids: (n, T) int64.
        mask: (n, T) bool, True at real tokens, or `None` when nothing is padded.
        source: where they come from, for reports.
        sha256: of ids and mask of the whole set (batches and shards carry that of their set).
    """

    ids: Tensor
    mask: Tensor | None
    source: str
    sha256: str

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None = None, source: str = "given") -> Windows:
        """Windows from tensors. Raises `CalibrationError` for wrong shapes and rows without a token."""
        if ids.ndim != 2 or 0 in ids.shape or int(ids.min()) < 0:
            raise CalibrationError(
                f"token ids of shape {tuple(ids.shape)}", "(windows, tokens), neither 0, and no negative id"
            )
        ids = ids.detach().to("cpu", torch.int64).contiguous()
        if mask is not None:
            mask = mask.detach().to("cpu", torch.bool).contiguous()
            if mask.shape != ids.shape or not bool(mask.any(1).all()):
                raise CalibrationError(
                    f"a mask of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}",
                    "equal shapes and at least one real token a row",
                )
        digest = hashlib.sha256(ids.numpy().tobytes())
        if mask is not None:
            digest.update(mask.numpy().tobytes())
        return cls(ids, mask, source, digest.hexdigest())

    @classmethod
    def none(cls) -> Windows:
        """Of a run that observes nothing: no windows, which fit every model."""
        return cls(torch.empty(0, 1, dtype=torch.int64), None, "none", "")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a window, padding included."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Real tokens in all windows."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def predicting(self) -> Tensor:
        """(n, T) bool: positions whose next token is in the window, both real."""
        real = torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask
        return real & functional.pad(real[:, 1:], (0, 1))

    def batches(self, size: int) -> Iterator[Windows]:
        """Consecutive parts of at most `size` windows."""
        return (self._part(slice(start, start + size)) for start in range(0, len(self), size))

    def split(self, first: int) -> tuple[Windows, Windows]:
        """The first windows, and the others: two sets of their own, for example to prune and to judge."""
        if not 0 < first < len(self):
            raise CalibrationError(f"{first} of {len(self)} windows", "a part that leaves some", "")
        parts = self._part(slice(first)), self._part(slice(first, None))
        return tuple(Windows.of(part.ids, part.mask, self.source) for part in parts)  # type: ignore[return-value]

    def chosen(self, rows: list[int]) -> Windows:
        """These windows, in this order."""
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, ids=self.ids[rows], mask=mask)

    def turn(self, number: int, size: int) -> Windows:
        """Part `number` of `size` windows, going round: the first come again after the last."""
        rows = torch.arange(number * size, (number + 1) * size) % len(self)
        part = self.chosen(rows.tolist())
        return Windows.of(part.ids, part.mask, part.source)

    def shard(self, rank: int, world: int) -> Windows:
        """The consecutive windows of one of `world` processes. Raises `CalibrationError` if it gets none."""
        if not len(self):
            return self
        if len(self) < world:
            raise CalibrationError(
                f"{len(self)} windows for {world} processes", "at least one each", "raise --samples"
            )
        return self._part(slice(rank * len(self) // world, (rank + 1) * len(self) // world))

    def require_fits(self, config: Any) -> None:
        """Raise `CalibrationError` for ids without an embedding or windows longer than the positions."""
        if not len(self):
            return
        config = config.get_text_config()
        largest = int(self.ids.max())
        if largest >= config.vocab_size:
            raise CalibrationError(
                f"token id {largest} in {self.source}",
                f"ids below the model's vocabulary of {config.vocab_size}",
                "use the tokenizer the model was trained with",
            )
        _require_positions(self.length, config)

    def _part(self, rows: slice) -> Windows:
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, ids=self.ids[rows], mask=mask)


def load_windows(
    spec: str,
    *,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int = 0,
    column: str | None = None,
    model: Callable[[], PreTrainedModel] | None = None,
    progress: Progress = SILENT,
) -> Windows:
    """Up to `samples` windows of `length` tokens.

    Text is tokenised once without special tokens and cut into consecutive windows; records of JSON,
    Parquet and hub data sets are joined with the end-of-text token first. A text shorter than asked
    gives fewer windows and one warning. Only as much is read as is needed.

    Args:
        spec: `self` (sampled from the model), a `.txt`, `.jsonl`, `.json` or `.parquet` file, or a hub
            data set `owner/name[/configuration][:split]`.
        tokenizer: of the model, from `AutoTokenizer`.
        seed: of `self`; files are read from their start.
        column: that holds the text; by default `text` or the only one with strings.
        model: gives the model for `self`; called only then.

    Raises:
        CalibrationError: missing, empty or too short a text, not UTF-8, no such column, ids the model lacks.
        MissingExtraError: a hub data set without the `[data]` extra.

    >>> load_windows("stories.txt", tokenizer=tokenizer, samples=128, length=512)  # doctest: +SKIP
    """
    if samples < 1 or length < 2:
        raise CalibrationError(
            f"{samples} windows of {length} tokens", "at least 1 window of at least 2 tokens"
        )
    if spec == SELF:
        return _from_model(model, tokenizer, samples, length, seed, progress)
    ids = _read(spec, tokenizer, samples * length, column)
    count = len(ids) // length
    if count == 0:
        raise CalibrationError(
            f"{spec} has {len(ids)} tokens" if ids else f"{spec} is empty",
            f"at least one window of {length}",
            "give more text" + (" or lower --length" if len(ids) > 1 else ""),
        )
    if count < samples:
        logger.warning("%s holds %d windows of %d tokens, %d were asked for", spec, count, length, samples)
    return Windows.of(torch.tensor(ids[: count * length]).view(count, length), source=spec)


def _from_model(
    model: Callable[[], PreTrainedModel] | None,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    progress: Progress,
) -> Windows:
    if model is None:
        raise CalibrationError(
            "calibration 'self' without a model", "the model to sample from", "pass model="
        )
    loaded = model()
    config = loaded.config.get_text_config()
    _require_positions(length, config)
    vocabulary = Vocabulary.of(tokenizer, config)
    ids = sample_windows(loaded, vocabulary, samples=samples, length=length, seed=seed, progress=progress)
    return Windows.of(ids, source=f"self (seed {seed})")


def _require_positions(length: int, config: Any) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise CalibrationError(
            f"windows of {length} tokens", f"at most the model's {positions} positions", "lower --length"
        )


def _read(spec: str, tokenizer: Any, needed: int, column: str | None) -> list[int]:
    """The first `needed` token ids behind a specification that is not `self`."""
    path = Path(spec).expanduser()
    suffix = path.suffix.lower()
    if not path.is_file():
        if path.exists() or suffix in TEXT_SUFFIXES | JSON_SUFFIXES | {".parquet"} or not is_hub_name(spec):
            raise CalibrationError(
                f"{spec} is a folder" if path.exists() else f"there is no file {spec}",
                "'self', a .txt, .jsonl, .json or .parquet file, or a hub data set owner/name",
            )
        return document_tokens(read_hub(spec, column), tokenizer, needed)
    if suffix in JSON_SUFFIXES:
        return document_tokens(read_json(path, column), tokenizer, needed)
    if suffix == ".parquet":
        return document_tokens(read_parquet(path, column), tokenizer, needed)
    if column is not None:
        raise CalibrationError(f"column {column!r} of {spec}", "a file with columns", "leave --column out")
    return text_tokens(read_text(path), tokenizer, needed)
