"""Tokens per second of prefill and decode apart, on this machine, with their spread."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.core.errors import InputError
from secateur.core.progress import SILENT, Progress, Task

__all__ = ["Measurement", "Ratio", "SpeedComparison", "SpeedResult", "compare_speed", "measure_speed"]

Phase = Literal["prefill", "decode"]
PROMPT_SEED = 0
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Measurement:
    """Speed of one phase at one batch size.

    Attributes:
        phase: `prefill` (the prompt in one pass) or `decode` (one token a sequence a step, with a KV cache).
        batch_size: sequences at once.
        tokens_per_second: of all sequences together, one value a repeat.
    """

    phase: Phase
    batch_size: int
    tokens_per_second: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    def as_dict(self, model: str = "model") -> dict[str, Any]:
        """`phase`, `batch_size`, `model`, and `median`, `min`, `max` in tokens per second."""
        speeds = self.tokens_per_second
        spread = {"median": self.median, "min": min(speeds), "max": max(speeds)}
        return {"phase": self.phase, "batch_size": self.batch_size, "model": model, **spread}


@dataclass(frozen=True)
class SpeedResult:
    """Speed of one model: prefill and decode for each batch size.

    Attributes:
        prompt_tokens: length of the prompt, after the cap at the model's positions.
        new_tokens: decode steps after the prompt.
        device: such as `cpu` or `cuda:0`.
        dtype: of the weights.
        measurements: in the order of the batch sizes, prefill before decode.
    """

    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    measurements: tuple[Measurement, ...]

    def prefill(self, batch_size: int) -> float:
        """Median tokens per second of the prompt."""
        return self._median("prefill", batch_size)

    def decode(self, batch_size: int) -> float:
        """Median tokens per second after the prompt."""
        return self._median("decode", batch_size)

    def as_dict(self, model: str = "model") -> dict[str, Any]:
        """JSON-able, with `measurements` as rows that `model` labels."""
        rows = [row.as_dict(model) for row in self.measurements]
        return {**_settings(self), "measurements": rows}

    def _median(self, phase: Phase, batch_size: int) -> float:
        for row in self.measurements:
            if (row.phase, row.batch_size) == (phase, batch_size):
                return row.median
        measured = sorted({row.batch_size for row in self.measurements})
        raise InputError(f"batch size {batch_size}", f"one that was measured: {measured}")


@dataclass(frozen=True)
class Ratio:
    """Speed of the first model over the second: above 1 the first is faster.

    `ratio` is the median over pairs of repeats that ran one after the other, `min` and `max` their spread.
    """

    phase: Phase
    batch_size: int
    ratio: float
    min: float
    max: float


@dataclass(frozen=True)
class SpeedComparison:
    """Two models measured in turn in one run."""

    a: SpeedResult
    b: SpeedResult
    ratios: tuple[Ratio, ...]

    def as_dict(self, a: str = "model", b: str = "against") -> dict[str, Any]:
        """JSON-able: `measurements` of both, labelled, and `ratios` of the first over the second."""
        rows = self.a.as_dict(a)["measurements"] + self.b.as_dict(b)["measurements"]
        return {**_settings(self.a), "measurements": rows, "ratios": [asdict(row) for row in self.ratios]}


def measure_speed(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 5,
    device: torch.device | str | None = None,
    progress: Progress = SILENT,
) -> SpeedResult:
    """Time prefill and greedy decode of random prompts, after a warm-up.

    The decode loop calls the model itself with its KV cache, so nothing of `generate` is measured.

    Args:
        prompt_tokens: capped so that prompt and new tokens fit into the model's positions.
        batch_sizes: sequences at once.
        repeats: counted runs for each batch size.
        device: moves the model there first; by default where it is.

    Raises:
        InputError: counts below 1, or more new tokens than the model has positions.

    >>> measure_speed(model).decode(1)  # doctest: +SKIP
    """
    rivals = [_Contender(model, prompt_tokens, new_tokens, device)]
    return _race(rivals, batch_sizes, repeats, progress)[0]


def compare_speed(
    a: PreTrainedModel,
    b: PreTrainedModel,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 5,
    device: torch.device | str | None = None,
    progress: Progress = SILENT,
) -> SpeedComparison:
    """Measure two models as `measure_speed` does, in turn (A B A B ...), so both see the same machine.

    The prompt is as long as the shorter of the two models allows.

    Raises:
        InputError: as `measure_speed`.
    """
    prompt_tokens = min(_prompt_length(model, prompt_tokens, new_tokens) for model in (a, b))
    rivals = [_Contender(model, prompt_tokens, new_tokens, device) for model in (a, b)]
    first, second = _race(rivals, batch_sizes, repeats, progress)
    pairs = zip(first.measurements, second.measurements, strict=True)
    return SpeedComparison(first, second, tuple(_ratio(of_a, of_b) for of_a, of_b in pairs))


class _Contender:
    """A model with its prompts, ready to be timed."""

    def __init__(
        self, model: PreTrainedModel, prompt_tokens: int, new_tokens: int, device: torch.device | str | None
    ) -> None:
        self.prompt_tokens = _prompt_length(model, prompt_tokens, new_tokens)
        self.new_tokens = new_tokens
        self.model = model if device is None else model.to(torch.device(device))
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}

    def prompts(self, batch_size: int) -> Tensor:
        """(batch_size, prompt_tokens) random ids, the same for every model with this vocabulary."""
        generator = torch.Generator().manual_seed(PROMPT_SEED)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (batch_size, self.prompt_tokens), generator=generator)
        return ids.to(self.model.device)

    def run(self, prompts: Tensor, new_tokens: int) -> tuple[float, float]:
        """Tokens per second of prefill and of decode, once."""
        started = self._now()
        output = self.model(input_ids=prompts, **self.options)
        token = output.logits[:, -1:].argmax(-1)
        prefilled = self._now()
        for _ in range(new_tokens):
            output = self.model(input_ids=token, past_key_values=output.past_key_values, **self.options)
            token = output.logits[:, -1:].argmax(-1)
        done = self._now()
        return prompts.numel() / (prefilled - started), len(prompts) * new_tokens / (done - prefilled)

    def result(self, measurements: Sequence[Measurement]) -> SpeedResult:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return SpeedResult(
            self.prompt_tokens, self.new_tokens, str(self.model.device), dtype, tuple(measurements)
        )

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _race(
    rivals: Sequence[_Contender], batch_sizes: Sequence[int], repeats: int, progress: Progress
) -> list[SpeedResult]:
    _require_positive("batch sizes", *batch_sizes)
    _require_positive("repeats", repeats)
    rows: list[list[Measurement]] = [[] for _ in rivals]
    total = len(batch_sizes) * repeats * len(rivals)
    with torch.inference_mode(), _in_eval_mode(rivals), progress.task("timing", total) as task:
        for batch_size in batch_sizes:
            for row, measurements in zip(rows, _heat(rivals, batch_size, repeats, task), strict=True):
                row.extend(measurements)
    return [rival.result(row) for rival, row in zip(rivals, rows, strict=True)]


def _heat(
    rivals: Sequence[_Contender], batch_size: int, repeats: int, task: Task
) -> Iterator[tuple[Measurement, Measurement]]:
    """All rivals in turn at one batch size, after a short run of each."""
    prompts = [rival.prompts(batch_size) for rival in rivals]
    for rival, prompt in zip(rivals, prompts, strict=True):
        rival.run(prompt, min(WARM_UP_TOKENS, rival.new_tokens))
    speeds: list[list[tuple[float, float]]] = [[] for _ in rivals]
    for _ in range(repeats):
        for rival, prompt, seen in zip(rivals, prompts, speeds, strict=True):
            seen.append(rival.run(prompt, rival.new_tokens))
            task.advance()
    for seen in speeds:
        prefill, decode = zip(*seen, strict=True)
        yield Measurement("prefill", batch_size, prefill), Measurement("decode", batch_size, decode)


@contextmanager
def _in_eval_mode(rivals: Sequence[_Contender]) -> Iterator[None]:
    training = [rival.model.training for rival in rivals]
    for rival in rivals:
        rival.model.eval()
    try:
        yield
    finally:
        for rival, before in zip(rivals, training, strict=True):
            rival.model.train(before)


def _prompt_length(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> int:
    """The prompt that fits into the model's positions together with the new tokens."""
    _require_positive("prompt tokens", prompt_tokens)
    _require_positive("new tokens", new_tokens)
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return prompt_tokens
    if new_tokens >= positions:
        raise InputError(f"{new_tokens} new tokens", f"fewer than the model's {positions} positions")
    return min(prompt_tokens, positions - new_tokens)


def _require_positive(what: str, *counts: int) -> None:
    if not counts or min(counts) < 1:
        raise InputError(f"{what} {counts}", "whole numbers from 1 on")


def _ratio(a: Measurement, b: Measurement) -> Ratio:
    pairs = zip(a.tokens_per_second, b.tokens_per_second, strict=True)
    ratios = [of_a / of_b for of_a, of_b in pairs]
    return Ratio(a.phase, a.batch_size, statistics.median(ratios), min(ratios), max(ratios))


def _settings(result: SpeedResult) -> dict[str, Any]:
    names = ("prompt_tokens", "new_tokens", "device", "dtype")
    return {name: getattr(result, name) for name in names}
