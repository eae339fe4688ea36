"""Evidence: what the cut cost in quality and speed, measured before the result is declared finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.core.progress import Progress
from secateur.evaluation.memory import available_memory_bytes
from secateur.evaluation.quality import compare_quality, protocol_of
from secateur.evaluation.speed import compare_speed
from secateur.pipeline.data import RunData
from secateur.pipeline.opened import Opened
from secateur.recipe import Recipe

__all__ = ["Verdict", "verify"]


SPEED_MEMORY_FRACTION = 0.4
SPEED_PARAMETERS = 2_000_000_000
SPEED_KEYS = tuple(
    f"{phase}_tokens_per_second_{when}" for phase in ("prefill", "decode") for when in ("before", "after")
)
QUALITY_KEYS = ("perplexity_before", "perplexity_after", "kl_divergence", "top1_agreement")

ReadPart = Callable[[int], "dict[str, Tensor] | None"]


@dataclass
class Verdict:
    """Values for the report, and a reason for each that was not measured."""

    values: dict[str, Any] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] | None = None


def verify(
    opened: Opened,
    read: ReadPart,
    recipe: Recipe,
    data: RunData,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Verdict:
    """Quality and speed of the dense and the pruned model.

    Args:
        read: file tensors of a pruned block, as its part was written.
    """
    verdict = Verdict()
    _quality(verdict, opened, read, recipe, data, device, dtype, progress)
    _speed(verdict, opened, read, recipe, device, dtype)
    return verdict


def _quality(
    verdict: Verdict,
    opened: Opened,
    read: ReadPart,
    recipe: Recipe,
    data: RunData,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    if data.evaluation is None:
        verdict.not_measured |= dict.fromkeys(QUALITY_KEYS, "no evaluation windows were asked for")
        return
    before, after = compare_quality(
        opened.source(device, dtype),
        opened.source(device, dtype, read=read),
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
    verdict.protocol = {**protocol_of(data.evaluation, dtype, opened.folder), "split": data.held_out}


def _speed(
    verdict: Verdict,
    opened: Opened,
    read: ReadPart,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    reason = _why_no_speed(opened, recipe, dtype)
    if reason:
        verdict.not_measured |= dict.fromkeys(SPEED_KEYS, reason)
        return
    dense = opened.load(dtype, device)
    pruned = load_pruned(opened, read, dtype, device)
    speed = compare_speed(pruned, dense, batch_sizes=(1,), repeats=3, new_tokens=16)
    verdict.values |= {
        "prefill_tokens_per_second_before": speed.b.prefill(1),
        "prefill_tokens_per_second_after": speed.a.prefill(1),
        "decode_tokens_per_second_before": speed.b.decode(1),
        "decode_tokens_per_second_after": speed.a.decode(1),
    }


def _why_no_speed(opened: Opened, recipe: Recipe, dtype: torch.dtype) -> str:
    if not recipe.measure_speed:
        return "speed was not asked for (--no-measure-speed)"
    parameters = opened.checkpoint.parameters
    needed = 2 * parameters * dtype.itemsize
    if parameters > SPEED_PARAMETERS or needed > SPEED_MEMORY_FRACTION * available_memory_bytes():
        return f"two models of {parameters:,} parameters are too large to time here; see `secateur bench`"
    return ""


def load_pruned(opened: Opened, read: ReadPart, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The dense model in memory with its blocks replaced by the pruned ones."""
    model = opened.load(dtype, device)
    for block in opened.anatomy.blocks:
        stored = read(block.index)
        if stored is not None:
            tensors = opened.layout.assemble(block.index, stored)
            model.get_submodule(block.prefix).load_state_dict(tensors)
    return model
