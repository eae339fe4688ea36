"""What the blocks of a dense model do to the hidden states that pass through them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from secateur.calibration.activations import Batch
from secateur.calibration.distributed import Group

__all__ = ["BlockWatch", "Moves"]


class Moves:
    """Sees every block's input and output in any number of passes, and how far apart they point."""

    def __init__(self, blocks: int) -> None:
        self._sums = torch.zeros(blocks, 2, dtype=torch.float64)

    def __call__(self, index: int, batch: Batch, before: Tensor, after: Tensor) -> None:
        a, b = (normalize(batch.real(hidden).float(), dim=-1) for hidden in (before, after))
        moves = (a - b).square().sum(-1) / 2  # 1 - cos
        self._sums[index] += torch.stack([moves.double().sum().cpu(), torch.tensor(float(len(a))).double()])

    def means(self, group: Group | None) -> Tensor:
        """(blocks,) float64, mean over tokens of 1 - cos(input, output), over all processes."""
        if group:
            group.all_reduce(self._sums)
        return self._sums[:, 0] / self._sums[:, 1]


class BlockWatch:
    """Sees every block's input and output, batch by batch; see `secateur.structure.base.BlockStates`."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._last: list[list[Tensor]] = []

    def next_block(self) -> None:
        """Say that another block comes."""
        self._sums.append(torch.zeros(3, dtype=torch.float64))
        self._last += [[] for _ in range(1 if self._last else 2)]

    def __call__(self, batch: Batch, before: Tensor, after: Tensor) -> None:
        a, b = (normalize(batch.real(hidden).float(), dim=-1) for hidden in (before, after))
        turns = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / torch.pi  # exact where small
        moves = (a - b).square().sum(-1) / 2  # 1 - cos
        sums = torch.stack([moves.double().sum(), turns.double().sum()]).cpu()
        self._sums[-1] += torch.cat([sums, sums.new_tensor([len(a)])])
        if len(self._last) == 2:
            self._last[0].append(_last(batch, before))
        self._last[-1].append(_last(batch, after))

    def states(self, group: Group | None) -> dict[str, Tensor]:
        """The fields of `BlockStates`, over all processes."""
        sums = torch.stack(self._sums)
        depths = normalize(torch.stack([torch.cat(parts) for parts in self._last], dim=1).double(), dim=-1)
        angles = (depths @ depths.mT).clamp(-1, 1).acos().div(torch.pi).sum(0)
        windows = torch.tensor(float(len(depths)), dtype=torch.float64)
        if group:
            for tensor in (sums, angles, windows):
                group.all_reduce(tensor)
        influence, turns = (sums[:, :2] / sums[:, 2:]).T.contiguous()
        return {"influence": influence.clone(), "turns": turns.clone(), "angles": angles / windows}


def _last(batch: Batch, hidden: Tensor) -> Tensor:
    """(B, d) of the last real token of each window."""
    mask = batch.windows.mask
    if mask is None:
        return hidden[:, -1].float().cpu()
    at = (mask * torch.arange(mask.shape[1])).argmax(1)
    return hidden[torch.arange(len(at)), at.to(hidden.device)].float().cpu()
