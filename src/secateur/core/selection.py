"""Which weights stay: exact counts, stable ties, no full sorts.

A group of g scores at sparsity p loses its `drop_count(g, p)` smallest entries; among equal scores the
lowest index goes first (one-shot-baselines, section 2.1). Every function here keeps that rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import NumericsError, RecipeError
from secateur.core.pattern import Pattern

__all__ = ["check_pattern", "drop_count", "drop_smallest", "global_counts", "select", "select_groups"]

PAIRWISE_LIMIT = 8
"""Widest N:M group ranked by comparing all pairs; wider ones are partitioned like rows."""

Passes = Callable[[], Iterable[tuple[str, Tensor]]]


def drop_count(size: int, sparsity: float) -> int:
    """How many of `size` entries go at `sparsity`; rounds down, forgiving the last bits of 0.7 * 10."""
    return int(sparsity * size + 1e-6)


def select(scores: Tensor, pattern: Pattern, sparsity: float, *, name: str = "the matrix") -> Tensor:
    """Mask of the weights that stay.

    Args:
        scores: (..., out, in), the smallest go; leading dimensions are separate matrices.
        pattern: `row`, `matrix` or N:M along the inputs.
        sparsity: fraction to remove, in [0, 1); an N:M pattern brings its own.
        name: what the scores belong to, for messages.

    Returns:
        (..., out, in) bool, True = stays.

    Raises:
        RecipeError: the inputs do not divide by M, or the pattern spans several matrices.
        NumericsError: a score is NaN.
    """
    if scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if bool(scores.amax().isnan()):  # the maximum carries any NaN, in one reduction
        raise NumericsError(f"the scores of {name} contain NaN: its weights or statistics are not finite")
    if pattern.kind == "n:m":
        _check_divides(scores.shape[-1], pattern, name)
        return select_groups(scores, pattern)
    if pattern.kind == "row":
        return drop_smallest(scores, drop_count(scores.shape[-1], sparsity))
    if pattern.kind == "matrix":
        flat = scores.flatten(-2)
        return drop_smallest(flat, drop_count(flat.shape[-1], sparsity)).view(scores.shape)
    raise RecipeError(
        f"pattern '{pattern}' for a single matrix",
        "'row', 'matrix' or N:M",
        "a global pattern needs the counts of `global_counts` first",
    )


def drop_smallest(scores: Tensor, count: int) -> Tensor:
    """Mask that drops exactly the `count` smallest along the last dimension, lowest index first.

    Args:
        scores: (..., n), free of NaN.
        count: 0 <= count <= n.

    Returns:
        (..., n) bool, True = stays.
    """
    if count <= 0 or count >= scores.shape[-1]:
        return torch.full_like(scores, count <= 0, dtype=torch.bool)
    threshold, tied = _threshold(scores, count)
    above = scores > threshold
    if not tied:
        return above
    equal = scores == threshold
    surplus = equal.cumsum(-1) > count - (scores < threshold).sum(-1, keepdim=True)
    return above | (equal & surplus)


def _threshold(scores: Tensor, count: int) -> tuple[Tensor, bool]:
    """(..., 1) the `count`-th smallest, and whether some group may have more of it than must go."""
    if scores.is_cuda:  # ties are taken for granted there: asking would stall the stream
        lowest = scores.topk(count, dim=-1, largest=False, sorted=False).values
        return lowest.amax(-1, keepdim=True), True
    # numpy partitions with vector instructions, about seven times faster than kthvalue
    plain = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    parted = np.partition(plain.numpy(), count - 1, axis=-1)
    threshold = torch.from_numpy(parted[..., count - 1 : count].copy())
    tied = bool((parted[..., count:].min(-1, keepdims=True) == threshold.numpy()).any())
    return threshold.to(scores.dtype), tied


def select_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """N:M selection of `select` without its checks and so without waiting for a device.

    Args:
        scores: (..., inputs), free of NaN, inputs a multiple of M.
        pattern: N:M.
    """
    groups = scores.reshape(*scores.shape[:-1], -1, pattern.of)
    dropped = pattern.of - pattern.keep
    if pattern.of > PAIRWISE_LIMIT:
        return drop_smallest(groups, dropped).flatten(-2)
    return torch.stack([rank >= dropped for rank in _ranks(groups.unbind(-1))], -1).flatten(-2)


def _ranks(entries: Sequence[Tensor]) -> list[Tensor]:
    """int8 place of each entry in its group, smallest first, equal ones in order of index."""
    last = len(entries) - 1
    ranks = [torch.full_like(entry, last - i, dtype=torch.int8) for i, entry in enumerate(entries)]
    for first, second in combinations(range(len(entries)), 2):
        second_wins = (entries[first] <= entries[second]).view(torch.int8)
        ranks[second] += second_wins
        ranks[first] -= second_wins
    return ranks


def _check_divides(columns: int, pattern: Pattern, name: str) -> None:
    if columns % pattern.of:
        raise RecipeError(
            f"{columns} inputs of {name}",
            f"a multiple of {pattern.of} for the pattern {pattern}",
            "choose another pattern or leave this matrix out",
        )


def check_pattern(weight: Tensor, pattern: Pattern, sparsity: float = 0.0) -> int:
    """Number of groups of `weight` (..., out, in) that hold more nonzeros than the pattern allows.

    For `row` and `matrix` the allowance follows from `sparsity`. Zero means that the pattern holds.
    """
    nonzero = weight != 0
    if pattern.kind == "n:m":
        _check_divides(weight.shape[-1], pattern, "the matrix")
        groups, allowed = nonzero.reshape(-1, pattern.of), pattern.keep
    else:
        groups = nonzero if pattern.kind == "row" else nonzero.flatten(-2)
        allowed = groups.shape[-1] - drop_count(groups.shape[-1], sparsity)
    return int((groups.sum(-1) > allowed).sum())


def global_counts(passes: Passes, sparsity: float) -> dict[str, int]:
    """How many weights of each matrix go when all matrices compete, exactly, in bounded memory.

    Radix selection on the bits of the scores: a histogram of the high half finds the bin of the
    threshold, one of the low half the threshold itself, and a third pass counts. Equal scores go in
    order of matrices. Dropping that many of each matrix (`drop_smallest` over the flattened matrix) is
    the exact selection over their concatenation.

    Args:
        passes: called three times; each time it gives the same (name, scores) pairs in the same order.
            Scores of any shape are compared in float32.
        sparsity: fraction of all scores to remove.

    Raises:
        NumericsError: a score is NaN, or the passes differ.
    """
    total, high = _histogram(passes, lambda keys: (keys >> 16) + (1 << 15))
    count = drop_count(total, sparsity)
    if count <= 0:
        return {name: 0 for name, _ in passes()}
    top, below = _bin_of(high, count)
    prefix = top - (1 << 15)
    _, low = _histogram(passes, lambda keys: keys[(keys >> 16) == prefix] & 0xFFFF)
    bottom, _ = _bin_of(low, count - below)
    return _count_below(passes, (prefix << 16) + bottom, count)


def _keys(name: str, scores: Tensor) -> Tensor:
    """(n,) int32 whose order is that of the float32 scores; -0 counts as 0."""
    plain = scores.detach().flatten().to(torch.float32) + 0.0
    if plain.numel() and bool(plain.amax().isnan()):
        raise NumericsError(f"the scores of {name} contain NaN: its weights or statistics are not finite")
    bits = plain.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _histogram(passes: Passes, digits: Callable[[Tensor], Tensor]) -> tuple[int, Tensor]:
    """Number of scores in one pass, and how often each 16-bit digit occurs."""
    total, histogram = 0, torch.zeros(1 << 16, dtype=torch.int64)
    for name, scores in passes():
        found = digits(_keys(name, scores))
        total += scores.numel()
        if found.is_cuda:
            histogram += torch.bincount(found, minlength=1 << 16).cpu()
        else:
            histogram += torch.from_numpy(np.bincount(found.numpy(), minlength=1 << 16))
    return total, histogram


def _bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th smallest, and how many lie in the bins below it."""
    reached = histogram.cumsum(0)
    index = int(torch.searchsorted(reached, count))
    if index == len(histogram):
        raise NumericsError("the scores changed between two passes over the matrices")
    return index, int(reached[index] - histogram[index])


def _count_below(passes: Passes, threshold: int, count: int) -> dict[str, int]:
    """Entries below the threshold in each matrix, and as many equal ones, in order, as `count` leaves."""
    below: dict[str, int] = {}
    equal: dict[str, int] = {}
    for name, scores in passes():
        keys = _keys(name, scores)
        below[name] = int((keys < threshold).sum())
        equal[name] = int((keys == threshold).sum())
    left = count - sum(below.values())
    if not 0 <= left <= sum(equal.values()):
        raise NumericsError("the scores changed between two passes over the matrices")
    counts = {}
    for name, ties in equal.items():
        taken = min(ties, left)
        counts[name] = below[name] + taken
        left -= taken
    return counts
