"""Pruning and training in turns: how data and learning rate are spread over the stages (adapt-pruner, 2.4).

One pass over the data and one learning-rate curve serve all stages; each takes up both where the one before
stopped.
"""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["learning_rate", "shard_sizes", "shard_weights", "stage_targets"]

Split = Literal["linear", "constant"]
Curve = Literal["wsd", "cosine"]


def shard_weights(stages: int, split: Split = "linear") -> list[float]:
    """What part of the data each stage trains on; they sum to 1.

    `linear` gives stage i of M the part 2 i / (M (M + 1)): the more is gone, the longer the training.

    >>> [round(weight, 2) for weight in shard_weights(4)]
    [0.1, 0.2, 0.3, 0.4]
    """
    shares = range(1, stages + 1) if split == "linear" else [1] * stages
    return [share / sum(shares) for share in shares]


def shard_sizes(items: int, stages: int, split: Split = "linear") -> list[int]:
    """Whole numbers of consecutive items (sequences, steps) that follow `shard_weights`; they sum to `items`.

    Each end is rounded by itself, so none is off by one or more.

    >>> shard_sizes(100, 4)
    [10, 20, 30, 40]
    """
    weights = shard_weights(stages, split)
    ends = [round(items * math.fsum(weights[: stage + 1])) for stage in range(stages)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def stage_targets(before: int, after: int, stages: int) -> list[int]:
    """Parameters that the model has after the pruning of each stage: equal steps from `before` to `after`.

    >>> stage_targets(1000, 600, 4)
    [900, 800, 700, 600]
    """
    return [before - round((before - after) * stage / stages) for stage in range(1, stages + 1)]


def learning_rate(
    step: int,
    steps: int,
    *,
    peak: float,
    minimum: float = 0.0,
    curve: Curve = "wsd",
    warmup: float = 0.05,
    decay: float = 0.1,
) -> float:
    """The rate of one of all `steps`, counted from 0 over all stages.

    Linear from 0 to the peak over the first part `warmup`; then for `wsd` constant and linear down to
    `minimum` over the last part `decay`, for `cosine` half a cosine down to `minimum`. The last step has the
    minimum.

    >>> [round(learning_rate(step, 10, peak=1.0, warmup=0.2, decay=0.2), 2) for step in (0, 1, 5, 8, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    falling = round(decay * steps) if curve == "wsd" else steps - rising
    passed = step + 1 - (steps - falling)
    if passed <= 0:
        return peak
    part = passed / falling
    left = 1 - part if curve == "wsd" else (1 + math.cos(math.pi * part)) / 2
    return minimum + (peak - minimum) * left
