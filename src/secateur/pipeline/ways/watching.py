"""What the blocks of a dense model do to the hidden states that pass through them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from secateur.anatomy.units import units_of
from secateur.calibration.activations import Batch
from secateur.calibration.distributed import Group
from secateur.calibration.driver import OpenBlock, Watch

__all__ = ["BlockWatch", "Moves", "across_ffn"]

CHANGES = ("influence", "turns", "mse", "mae")


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
        self._sums.append(torch.zeros(len(CHANGES) + 1, dtype=torch.float64))
        self._last += [[] for _ in range(1 if self._last else 2)]

    def __call__(self, batch: Batch, before: Tensor, after: Tensor) -> None:
        a, b = (normalize(batch.real(hidden).float(), dim=-1) for hidden in (before, after))
        turns = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / torch.pi  # exact where small
        moves = (a - b).square().sum(-1) / 2  # 1 - cos
        apart = batch.real(after).float() - batch.real(before).float()
        kinds = (moves, turns, apart.square().mean(-1), apart.abs().mean(-1))
        sums = torch.stack([kind.double().sum() for kind in kinds]).cpu()
        self._sums[-1] += torch.cat([sums, sums.new_tensor([len(a)])])
        if len(self._last) == 2:
            self._last[0].append(_last(batch, before))
        self._last[-1].append(_last(batch, after))

    def states(self, group: Group | None) -> dict[str, Tensor]:
        """The fields of `BlockStates`, over all processes."""
        depths = normalize(torch.stack([torch.cat(parts) for parts in self._last], dim=1).double(), dim=-1)
        angles = (depths @ depths.mT).clamp(-1, 1).acos().div(torch.pi).sum(0)
        windows = torch.tensor(float(len(depths)), dtype=torch.float64)
        if group:
            for tensor in (angles, windows):
                group.all_reduce(tensor)
        changes = self.changes(group)
        found = {name: changes[name] for name in ("influence", "turns")}
        return {**found, "angles": angles / windows}

    def changes(self, group: Group | None) -> dict[str, Tensor]:
        """(L,) each, means over tokens of all processes: `influence` and `turns` as above, `mse` and `mae` of
        output against input, over the hidden dimension (cfsp, section 2.1)."""
        sums = torch.stack(self._sums)
        if group:
            group.all_reduce(sums)
        means = sums[:, :-1] / sums[:, -1:]
        return {name: means[:, number].clone() for number, name in enumerate(CHANGES)}


def across_ffn(watch: Watch, opened: OpenBlock) -> Watch:
    """The same watch of the feed-forward part alone: what enters is the output of the block whose
    feed-forward matrices write nothing, whatever norms and scales stand behind them."""
    names = [
        name
        for units in units_of(opened.block)
        if units.kind.endswith("ffn")
        for name in (units.writer.parameter, f"{units.writer.name}.bias")
        if name in opened.parameters
    ]

    def watched(batch: Batch, before: Tensor, after: Tensor) -> None:
        kept = {name: opened.parameters[name].clone() for name in names}
        with torch.no_grad():
            for name in names:
                opened.parameters[name].zero_()
            silent = opened.output(batch)
            for name, tensor in kept.items():
                opened.parameters[name].copy_(tensor)
        watch(batch, silent, after)

    return watched


def _last(batch: Batch, hidden: Tensor) -> Tensor:
    """(B, d) of the last real token of each window."""
    mask = batch.windows.mask
    if mask is None:
        return hidden[:, -1].float().cpu()
    at = (mask * torch.arange(mask.shape[1])).argmax(1)
    return hidden[torch.arange(len(at)), at.to(hidden.device)].float().cpu()
