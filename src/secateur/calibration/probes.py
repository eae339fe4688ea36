"""Hooks that see what arrives at the matrices of one block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.anatomy.model import Block, Matrix, Site
from secateur.calibration.activations import Batch
from secateur.calibration.distributed import Group
from secateur.calibration.observers import Moments
from secateur.core.errors import AnatomyError
from secateur.core.statistics import InputStatistics, Statistic

__all__ = ["BlockHooks", "Hook", "Probes", "SeenError", "real_tokens"]


class SeenError(Exception):
    """Every site was reached: the rest of the block need not run."""


def real_tokens(batch: Batch | None, block: Block, tensor: Tensor) -> Tensor:
    """The real tokens of (..., C) seen inside a block, as (tokens, C).

    Raises:
        AnatomyError: padding that cannot be told, because the module sees some of the tokens only.
    """
    flat = tensor.detach().flatten(0, -2)
    if batch is None or batch.rows is None:
        return flat
    if len(flat) != batch.tokens:
        raise AnatomyError(
            f"block {block.index} sees {len(flat)} of {batch.tokens} tokens at one of its matrices",
            "all tokens, to leave out padding",
            "give windows without padding",
        )
    return flat[batch.rows]


Watch = Callable[[list[Tensor]], None]
"""Told the tensors that a module is called with."""


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
H = TypeVar("H", bound="BlockHooks")


class BlockHooks:
    """Pre-hooks on submodules of a block, there while it is open as a context."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._open = module, ExitStack()

    def _hooks(self) -> Iterable[tuple[str, Hook]]:
        """Paths inside the block, and what sees the calls."""
        raise NotImplementedError

    def __enter__(self: H) -> H:
        for path, hook in self._hooks():
            handle = self._module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
            self._open.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


class Probes(BlockHooks):
    """Observes the sites of a block, or those named, while it is open as a context.

    Attributes:
        moments: by site name, one accumulator, or one for each expert.
    """

    def __init__(
        self,
        block: Block,
        module: nn.Module,
        needs: Collection[Statistic],
        device: torch.device,
        sites: Collection[str] | None = None,
    ) -> None:
        super().__init__(module)
        self.moments: dict[str, list[Moments]] = {}
        self._sites = [site for site in block.sites.values() if sites is None or site.name in sites]
        for site in self._sites:
            readers = block.readers(site.name)
            count = 1 if site.kind == "input" else 1 + max(matrix.expert or 0 for matrix in readers)
            columns = readers[0].shape[1]
            self.moments[site.name] = [Moments(columns, needs, device) for _ in range(count)]
        self._block = block
        self._paths = {site.module for site in self._sites}
        self._batch: Batch | None = None
        self._left: set[str] | None = None

    def _hooks(self) -> Iterable[tuple[str, Hook]]:
        return ((path, self._hook(path, self._watch(path))) for path in self._paths)

    def begin(self, batch: Batch, *, stop: bool) -> None:
        """The next forward is of this batch; with `stop` it ends in `SeenError` at the last site."""
        self._batch = batch
        self._left = set(self._paths) if stop else None

    def take(self, sequences: int, group: Group | None) -> dict[str, list[InputStatistics]]:
        """Statistics by site, summed over all processes: one entry, or one for each expert."""
        if group is not None:
            sequences = _reduce([m for several in self.moments.values() for m in several], sequences, group)
        return {name: [m.take(sequences) for m in several] for name, several in self.moments.items()}

    def real(self, tensor: Tensor) -> Tensor:
        """The real tokens of (..., C), as (tokens, C)."""
        return real_tokens(self._batch, self._block, tensor)

    def _watch(self, path: str) -> Watch:
        """What is to be done with the inputs of a submodule."""
        sites = [site for site in self._sites if site.module == path]
        if any(site.kind != "input" for site in sites):
            return _Experts(self, self._block, self._module, sites)
        moments = [self.moments[site.name][0] for site in sites]

        def watch(tensors: list[Tensor]) -> None:
            rows = self.real(tensors[0])
            for one in moments:
                one.add(rows, self._batch.lengths if self._batch else None)

        return watch

    def _hook(self, path: str, watch: Watch) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
            if self._left is not None:
                self._left.discard(path)
                if not self._left:
                    raise SeenError

        return hook


class _Experts:
    """Splits the tokens of a fused experts module by the expert they are routed to.

    How the module multiplies (all experts at once, one by one) depends on its version and its device; what it
    is called with does not. So the rows of every expert are gathered from that, and its hidden activations,
    where they are wanted, computed again.
    """

    def __init__(self, probes: Probes, block: Block, module: nn.Module, sites: list[Site]) -> None:
        names = {site.kind: site.name for site in sites}
        self._real = probes.real
        self._inputs = probes.moments[names["experts_input"]]
        self._hidden = probes.moments.get(names.get("experts_hidden", ""))
        self._first = block.readers(names["experts_input"])
        if len(self._first) != len(self._inputs):
            raise AnatomyError(
                f"{len(self._first)} matrices read the input of {len(self._inputs)} experts",
                "one for each, gate and up in one",
                "this model's experts cannot be observed",
            )
        self._module: Any = module.get_submodule(sites[0].module)
        self._parameters = module.state_dict()

    def __call__(self, tensors: list[Tensor]) -> None:
        """Add one call: hidden states (tokens, C) first, then in any order routes (tokens, k) and weights."""
        rows = self._real(tensors[0])
        routes = self._real(next(tensor for tensor in tensors[1:] if not tensor.is_floating_point()))
        experts, order = routes.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=len(self._inputs)).tolist()
        tokens = order // routes.shape[1]
        for matrix, part in zip(self._first, torch.split(tokens, counts), strict=False):
            if len(part):
                self._add(matrix, rows[part])

    def _add(self, first: Matrix, rows: Tensor) -> None:
        expert = first.expert or 0
        self._inputs[expert].add(rows)
        if self._hidden is not None:
            self._hidden[expert].add(self._activate(first, rows))

    def _activate(self, first: Matrix, rows: Tensor) -> Tensor:
        """What the second matrix of an expert multiplies, from the (tokens, C) inputs of its `first`."""
        biases = self._parameters.get(f"{first.parameter}_bias")
        bias = None if biases is None else biases[first.expert]
        product = functional.linear(rows, first.view(self._parameters), bias)
        gated = getattr(self._module, "has_gate", True)
        activated: Tensor = self._module._apply_gate(product) if gated else self._module.act_fn(product)
        return activated


def _reduce(moments: list[Moments], sequences: int, group: Group) -> int:
    """Sum everything over the processes; returns the sequences of all."""
    counts = torch.tensor([sequences, *(one.tokens for one in moments)])
    group.all_reduce(counts)
    for one, tokens in zip(moments, counts[1:].tolist(), strict=True):
        one.tokens = tokens
        for tensor in one.sums:
            group.all_reduce(tensor)
    return int(counts[0])
