"""The sentence about experts that no calibration token reached."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["unvisited"]

NAMED = 16


def unvisited(counts: Mapping[int, Tensor], so: str) -> list[str]:
    """One warning in all, or none; many experts are counted, not named.

    Args:
        counts: by block, (n,) tokens that visited each expert.
        so: what became of them, the end of the sentence.

    >>> import torch
    >>> unvisited({0: torch.tensor([3, 0]), 1: torch.tensor([1, 2])}, "first to go.")
    ['No calibration token visited expert 1 of block 0: first to go.']
    """
    never = {index: (own == 0).nonzero().flatten().tolist() for index, own in counts.items()}
    total = sum(map(len, never.values()))
    if not total:
        return []
    if total <= NAMED:
        named = "; ".join(
            f"{', '.join(map(str, own))} of block {index}" for index, own in never.items() if own
        )
        noun = "expert" if total == 1 else "experts"
        return [f"No calibration token visited {noun} {named}: {so}"]
    worst = max(never, key=lambda index: len(never[index]))
    every = sum(len(own) for own in counts.values())
    return [
        f"No calibration token visited {total:,} of {every:,} experts ({len(never[worst])} of them in block "
        f"{worst}): {so} More windows (--samples) reach more."
    ]
