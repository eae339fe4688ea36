"""Hooks that see what arrives at the matrices of one block."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.anatomy.model import Block, Matrix, Site
from secateur.calibration.activations import Batch
from secateur.calibration.distributed import Group
from secateur.calibration.observers import Moments
from secateur.core.errors import AnatomyError
from secateur.core.statistics import InputStatistics, Statistic

__all__ = ["Probes", "SeenError"]


class SeenError(Exception):
    """Every site was reached: the rest of the block need not run."""


class Probes:
    """Observes every site of a block while it is open as a context.

    Attributes:
        moments: by site name, one accumulator, or one for each expert.
    """

    def __init__(
        self, block: Block, module: nn.Module, needs: Collection[Statistic], device: torch.device
    ) -> None:
        self.moments: dict[str, list[Moments]] = {}
        self._sites_of: dict[str, list[Site]] = {}
        for site in block.sites.values():
            readers = block.readers(site.name)
            count = 1 if site.kind == "input" else 1 + max(matrix.expert or 0 for matrix in readers)
            columns = readers[0].shape[1]
            self.moments[site.name] = [Moments(columns, needs, device) for _ in range(count)]
            self._sites_of.setdefault(site.module, []).append(site)
        self._block, self._module = block, module
        self._batch: Batch | None = None
        self._left: set[str] | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> Probes:
        parameters = self._module.state_dict()
        for path, sites in self._sites_of.items():
            inner = self._module.get_submodule(path)
            if any(site.kind == "input" for site in sites):
                watch: Callable[..., None] = self._watch_input
            else:
                watch = _Experts(self._block, inner, sites, parameters, self.moments).watch
            handle = inner.register_forward_pre_hook(self._hook(path, sites, watch), with_kwargs=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def begin(self, batch: Batch, *, stop: bool) -> None:
        """The next forward is of this batch; with `stop` it ends in `SeenError` at the last site."""
        self._batch = batch
        self._left = set(self._sites_of) if stop else None

    def take(self, sequences: int, group: Group | None) -> dict[str, list[InputStatistics]]:
        """Statistics by site, summed over all processes: one entry, or one for each expert."""
        if group is not None:
            sequences = _reduce([m for several in self.moments.values() for m in several], sequences, group)
        return {name: [m.take(sequences) for m in several] for name, several in self.moments.items()}

    def _hook(self, path: str, sites: list[Site], watch: Callable[..., None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch(sites, [*args, *kwargs.values()], self)
            if self._left is not None:
                self._left.discard(path)
                if not self._left:
                    raise SeenError

        return hook

    def _watch_input(self, sites: list[Site], values: list[Any], probes: Probes) -> None:
        rows = self.real(next(value for value in values if isinstance(value, Tensor)))
        for site in sites:
            self.moments[site.name][0].add(rows)

    def real(self, tensor: Tensor) -> Tensor:
        """The real tokens of (..., C), as (tokens, C)."""
        flat = tensor.detach().flatten(0, -2)
        batch = self._batch
        if batch is None or batch.rows is None:
            return flat
        if len(flat) != batch.tokens:
            raise AnatomyError(
                f"block {self._block.index} sees {len(flat)} of {batch.tokens} tokens at one of its matrices",
                "all tokens, to leave out padding",
                "give windows without padding",
            )
        return flat[batch.rows]


class _Experts:
    """Splits the tokens of a fused experts module by the expert they are routed to.

    The module multiplies all experts at once in a way that depends on its version and device; its inputs do
    not. What each expert reads is gathered from them, and its hidden activations are computed again.
    """

    def __init__(
        self,
        block: Block,
        module: nn.Module,
        sites: list[Site],
        parameters: dict[str, Tensor],
        moments: dict[str, list[Moments]],
    ) -> None:
        self._module, self._parameters = module, parameters
        kinds = {site.kind: site for site in sites}
        self._inputs = moments[kinds["experts_input"].name]
        self._first = {matrix.expert: matrix for matrix in block.readers(kinds["experts_input"].name)}
        self._hidden = moments[kinds["experts_hidden"].name] if "experts_hidden" in kinds else None

    def watch(self, sites: list[Site], values: list[Any], probes: Probes) -> None:
        tensors = [value for value in values if isinstance(value, Tensor)]
        hidden = probes.real(tensors[0])
        chosen = next(tensor for tensor in tensors[1:] if not tensor.is_floating_point())
        routes = probes.real(chosen.unsqueeze(-1) if chosen.ndim == 1 else chosen)
        experts, order = routes.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=len(self._inputs)).tolist()
        tokens = order // routes.shape[1]
        for expert, part in enumerate(torch.split(tokens, counts)[: len(self._inputs)]):
            if len(part):
                self._add(expert, hidden[part])

    def _add(self, expert: int, rows: Tensor) -> None:
        self._inputs[expert].add(rows)
        if self._hidden is not None:
            self._hidden[expert].add(self._activate(self._first[expert], rows))

    def _activate(self, first: Matrix, rows: Tensor) -> Tensor:
        """What expert multiplies by its second matrix, from its (tokens, C) inputs."""
        bias = self._parameters.get(f"{first.parameter}_bias")
        product = functional.linear(
            rows, first.view(self._parameters), None if bias is None else bias[first.expert]
        )
        if getattr(self._module, "has_gate", True):
            return self._module._apply_gate(product)  # type: ignore[operator, no-any-return]
        return self._module.act_fn(product)  # type: ignore[operator, no-any-return]


def _reduce(moments: list[Moments], sequences: int, group: Group) -> int:
    """Sum everything over the processes; returns the sequences of all."""
    counts = torch.tensor([sequences, *(one.tokens for one in moments)])
    group.all_reduce(counts)
    for one, tokens in zip(moments, counts[1:].tolist(), strict=True):
        one.tokens = tokens
        for tensor in one.sums:
            group.all_reduce(tensor)
    return int(counts[0])
