"""Pruning and training in turns: how data and cuts are spread over the stages (adapt-pruner, 2.4).

One pass over the data and one learning-rate curve serve all stages; each takes up both where the one before
stopped. The curve itself is `secateur.recovery.base.learning_rate`.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

__all__ = ["Split", "shard_sizes", "shard_weights", "stage_sparsities"]

Split = Literal["linear", "constant"]


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


def stage_sparsities(sparsity: float, stages: int) -> list[float]:
    """What each stage removes of what it finds, so that equal amounts go each time and `sparsity` in all.

    >>> [round(share, 3) for share in stage_sparsities(0.4, 4)]
    [0.1, 0.111, 0.125, 0.143]
    """
    left = [1 - sparsity * stage / stages for stage in range(stages + 1)]
    return [1 - after / before for before, after in itertools.pairwise(left)]
