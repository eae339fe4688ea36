"""Who is swapped with whom when DSnoT refines a mask: candidates of all rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["InGroup", "InRow", "Queue", "Rows"]


@dataclass
class Rows:
    """What the swaps look at, all (out, in).

    Attributes:
        effect: contribution of each weight to the mean output of its row.
        appeal: effect over variance; the extremes are regrown first.
        importance: Wanda's score; the lowest are dropped first.
        kept: the mask to start from.
    """

    effect: Tensor
    appeal: Tensor
    importance: Tensor
    kept: Tensor


class Queue:
    """The first candidates of every row in order, for rows that must go down and rows that must go up."""

    def __init__(self, order: Tensor, allowed: Tensor, effect: Tensor, length: int) -> None:
        """`order`: (out, in), lowest first; `allowed`: who may be taken; `effect`: its sign is the side."""
        length = max(min(length, order.shape[1]), 1)
        sides = [order.masked_fill(~(allowed & side), torch.inf) for side in (effect > 0, effect < 0)]
        found = [side.topk(length, dim=-1, largest=False, sorted=True) for side in sides]
        self.indices = torch.stack([side.indices for side in found])
        self.usable = torch.stack([side.values < torch.inf for side in found])
        self.next = torch.zeros(self.indices.shape[:2], dtype=torch.int64, device=order.device)
        self._row = torch.arange(order.shape[0], device=order.device)

    def peek(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """(out,) index of the next candidate on `side` (0: positive effect), and whether there is one."""
        place = self.next[side, self._row]
        inside = place.clamp_max(self.indices.shape[-1] - 1)
        return self.indices[side, self._row, inside], self.usable[side, self._row, inside] & (place == inside)

    def advance(self, side: Tensor, rows: Tensor) -> None:
        self.next[side, self._row] += rows


class InRow:
    """Whatever weight of the row is least important goes."""

    def __init__(self, rows: Rows, cycles: int) -> None:
        self._queue = Queue(rows.importance, rows.kept, rows.effect, cycles)

    def find(self, side: Tensor, regrown: Tensor) -> tuple[Tensor, Tensor]:
        return self._queue.peek(side)

    def take(self, side: Tensor, dropped: Tensor, rows: Tensor) -> None:
        self._queue.advance(side, rows)


class InGroup:
    """The least important kept weight of the regrown one's own N:M group goes."""

    def __init__(self, rows: Rows, width: int) -> None:
        self._width = width
        self._free = rows.kept.clone()
        self._rows = rows
        self._row = torch.arange(len(rows.kept), device=rows.kept.device)

    def find(self, side: Tensor, regrown: Tensor) -> tuple[Tensor, Tensor]:
        start = regrown - regrown % self._width
        members = start[:, None] + torch.arange(self._width, device=start.device)
        effect = self._rows.effect.gather(1, members)
        right_sign = torch.where(side[:, None] == 0, effect > 0, effect < 0)
        allowed = self._free.gather(1, members) & right_sign
        lowest, place = self._rows.importance.gather(1, members).masked_fill(~allowed, torch.inf).min(1)
        return start + place, lowest < torch.inf

    def take(self, side: Tensor, dropped: Tensor, rows: Tensor) -> None:
        self._free[self._row, dropped] &= ~rows
