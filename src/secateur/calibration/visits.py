"""Which expert each token visits, what it brings there, and what becomes of the output with other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.calibration.driver import OpenBlock
from secateur.calibration.probes import real_tokens

__all__ = ["Visits", "expert_errors", "routing_error", "visits"]

Reroute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(tokens, k) routes and gates, to those that are taken instead."""


@dataclass(frozen=True)
class Visits:
    """What a module of experts is called with, the real tokens alone.

    Attributes:
        rows: (tokens, d) hidden states.
        routes: (tokens, k) int64, the experts of each token.
        gates: (tokens, k), what their outputs are multiplied by.
        windows: (tokens,) int64, the window that each is from, counted over all batches.
    """

    rows: Tensor
    routes: Tensor
    gates: Tensor
    windows: Tensor


def visits(opened: OpenBlock, path: str) -> Iterator[Visits]:
    """Batch by batch: what the experts at `path` inside the block are called with."""
    for batch, tensors in opened.calls(path):
        rows, *rest = (real_tokens(batch, opened.block, tensor) for tensor in tensors)
        routes = next(tensor for tensor in rest if not tensor.is_floating_point())
        gates = next(tensor for tensor in rest if tensor.is_floating_point())
        count, length = batch.windows.ids.shape
        places = torch.arange(batch.where.start, batch.where.start + count, device=rows.device)
        windows = places.repeat_interleave(length)
        yield Visits(rows, routes, gates, windows if batch.rows is None else windows[batch.rows])


def expert_errors(
    experts: nn.Module, others: Sequence[Callable[[], Mapping[str, Tensor]]], seen: Sequence[Visits]
) -> Tensor:
    """How far the output of the block moves when one expert has other weights (mc-moe, section 2.2).

    Only the tokens that visit it are computed, with the gates they bring: the rest of the block does not
    change. That is the same number as from whole blocks.

    Args:
        experts: the module, in eval mode.
        others: each makes other values of the module's parameters, of all experts at once; called in turn, so
            that one set is in memory at a time.
        seen: what the module is called with.

    Returns:
        (n, others) float64: the sum over windows of the Frobenius norm of the change.
    """
    count = int(getattr(experts, "num_experts", 0)) or 1 + max(int(one.routes.max()) for one in seen)
    windows = 1 + max(int(one.windows.max()) for one in seen)
    columns = []
    for make in others:
        weights = dict(make())
        squares = torch.zeros(windows * count, dtype=torch.float64, device=seen[0].rows.device)
        for one in seen:
            for slot in range(one.routes.shape[1]):
                own = one.routes[:, [slot]]
                call = (one.rows, own, one.gates[:, [slot]])
                moved = _run(experts, call).double() - _run(experts, call, weights).double()
                squares.index_add_(0, one.windows * count + own[:, 0], moved.square().sum(1))
        columns.append(squares.view(windows, count).sqrt().sum(0))
    return torch.stack(columns, dim=1)


def routing_error(experts: nn.Module, reroute: Reroute, seen: Sequence[Visits]) -> Tensor:
    """(2,) float64: squared change of the experts' output with other routes, and its squared norm before."""
    sums = torch.zeros(2, dtype=torch.float64, device=seen[0].rows.device)
    for one in seen:
        before = _run(experts, (one.rows, one.routes, one.gates)).double()
        after = _run(experts, (one.rows, *reroute(one.routes, one.gates))).double()
        sums += torch.stack([(after - before).square().sum(), before.square().sum()])
    return sums


def _run(experts: nn.Module, call: tuple[Tensor, ...], weights: dict[str, Tensor] | None = None) -> Any:
    with torch.no_grad():
        return experts(*call) if weights is None else functional_call(experts, weights, call)
