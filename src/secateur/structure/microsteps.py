"""Units that go a few at a time until the budget is spent (adapt-pruner, sections 2.2 and 2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from secateur.anatomy.units import Units
from secateur.structure.allocation import affordable
from secateur.structure.base import AdaptiveMethod

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Shrinking"]

CEILING = 0.99
CLOSE = 1e-9


class Shrinking:
    """What is gone of a model, and how far every block was meant to be by now.

    A unit goes when the target of its block passes the share of its kind that would then be gone, so coarse
    units wait until enough has gathered for one. The order inside a step is that of time, as if targets grew
    evenly; a step that the budget cuts short takes the earliest, and cheaper units where a dear one no
    longer fits.

    Attributes:
        groups: block and units; blocks without a group are left whole.
        removed_at: for each group (count,) int32, the number of the step that took a unit, 0 while it stays.
        targets: (blocks,) float64, the sparsity that every block was meant to have.
        steps: how many were taken.
    """

    def __init__(
        self, groups: Sequence[tuple[int, Units]], blocks: int, budget: float, method: AdaptiveMethod
    ) -> None:
        import torch

        self.groups, self.budget, self.method = list(groups), int(budget), method
        self.removed_at = [torch.zeros(units.count, dtype=torch.int32) for _, units in groups]
        self.targets = torch.zeros(blocks, dtype=torch.float64)
        self.steps = 0

    @property
    def most(self) -> int:
        """Parameters that can go at all."""
        whole = Shrinking(self.groups, len(self.targets), 0, self.method)
        levels = (whole._levels(number)[-1:].sum() for number in range(len(self.groups)))
        return sum(int(gone) * group[1].parameters for gone, group in zip(levels, self.groups, strict=True))

    @property
    def freed(self) -> int:
        """Parameters that are gone."""
        return sum(gone * units.parameters for gone, (_, units) in zip(self.gone, self.groups, strict=True))

    @property
    def gone(self) -> list[int]:
        """Units of each group that are gone."""
        return [int((steps > 0).sum()) for steps in self.removed_at]

    @property
    def open_blocks(self) -> list[int]:
        """The blocks that can lose more units and have one that fits into the budget, sorted."""
        left = self.budget - self.freed
        found = set()
        for number, (block, units) in enumerate(self.groups):
            levels = self._levels(number)
            if len(levels) and (int(levels[0]) - self.gone[number]) * units.parameters <= left:
                found.add(block)
        return sorted(found)

    def kept(self) -> list[Tensor]:
        """For each group the units that stay, sorted int64."""
        return [(steps == 0).nonzero().squeeze(1) for steps in self.removed_at]

    def take(self, increments: Mapping[int, float], scores: Sequence[Tensor]) -> None:
        """Take one step.

        Args:
            increments: by open block, what its target grows by; it never falls below what is gone.
            scores: for each group (count,) importance; the smallest go first, ties by position.
        """
        import torch

        self.steps += 1
        before, after = self.targets, self._grown(increments)
        levels = [self._levels(number) for number in range(len(self.groups))]
        times, costs, owners = [], [], []
        for number, (block, units) in enumerate(self.groups):
            shares = levels[number] / units.count
            levels[number] = levels[number][shares <= after[block] + CLOSE]
            due = (levels[number] / units.count - before[block]) / (after[block] - before[block] + CLOSE)
            times.append(due.clamp(min=0))
            jumps = levels[number].diff(prepend=torch.tensor([self.gone[number]]))
            costs.append(jumps * units.parameters)
            owners.append(torch.full_like(jumps, number))
        order = torch.cat(times).argsort(stable=True)
        taken = affordable(torch.cat(costs), order, self.budget - self.freed)
        counts = torch.bincount(torch.cat(owners)[taken], minlength=len(self.groups)).tolist()
        for number, count in enumerate(counts):
            if count:
                self._remove(number, int(levels[number][count - 1]), scores[number])
        self.targets = after

    def _remove(self, number: int, gone: int, scores: Tensor) -> None:
        left = scores.double().masked_fill(self.removed_at[number] > 0, float("inf"))
        self.removed_at[number][left.argsort(stable=True)[: gone - self.gone[number]]] = self.steps

    def _grown(self, increments: Mapping[int, float]) -> Tensor:
        after = self.targets.clone()
        for block, more in increments.items():
            own = [number for number, group in enumerate(self.groups) if group[0] == block]
            gone = sum(self.gone[number] * self.groups[number][1].parameters for number in own)
            whole = sum(self.groups[number][1].count * self.groups[number][1].parameters for number in own)
            after[block] = min(max(float(self.targets[block]) + more, gone / whole), CEILING)
        return after

    def _levels(self, number: int) -> Tensor:
        """int64, ascending: how many units of a group may be gone after more have gone."""
        import torch

        units = self.groups[number][1]
        step = self.method.round_to if units.kind.endswith("ffn") else 1
        least, now = units.count - self._most(units), units.count - self.gone[number]
        kept = torch.arange((now - 1) // step, -(-least // step) - 1, -1) * step
        return units.count - kept

    def _most(self, units: Units) -> int:
        return max(0, min(units.count - self.method.min_keep, int(CEILING * units.count)))
