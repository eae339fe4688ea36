"""The loop over blocks: observe, prune, propagate, hand over."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.calibration.distributed import Group
from secateur.calibration.driver import Driver, OpenBlock
from secateur.calibration.gradients import GradientStore, collect_gradients
from secateur.core.factored import Factored
from secateur.core.progress import Progress
from secateur.pipeline.matrices import Budget, prune_block
from secateur.report.model import Block, Layer
from secateur.weights.base import WeightMethod

__all__ = ["gradients_for", "prune_blocks"]

Finished = Mapping[int, dict[str, Any]]
"""Records of blocks that an earlier run has pruned: `{"layers": [...], "block": {...}}`."""

Store = Callable[[OpenBlock, Mapping[str, Factored]], Callable[[dict[str, Any]], None]]
"""Rounds a pruned block, before it propagates, to what will be stored, some matrices as factors; returns how
to store it."""


def gradients_for(
    method: WeightMethod, driver: Driver, scratch: Path, progress: Progress, group: Group | None = None
) -> GradientStore | None:
    """Gradient magnitudes of the dense model, for the methods that ask for them."""
    if "gradient" not in method.statistics:
        return None
    return collect_gradients(
        driver.source,
        driver.windows,
        norm=getattr(method, "norm", "l2"),
        folder=scratch / "gradients",
        progress=progress,
        group=group,
    )


def prune_blocks(
    driver: Driver,
    method: WeightMethod,
    budget: Budget,
    gradients: GradientStore | None,
    seed: int,
    progress: Progress,
    *,
    finished: Finished | None = None,
    store: Store | None = None,
) -> tuple[list[Layer], list[Block]]:
    """Prune block after block; each sees inputs that passed through the pruned blocks before it
    (one-shot-baselines, section 2.0).

    Args:
        finished: blocks that the source already delivers pruned; they only propagate.
        store: keeps a pruned block before the next one is opened.

    Returns:
        Rows of all matrices and of all blocks.
    """
    layers: list[Layer] = []
    blocks: list[Block] = []
    finished = finished or {}
    with progress.task(f"pruning with {method.id}", len(driver.source.anatomy.blocks)) as task:
        for opened in driver.blocks(forward=bool(method.statistics), outputs=False):
            record = finished.get(opened.index)
            if record is not None:
                opened.finish()
            else:
                record = _prune_one(opened, method, budget, gradients, seed, store)
            layers += [Layer.model_validate(row) for row in record["layers"]]
            blocks.append(Block.model_validate(record["block"]))
            loss = blocks[-1].loss
            task.advance(note="" if loss is None else f"loss {loss:.2e}")
    return layers, blocks


def _prune_one(
    opened: OpenBlock,
    method: WeightMethod,
    budget: Budget,
    gradients: GradientStore | None,
    seed: int,
    store: Store | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    needs = method.statistics - {"gradient"}
    observed = opened.observe(needs) if needs else {}
    found: Mapping[str, Tensor] = gradients.load(opened.index) if gradients else {}
    factored: dict[str, Factored] = {}
    rows = prune_block(opened, method, budget, observed, found, seed, factored)
    observed.clear()
    keep = store(opened, factored) if store else None
    loss = opened.finish()
    block = Block(block=opened.index, loss=loss, seconds=round(time.perf_counter() - started, 4))
    record = {"layers": [row.model_dump(mode="json") for row in rows], "block": block.model_dump(mode="json")}
    if keep:
        keep(record)
    return record
