"""Which experts of a block the tokens visit, with what weight, and what the experts make of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.anatomy.mixture import Mixture, mixture_of
from secateur.anatomy.model import Block
from secateur.calibration.activations import Batch, Watch
from secateur.calibration.distributed import Group
from secateur.calibration.probes import BlockHooks, Hook, SeenError, real_tokens
from secateur.core.numerics import exact_products
from secateur.core.statistics import RoutingStatistics, Statistic

__all__ = ["RoutingProbe", "counting_visits"]

TOKENS = 256
"""Whose outputs of all experts that they visit are held at once."""
SMALLEST = 1e-6
"""Below it, shares of a token say nothing about how its scores were made."""


class RoutingProbe(BlockHooks):
    """Observes the router and the experts of a block while it is open as a context.

    The forward of each batch ends in `SeenError` where the experts would begin: their outputs, where wanted,
    are computed by the experts' own module, one chosen expert a token at a time, in time linear in the tokens
    and the experts asked for. Sums are float64, one number or one row an expert; nothing grows with the
    square of the tokens or holds pairs of experts a token (stun, section 2.7).

    Args:
        block: what the module is made of.
        mixture: its experts.
        module: the block itself.
        needs: `expert_norms`, `expert_means` and `expert_losses` are computed only if named.
        device: of the tokens.
    """

    def __init__(
        self,
        block: Block,
        mixture: Mixture,
        module: nn.Module,
        needs: Collection[Statistic],
        device: torch.device,
    ) -> None:
        super().__init__(module)
        self._block, self._mixture = block, mixture
        self._experts: Any = module.get_submodule(mixture.module)
        state = module.state_dict()
        self._router = state[mixture.router]
        self._bias = state[mixture.bias] if mixture.bias else None
        n, d = self._router.shape
        shapes = {"tokens": (1,), "coactivation": (n, n), "gates": (n,), "scores": (2, n), "misfit": (2,)}
        if "expert_norms" in needs:
            shapes["norms"] = (n,)
        if "expert_means" in needs:
            shapes["means"] = (n, d)
        if "expert_losses" in needs:
            shapes["losses"] = (n, n)
        self._sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()
        }
        self._ratios: list[Tensor] = []
        self._batch: Batch | None = None
        self._logits = torch.empty(0)

    def _hooks(self) -> Iterable[tuple[str, Hook]]:
        return (
            (self._mixture.router_module, self._see_router),
            (self._mixture.module, self._see_experts),
        )

    def begin(self, batch: Batch) -> None:
        """The next forward is of this batch."""
        self._batch = batch

    def take(self, group: Group | None) -> RoutingStatistics:
        """The statistics, summed over all processes."""
        ratios = torch.cat(self._ratios)
        if group is not None:
            for tensor in self._sums.values():
                group.all_reduce(tensor)
            ratios = _gather(ratios, group)
        sums = {name: tensor.cpu() for name, tensor in self._sums.items()}
        counts = sums["coactivation"].diagonal().clone()
        return RoutingStatistics(
            tokens=int(sums["tokens"]),
            counts=counts,
            coactivation=sums["coactivation"].fill_diagonal_(0),
            probabilities=sums["scores"][int(sums["misfit"].argmin())],
            gates=sums["gates"],
            ratios=ratios,
            norms=sums.get("norms"),
            means=sums.get("means"),
            losses=sums.get("losses"),
        )

    def _see_router(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the logits of the real tokens, (tokens, n) float32, until the experts are called."""
        rows = self._real(_tensors(args, kwargs)[0])
        bias = None if self._bias is None else self._bias.float()
        with exact_products():
            self._logits = functional.linear(rows.float(), self._router.float(), bias)

    def _see_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add one call: hidden states (tokens, d) first, then in any order routes (tokens, k) and weights."""
        hidden, *rest = _tensors(args, kwargs)
        routes = self._real(next(tensor for tensor in rest if not tensor.is_floating_point()))
        gates = self._real(next(tensor for tensor in rest if tensor.is_floating_point())).double()
        self._add_routes(routes, gates)
        self._add_scores(routes, gates)
        self._add_outputs(self._real(hidden), routes, gates)
        raise SeenError

    def _add_routes(self, routes: Tensor, gates: Tensor) -> None:
        visited = self._spread(routes, torch.ones_like(gates)).float()
        with exact_products():
            self._sums["coactivation"] += visited.T @ visited  # whole numbers, exact in float32
        self._sums["tokens"] += len(routes)
        self._sums["gates"] += self._spread(routes, gates).sum(0)
        ordered = gates.sort(dim=1, descending=True).values
        self._ratios.append((ordered[:, 1:] / ordered[:, :1].clamp_min(1e-30)).half().cpu())

    def _add_scores(self, routes: Tensor, gates: Tensor) -> None:
        """Probabilities as softmax and as sigmoid of the logits, and how far each is from the weights.

        A router multiplies the scores of the chosen experts by one factor (renormalisation, scaling), so the
        right kind differs from their weights by one constant a token, in logarithms. Which it is, is decided
        over all tokens; with one expert a token the question is open, and it is softmax.
        """
        logits = self._logits.double()
        kinds = logits.softmax(1), logits.sigmoid()
        for number, scores in enumerate(kinds):
            chosen = scores.gather(1, routes)
            self._sums["scores"][number] += self._spread(routes, chosen).sum(0)
            apart = gates.clamp_min(SMALLEST).log() - chosen.clamp_min(SMALLEST).log()
            self._sums["misfit"][number] += (apart - apart.mean(1, keepdim=True)).square().sum()

    def _add_outputs(self, rows: Tensor, routes: Tensor, gates: Tensor) -> None:
        if "norms" in self._sums:
            norms = [self._outputs(rows, routes[:, [slot]]).norm(dim=1) for slot in range(routes.shape[1])]
            self._sums["norms"] += self._spread(routes, gates * torch.stack(norms, dim=1)).sum(0)
        if "means" in self._sums:
            for expert, total in enumerate(self._sums["means"]):
                total += self._outputs(rows, routes.new_full((len(rows), 1), expert)).sum(0)

        if "losses" in self._sums:
            for part in zip(*(torch.split(one, TOKENS) for one in (rows, routes, gates)), strict=True):
                self._add_losses(*part)

    def _add_losses(self, rows: Tensor, routes: Tensor, gates: Tensor) -> None:
        outputs = [self._outputs(rows, routes[:, [slot]]) for slot in range(routes.shape[1])]
        added = torch.stack(outputs, dim=1) * gates[:, :, None]  # (tokens, k, d)
        pairs = routes[:, :, None] * self._mixture.count + routes[:, None, :]
        self._sums["losses"].view(-1).index_add_(0, pairs.flatten(), (added @ added.mT).flatten())

    def _outputs(self, rows: Tensor, routes: Tensor) -> Tensor:
        """(tokens, d) float64 of the experts in `routes`, (tokens, 1), with weight one."""
        ones = torch.ones(routes.shape, dtype=rows.dtype, device=rows.device)
        output: Tensor = self._experts.forward(rows, routes, ones)  # not through the hooks
        return output.double()

    def _spread(self, routes: Tensor, values: Tensor) -> Tensor:
        """(tokens, n) with the (tokens, k) values where the routes are, zero elsewhere."""
        return values.new_zeros(len(routes), self._mixture.count).scatter_(1, routes, values)

    def _real(self, tensor: Tensor) -> Tensor:
        return real_tokens(self._batch, self._block, tensor)


@contextmanager
def counting_visits(block: Block, module: nn.Module) -> Iterator[tuple[Watch, Tensor] | None]:
    """While open, count the tokens that visit each expert of a block; `None` where it has none.

    Yields:
        What must be told of every batch after the block has run on it, and the counts so far, (n,) int64.
    """
    mixture = mixture_of(block)
    if mixture is None:
        yield None
        return
    counts, seen = torch.zeros(mixture.count, dtype=torch.int64), list[Tensor]()

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(next(tensor for tensor in _tensors(args, kwargs)[1:] if not tensor.is_floating_point()))

    def watch(batch: Batch, given: Tensor, output: Tensor) -> None:
        routes = real_tokens(batch, block, seen.pop())
        counts.add_(torch.bincount(routes.flatten(), minlength=len(counts)).cpu())

    hook = module.get_submodule(mixture.module).register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield watch, counts
    finally:
        hook.remove()


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _gather(rows: Tensor, group: Group) -> Tensor:
    """The rows of all processes, those of the first process first."""
    lengths = torch.zeros(group.world, dtype=torch.int64)
    lengths[group.rank] = len(rows)
    group.all_reduce(lengths)
    start = int(lengths[: group.rank].sum())
    together = rows.new_zeros(int(lengths.sum()), rows.shape[1], dtype=torch.float32)
    together[start : start + len(rows)] = rows
    group.all_reduce(together)
    return together.to(rows.dtype)
