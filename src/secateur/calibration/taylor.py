"""How much the loss would feel the loss of a unit, by Taylor expansion, in bounded memory.

LLM-Pruner (arXiv 2305.11627), sections 2.2 and 2.7 of its spec, with g_j the gradient of the mean next-token
cross-entropy of sequence j, g their mean and A the mean of g_j^2. Of every matrix that belongs to a unit:

    taylor_vector   sum of w g, with its sign
    taylor_first    sum of |w g|
    taylor_sample   mean over sequences of the sum of |w g_j|
    taylor_second   sum of |w A w|
    taylor_mixed    sum of |w g - w A w / 2|

Gradients are float32 and are reduced to one float64 number a unit while their block is open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from secateur.anatomy.members import Member
from secateur.calibration.backward import BUDGET_BYTES, Backward, IndexedWatch
from secateur.calibration.distributed import Group
from secateur.calibration.source import BlockSource
from secateur.calibration.windows import Windows
from secateur.checkpoint.safetensors_file import read_tensors, save_tensors
from secateur.checkpoint.safetensors_header import read_header
from secateur.core.errors import NumericsError
from secateur.core.progress import SILENT, Progress
from secateur.core.statistics import Statistic

__all__ = ["MemberTerms", "Taylor", "collect_taylor"]

BATCH_TOKENS = 1024
"""Tokens that are differentiated together where nobody asks for single sequences."""

OF_SEQUENCES: frozenset[Statistic] = frozenset({"taylor_sample", "taylor_second"})
"""Reduced for every sequence; the others need the gradient of all of them."""


@dataclass(frozen=True)
class MemberTerms:
    """Attributes:
    member: what of the block.
    terms: (entries of its space,) float64, by statistic.
    """

    member: Member
    terms: dict[Statistic, Tensor]


@dataclass(frozen=True)
class Taylor:
    """Attributes:
    blocks: for every block the members asked for.
    outer: those outside the blocks.
    loss: mean over the sequences, nats a token.
    """

    blocks: list[list[MemberTerms]]
    outer: list[MemberTerms]
    loss: float


class _Differentiated(Protocol):
    """Parameters with their gradients: those of a block, or those outside the blocks."""

    @property
    def parameters(self) -> dict[str, Tensor]: ...

    def each(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]: ...


def collect_taylor(
    source: BlockSource,
    windows: Windows,
    *,
    terms: Collection[Statistic],
    wanted: Sequence[Sequence[Member]],
    outer: Sequence[Member] = (),
    scratch: Path,
    budget_bytes: int = BUDGET_BYTES,
    progress: Progress = SILENT,
    group: Group | None = None,
    watch: IndexedWatch | None = None,
) -> Taylor:
    """Differentiate the model of `source` once and reduce the gradients to the terms.

    In memory are one block, its gradients and their sum (for `taylor_mixed` also that of their squares).
    Where the sequences do not fit into one chunk, the sums of all blocks lie in `scratch` meanwhile.

    Args:
        windows: of this process; with a `group`, its shard.
        terms: which of the `taylor_` statistics.
        wanted: of every block; the way back ends at the first block that has one.
        outer: outside the blocks, by full names; a tied parameter is one.
        budget_bytes: memory for activations.
        watch: sees what enters and leaves every block on the way forward.

    Raises:
        CalibrationError: windows that the model cannot take.
        NumericsError: a gradient that is not finite.
    """
    single = bool({"taylor_sample", "taylor_second", "taylor_mixed"} & set(terms))
    backward = Backward(
        source,
        windows,
        budget_bytes=budget_bytes,
        batch_size=1 if single else max(1, BATCH_TOKENS // windows.length),
        group=group,
    )
    blocks = source.anatomy.blocks
    lowest = next((index for index, own in enumerate(wanted) if own), len(blocks) - 1)
    lowest = 0 if outer else lowest
    run = _Collection([*wanted, outer], set(terms), sum(backward.shards), scratch, group)
    loss = torch.zeros(1, dtype=torch.float64)
    with progress.task("gradients", backward.chunks * (2 * len(blocks) - lowest)) as task:
        for number in range(backward.chunks):
            chunk, ends = backward.chunk(number), (number == 0, number == backward.chunks - 1)
            for opened in chunk.blocks(task, lowest=lowest, watch=watch, outer=bool(outer)):
                run.add(opened.block.index, opened, *ends)
            if outer:
                run.add(len(blocks), chunk.outer(), *ends)
            loss += chunk.loss
    if group is not None:
        group.all_reduce(loss)
    *found, outside = run.finished()
    return Taylor(found, outside, float(loss) / run.sequences)


class _Collection:
    """Terms of all blocks, and last of what stands outside, while they grow."""

    def __init__(
        self,
        found: Sequence[Sequence[Member]],
        terms: set[Statistic],
        sequences: int,
        scratch: Path,
        group: Group | None,
    ) -> None:
        self.terms, self.sequences, self.group, self.scratch = terms, sequences, group, scratch
        self.blocks = [[MemberTerms(member, _zeros(member, terms)) for member in own] for own in found]
        self.whole = terms - OF_SEQUENCES

    def add(self, index: int, opened: _Differentiated, first: bool, last: bool) -> None:
        """The next chunk of sequences of one block; what is no parameter (a buffer) feels nothing."""
        own = self.blocks[index]
        weights = {
            part.parameter: opened.parameters[part.parameter].detach()
            for one in own
            for part in one.member.parts
            if part.parameter in opened.parameters
        }
        sums = self._sums(index, weights, first)
        for gradients in opened.each(weights):
            for name, gradient in gradients.items():
                if f"{name}.squares" in sums:
                    sums[f"{name}.squares"].addcmul_(gradient, gradient)
                if name in sums:
                    sums[name].add_(gradient)
                if OF_SEQUENCES & self.terms:
                    self._add_sequence(own, name, gradient.mul_(weights[name]))
        if last:
            self._reduce(own, weights, sums)
        elif sums:
            save_tensors(self._path(index), sums)

    def finished(self) -> list[list[MemberTerms]]:
        """All terms, over all processes. Raises `NumericsError`."""
        for index, own in enumerate(self.blocks):
            for one in own:
                for term, values in one.terms.items():
                    if term in OF_SEQUENCES:
                        if self.group is not None:
                            self.group.all_reduce(values)
                        values /= self.sequences
                    if not bool(torch.isfinite(values).all()):
                        raise NumericsError(f"{index}.{one.member.module}: its gradients are not finite")
        return self.blocks

    def _sums(self, index: int, weights: dict[str, Tensor], first: bool) -> dict[str, Tensor]:
        """Of the gradients so far, by parameter, and of their squares where they are needed."""
        if not self.whole:
            return {}
        path = self._path(index)
        if not first:
            sums = read_tensors(path, read_header(path).values())
            path.unlink()
            return {name: tensor.to(weights[name.removesuffix(".squares")]) for name, tensor in sums.items()}
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        if "taylor_mixed" in self.terms:
            sums |= {f"{name}.squares": torch.zeros_like(weight) for name, weight in weights.items()}
        return sums

    def _add_sequence(self, own: list[MemberTerms], name: str, products: Tensor) -> None:
        """What one sequence says, from w g_j."""
        if "taylor_sample" in self.terms:
            _add(own, name, "taylor_sample", products.abs())
        if "taylor_second" in self.terms:
            _add(own, name, "taylor_second", products.square())

    def _reduce(self, own: list[MemberTerms], weights: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """What all sequences say together; `sums` are used up."""
        for tensor in sums.values():
            if self.group is not None:
                self.group.all_reduce(tensor)
            tensor.div_(self.sequences)
        for name in weights if sums else ():
            products = sums[name].mul_(weights[name])
            if "taylor_vector" in self.terms:
                _add(own, name, "taylor_vector", products)
            if "taylor_first" in self.terms:
                _add(own, name, "taylor_first", products.abs())
            if "taylor_mixed" in self.terms:
                curvature = sums[f"{name}.squares"].mul_(weights[name]).mul_(weights[name])
                _add(own, name, "taylor_mixed", products.sub_(curvature, alpha=0.5).abs_())

    def _path(self, index: int) -> Path:
        rank = 0 if self.group is None else self.group.rank
        return self.scratch / f"taylor-{rank}-{index:05d}.safetensors"


def _zeros(member: Member, terms: Collection[Statistic]) -> dict[Statistic, Tensor]:
    count = member.parts[0].count
    return {term: torch.zeros(count, dtype=torch.float64) for term in sorted(terms)}


def _add(own: list[MemberTerms], name: str, term: Statistic, values: Tensor) -> None:
    """Add numbers shaped like a parameter to the entries of every member it has a part in."""
    for one in own:
        for part in one.member.parts:
            if part.parameter == name:
                one.terms[term] += part.sums(values).cpu()
