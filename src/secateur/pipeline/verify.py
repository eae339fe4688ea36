"""Evidence: what the cut cost in quality and speed, measured before the result is declared finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.core.progress import Progress
from secateur.evaluation.memory import available_memory_bytes
from secateur.evaluation.quality import compare_quality, protocol_of
from secateur.evaluation.speed import compare_speed
from secateur.pipeline.data import RunData
from secateur.pipeline.fastest import load_fastest
from secateur.pipeline.opened import Opened
from secateur.recipe import Job

__all__ = ["Verdict", "verify"]


SPEED_MEMORY_FRACTION = 0.4
SPEED_PARAMETERS = 2_000_000_000
SPEED_KEYS = tuple(
    f"{phase}_tokens_per_second_{when}" for phase in ("prefill", "decode") for when in ("before", "after")
)
QUALITY_KEYS = ("perplexity_before", "perplexity_after", "kl_divergence", "top1_agreement")


@dataclass
class Verdict:
    """Values for the report, and a reason for each that was not measured; `visits` of the experts of the
    dense and of the pruned model, where they have any; `runtime` says how both were loaded to be timed."""

    values: dict[str, Any] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] | None = None
    visits: dict[str, Any] | None = None
    runtime: dict[str, Any] | None = None


def verify(
    opened: Opened,
    pruned: Opened,
    recipe: Job,
    data: RunData,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Verdict:
    """Quality and speed of the dense and the pruned model.

    Args:
        opened: the dense model.
        pruned: the files that are about to be published.
    """
    verdict = Verdict()
    _quality(verdict, (opened, pruned), recipe, data, device, dtype, progress)
    _speed(verdict, (opened, pruned), recipe, device, dtype)
    return verdict


def _quality(
    verdict: Verdict,
    models: tuple[Opened, Opened],
    recipe: Job,
    data: RunData,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    if data.evaluation is None:
        verdict.not_measured |= dict.fromkeys(QUALITY_KEYS, "no evaluation windows were asked for")
        return
    before, after = compare_quality(
        models[0].source(device, dtype),
        models[1].source(device, dtype),
        data.evaluation,
        batch_size=recipe.calibration.batch_size,
        progress=progress,
    )
    verdict.values |= {
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "kl_divergence": after.kl_divergence,
        "top1_agreement": after.top1_agreement,
    }
    if before.visits:
        verdict.visits = {"before": before.visits, "after": after.visits}
    verdict.protocol = {**protocol_of(data.evaluation, dtype, models[0].folder), "split": data.held_out}


def _speed(
    verdict: Verdict,
    models: tuple[Opened, Opened],
    recipe: Job,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    reason = _why_no_speed(models[0], recipe, dtype)
    if reason:
        verdict.not_measured |= dict.fromkeys(SPEED_KEYS, reason)
        return
    dense, pruned = (load_fastest(model, dtype, device) for model in models)
    speed = compare_speed(pruned.model, dense.model, batch_sizes=(1,), repeats=3, new_tokens=16)
    verdict.runtime = {
        "before": dense.words,
        "after": pruned.words,
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes_before": dense.weight_bytes,
        "weight_bytes_after": pruned.weight_bytes,
    }
    verdict.values |= {
        "prefill_tokens_per_second_before": speed.b.prefill(1),
        "prefill_tokens_per_second_after": speed.a.prefill(1),
        "decode_tokens_per_second_before": speed.b.decode(1),
        "decode_tokens_per_second_after": speed.a.decode(1),
    }


def _why_no_speed(opened: Opened, recipe: Job, dtype: torch.dtype) -> str:
    if not recipe.measure_speed:
        return "speed was not asked for (--no-measure-speed)"
    parameters = opened.checkpoint.parameters
    needed = 2 * parameters * dtype.itemsize
    if parameters > SPEED_PARAMETERS or needed > SPEED_MEMORY_FRACTION * available_memory_bytes():
        return f"two models of {parameters:,} parameters are too large to time here; see `secateur bench`"
    return ""
