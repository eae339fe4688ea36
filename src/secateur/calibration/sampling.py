"""Calibration text sampled from the model itself: no data needed, and in the model's own domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.core.progress import SILENT, Progress

__all__ = ["Vocabulary", "sample_windows"]

CACHE_BYTES = 2 << 30
MOST_ROWS = 64


@dataclass(frozen=True)
class Vocabulary:
    """What sampling must know about the tokens.

    Attributes:
        size: ids below it may be drawn (a model's table is often padded beyond the tokenizer).
        start: first token of a window, `None` to draw it.
        ends: end-of-text tokens; the one after them is `start` again.
    """

    size: int
    start: int | None
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, config: Any) -> Vocabulary:
        """From the tokenizer, and the model's configuration where that is silent."""
        ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else config.eos_token_id
        ends = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
        if start is None and ends:
            start = ends[0]
        return cls(min(len(tokenizer), config.vocab_size), start, ends)


def sample_windows(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    rows: int | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """Draw windows from the model at temperature 1, with a key-value cache.

    The uniform numbers behind every token are drawn beforehand from one seeded generator, so a window
    does not depend on the others nor on `rows`, and the global random state is left alone.

    Args:
        rows: windows generated at once; by default what a 2 GiB cache holds.

    Returns:
        (samples, length) int64 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((samples, length), generator=generator, dtype=torch.float64)
    rows = rows or _rows(model, length)
    with _quiet_evaluation(model), progress.task("sampling text from the model", samples * length) as task:
        parts = [
            torch.stack(list(_columns(model, vocabulary, draws, task.advance)), dim=1)
            for draws in torch.split(uniform, rows)
        ]
    return torch.cat(parts)


def _columns(model: PreTrainedModel, vocabulary: Vocabulary, draws: Tensor, advance: Any) -> Iterator[Tensor]:
    """The tokens (rows,) of one position after the other."""
    draws = draws.to(model.device)
    ends = torch.tensor(vocabulary.ends, dtype=torch.long, device=model.device)
    token, cache = _first(vocabulary, draws[:, 0]), None
    for position in range(draws.shape[1]):
        yield token.cpu()
        advance(len(token))
        if position + 1 == draws.shape[1]:
            return
        output = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        drawn = _draw(output.logits[:, -1, : vocabulary.size], draws[:, position + 1])
        token = drawn if vocabulary.start is None else _restart(drawn, token, ends, vocabulary.start)


def _first(vocabulary: Vocabulary, draw: Tensor) -> Tensor:
    if vocabulary.start is None:
        return (draw * vocabulary.size).long()
    return torch.full_like(draw, vocabulary.start, dtype=torch.long)


def _restart(drawn: Tensor, previous: Tensor, ends: Tensor, start: int) -> Tensor:
    """A text that has ended is followed by the start of another (nothing to do where both are one token)."""
    return torch.where(torch.isin(previous, ends) & (previous != start), start, drawn)


def _draw(logits: Tensor, draw: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution; `logits` (rows, V), `draw` (rows,)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = draw[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def _rows(model: PreTrainedModel, length: int) -> int:
    config = model.config.get_text_config()
    row_bytes = 2 * config.num_hidden_layers * length * config.hidden_size * model.dtype.itemsize
    return int(min(max(CACHE_BYTES // row_bytes, 1), MOST_ROWS))


@contextmanager
def _quiet_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients or autocast; the mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        model.train(training)
