"""Fewer bits: see what rounding does to each expert, choose, then round and write block by block."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.layout import Piece
from secateur.anatomy.mixture import Mixture, mixture_of
from secateur.anatomy.model import Matrix
from secateur.calibration.driver import OpenBlock
from secateur.calibration.visits import expert_errors, routing_error, visits
from secateur.checkpoint.packing import Packed
from secateur.checkpoint.safetensors_file import torch_dtype
from secateur.core.errors import AnatomyError, NumericsError, RecipeError
from secateur.core.statistics import InputStatistics, RoutingStatistics
from secateur.experts.online import FILE_NAME as ONLINE
from secateur.experts.online import MedianRatio, OnlineBlock, OnlinePlan, Renormalise, reroute
from secateur.experts.precision import PrecisionMethod, Rounding
from secateur.pipeline.matrices import LOSS_ROWS, statistics_of
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.ways.unvisited import unvisited
from secateur.quantise.experts import rounded_stack
from secateur.quantise.gptq import Quantised, gptq, round_to_nearest
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer, Precision
from secateur.storage.low_bit import packed, packed_stack
from secateur.weights.losses import reconstruction_loss

__all__ = ["BITS", "check_quantised", "prune_quantised", "quantised_observes"]

BITS = "bits.json"
ROUNDING = "rounding.safetensors"
UNVISITED = "no calibration token reached it: rounded to the nearest"


def check_quantised(opened: Opened, method: PrecisionMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read, what could not be stored or allotted.

    Raises:
        RecipeError: a model without experts, or bits out of reach.
        AnatomyError: matrices that are stored otherwise than as whole rows, or stacked.
    """
    rooms = _rooms(opened)
    if not rooms and not method.other_bits:
        raise RecipeError(
            f"method {method.id!r} with {opened.name}, which has no routed experts",
            "a mixture of experts",
            "use --method uniform-bits",
        )
    method.allot(rooms)
    for block in opened.anatomy.blocks:
        for matrix in block.matrices:
            if method.dense_bits or matrix.expert is not None or not rooms:
                _pieces(opened, block.index, matrix)


def quantised_observes(method: PrecisionMethod, recipe: Recipe) -> bool:
    """Whether the allotment or the rounding looks at calibration text."""
    return bool(method.statistics)


def prune_quantised(run: Run, method: PrecisionMethod) -> Outcome:
    """Observe the dense model, allot bits, round in a second pass."""
    found = run.remembered(lambda: _observe(run, method), ROUNDING) if method.levels else {}
    rooms = [_with_observed(room, found) for room in _rooms(run.opened)]
    bits = {room.block: own for room, own in zip(rooms, method.allot(rooms), strict=True)}
    layers, rows = _Rounder(run, method, bits).round()
    files: dict[str, str | bytes] = {BITS: _bits_file(method, bits)}
    if found:
        files[ONLINE] = _online(found).dumps()
    return Outcome(
        layers=layers,
        blocks=rows,
        sparsity=0.0,
        requested=0.0,
        files=files,
        warnings=_warnings(rooms),
        precision=_precision(run.opened, layers, bits),
    )


def _rooms(opened: Opened) -> list[Rounding]:
    mixtures = ((block.index, mixture_of(block)) for block in opened.anatomy.blocks)
    return [Rounding(index, mixture.count) for index, mixture in mixtures if mixture is not None]


def _with_observed(room: Rounding, found: Mapping[str, Tensor]) -> Rounding:
    if not found:
        return room
    counts, probabilities, errors = (
        found[f"{room.block}.{name}"] for name in ("visits", "weights", "errors")
    )
    return Rounding(room.block, room.count, counts, probabilities, errors)


def _observe(run: Run, method: PrecisionMethod) -> dict[str, Tensor]:
    """Of the dense model, by block: visits, router weights, errors at each level; and what tells when a token
    can do without its lesser experts."""
    found: dict[str, Tensor] = {}
    with run.progress.task(f"observing for {method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in run.driver().blocks(outputs=False):
            mixture = mixture_of(opened.block)
            routing = opened.observe_routing({"routing"}) if mixture else None
            if mixture and routing:
                own = _observe_experts(run, method, opened, mixture, routing)
                found |= {f"{opened.index}.{name}": tensor for name, tensor in own.items()}
            opened.finish()
            task.advance()
    return found


def _observe_experts(
    run: Run, method: PrecisionMethod, opened: OpenBlock, mixture: Mixture, routing: RoutingStatistics
) -> dict[str, Tensor]:
    experts = opened.module.get_submodule(mixture.module)
    seen = list(visits(opened, mixture.module))
    others = [_all_rounded(opened, mixture, bits, method.group_size) for bits in method.levels]
    errors = expert_errors(experts, others, seen)
    medians = _medians(routing.ratios)
    rule, strategy = Renormalise.of(run.opened.config), MedianRatio({0: float(medians[0])})

    def without(routes: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        routes_kept, kept = reroute(routes, gates, strategy.drop(0, gates), mixture.count, rule)
        return routes_kept.where(routes_kept < mixture.count, routes), kept  # with weight zero

    moved = routing_error(experts, without, seen)
    if run.group:
        run.group.all_reduce(errors)
        run.group.all_reduce(moved)
    return {
        "visits": routing.counts.cpu(),
        "weights": routing.probabilities.cpu(),
        "errors": errors.cpu(),
        "medians": medians,
        "online": moved.cpu(),
    }


def _medians(ratios: Tensor) -> Tensor:
    """(k - 1,) float64; one number that no ratio is below where a token has one expert."""
    wide = ratios.double()
    return wide.median(0).values if wide.shape[1] else torch.zeros(1, dtype=torch.float64)


def _all_rounded(
    opened: OpenBlock, mixture: Mixture, bits: int, group: int
) -> Callable[[], dict[str, Tensor]]:
    """Makes the parameters of all experts plainly rounded, by their names in the experts' module."""

    def make() -> dict[str, Tensor]:
        stacks = rounded_stack(mixture.weights(opened.parameters), bits, group)
        laid = {
            m.parameter: stacks[m.parameter].mT if m.transposed else stacks[m.parameter]
            for m in mixture.stacks
        }
        return {name.removeprefix(f"{mixture.module}."): stack for name, stack in laid.items()}

    return make


def _stack(opened: Opened, index: int, matrix: Matrix) -> Piece | None:
    """The tensor that holds a matrix with those of other experts, or transposed; None where rows are its
    own."""
    pieces = opened.layout.pieces(index, matrix.parameter)
    alone = matrix.expert is None and not matrix.transposed
    return pieces[0] if len(pieces) == 1 and pieces[0].expert is None and not alone else None


def _pieces(opened: Opened, index: int, matrix: Matrix) -> list[Piece]:
    """What a matrix is stored as: tensors of whole rows.

    Raises:
        AnatomyError: matrices that are stored in another way, but those of a `_stack`.
    """
    stack = _stack(opened, index, matrix)
    if stack is not None and stack.shape[-2:] == (matrix.shape[::-1] if matrix.transposed else matrix.shape):
        return [stack]
    pieces = opened.layout.pieces_of(index, matrix)
    rows = sum(piece.shape[0] for piece in pieces if piece.shape[1:] == matrix.shape[1:])
    if matrix.transposed or rows != matrix.shape[0] or len({len(piece.shape) for piece in pieces}) != 1:
        raise AnatomyError(
            f"{index}.{matrix.name} is not stored as rows of its own",
            "matrices stored one by one as (outputs, inputs), or stacked in one tensor",
            f"{opened.anatomy.family} cannot be stored in few bits",
        )
    return pieces


class _Rounder:
    """Rounds all blocks; those of an interrupted run are done."""

    def __init__(self, run: Run, method: PrecisionMethod, bits: Mapping[int, list[int]]) -> None:
        self.run, self.method, self.bits = run, method, bits

    def round(self) -> tuple[list[Layer], list[Block]]:
        run, done = self.run, self.run.finished()
        records = []
        driver = run.driver(read=run.written(set(done)))
        forward = bool(self.method.statistics)
        with run.progress.task(f"rounding with {self.method.id}", len(run.opened.anatomy.blocks)) as task:
            for opened in driver.blocks(forward=forward, outputs=False):
                record = done.get(opened.index)
                if record is not None:
                    opened.finish()
                else:
                    record = self._block(opened)
                records.append(record)
                task.advance()
        layers = [Layer.model_validate(row) for record in records for row in record["layers"]]
        return layers, [Block.model_validate(record["block"]) for record in records]

    def _block(self, opened: OpenBlock) -> dict[str, Any]:
        started = time.perf_counter()
        needs = self.method.statistics - self.method.needs
        observed = opened.observe(needs) if needs else {}
        small: dict[str, list[Packed]] = {}
        rows = []
        for matrix in opened.block.matrices:
            if bits := self._bits_of(opened.index, matrix):
                row, own = self._matrix(opened, matrix, bits, statistics_of(matrix, observed))
                rows.append(row.model_dump(mode="json"))
                for name, one in own.items():
                    small.setdefault(name, []).append(one)
        observed.clear()
        stored, _ = self.run.as_stored(opened)
        loss = opened.finish()
        block = Block(block=opened.index, loss=loss, seconds=round(time.perf_counter() - started, 4))
        record = {"layers": rows, "block": block.model_dump(mode="json")}
        tensors: dict[str, Tensor | Packed] = dict(stored)
        self.run.keep(opened.index, tensors | self._joined(opened, small), record)
        return record

    def _joined(self, opened: OpenBlock, small: Mapping[str, list[Packed]]) -> dict[str, Packed]:
        """By name on disk; matrices that share a tensor become one."""
        found = {name: own[0] for name, own in small.items()}
        for matrix in opened.block.matrices:
            stack = _stack(self.run.opened, opened.index, matrix)
            if stack is not None and matrix.expert in (0, None) and stack.name in small:
                own = small[stack.name]
                found[stack.name] = packed_stack(own, stack.shape, transposed=matrix.transposed)
        return found

    def _bits_of(self, index: int, matrix: Matrix) -> int:
        if matrix.expert is not None:
            return self.bits[index][matrix.expert]
        return self.method.dense_bits if self.bits else self.method.other_bits

    def _matrix(
        self, opened: OpenBlock, matrix: Matrix, bits: int, inputs: InputStatistics
    ) -> tuple[Layer, dict[str, Packed]]:
        """Round one matrix in place, to what its files will mean."""
        started = time.perf_counter()
        view = matrix.view(opened.parameters)
        weight = view.detach().float().contiguous()
        name = f"{opened.index}.{matrix.name}"
        quantised, fallbacks = _rounded(self.method, name, weight, bits, inputs)
        loss = reconstruction_loss(weight, quantised.weight, inputs, rows=LOSS_ROWS)
        small = {}
        for piece in _pieces(self.run.opened, opened.index, matrix):
            rows = slice(*(piece.rows or (0, matrix.shape[0])))
            dtype = torch_dtype(self.run.opened.checkpoint.tensors[piece.name].dtype)
            small[piece.name] = packed(quantised.rows(rows.start, rows.stop), dtype)
            with torch.no_grad():
                view[rows].copy_(small[piece.name].unpack())
        stored_bits = 8 * sum(one.nbytes for one in small.values()) / matrix.size
        notes = {"bits": float(bits), "stored_bits": stored_bits}
        if matrix.expert is not None and inputs.tokens:
            notes["tokens"] = float(inputs.tokens)
        if quantised.damping is not None and quantised.damping > self.method.damping:
            notes["damping"] = quantised.damping
        row = Layer(
            block=opened.index,
            matrix=matrix.name,
            rows=matrix.shape[0],
            columns=matrix.shape[1],
            sparsity_requested=0.0,
            sparsity=0.0,
            loss=loss,
            seconds=time.perf_counter() - started,
            notes=notes,
            fallbacks=fallbacks,
        )
        return row, small


def _rounded(
    method: PrecisionMethod, name: str, weight: Tensor, bits: int, inputs: InputStatistics
) -> tuple[Quantised, list[str]]:
    """A rounded matrix, to the nearest where nothing was seen of its inputs (mc-moe, section 5.9)."""
    group, steps = method.group_size, method.grid_steps
    try:
        if method.rounding == "nearest":
            return round_to_nearest(weight, bits, group=group, steps=steps), []
        if inputs.never_reached:
            return round_to_nearest(weight, bits, group=group, steps=steps), [UNVISITED]
        return gptq(weight, inputs, bits, group=group, steps=steps, damping=method.damping), []
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error


def _precision(opened: Opened, layers: list[Layer], bits: Mapping[int, list[int]]) -> Precision:
    """Averages over weights, with and without scales."""
    routed = {(b.index, m.name) for b in opened.anatomy.blocks for m in b.matrices if m.expert is not None}
    experts = [row for row in layers if (row.block, row.matrix) in routed]
    return Precision(
        bits_experts=_mean(experts, "bits"),
        bits_matrices=_mean(layers, "bits"),
        stored_bits_experts=_mean(experts, "stored_bits"),
        stored_bits_matrices=_mean(layers, "stored_bits"),
        weights=sum(row.rows * row.columns for row in layers),
        experts={str(block): own for block, own in bits.items()},
    )


def _mean(rows: list[Layer], note: str) -> float | None:
    weights = sum(row.rows * row.columns for row in rows)
    return sum(row.notes[note] * row.rows * row.columns for row in rows) / weights if rows else None


def _bits_file(method: PrecisionMethod, bits: Mapping[int, list[int]]) -> str:
    content = {"version": 1, "method": method.id, "dense_bits": method.dense_bits, "experts": bits}
    return json.dumps(content, indent=2) + "\n"


def _online(found: Mapping[str, Tensor]) -> OnlinePlan:
    blocks = []
    for name in found:
        index, _, what = name.partition(".")
        if what == "medians":
            error, scale = found[f"{index}.online"].tolist()
            loss = error / scale if scale else 0.0
            medians = tuple(found[name].tolist())
            blocks.append(OnlineBlock(block=int(index), medians=medians, loss=loss))
    return OnlinePlan(blocks=tuple(sorted(blocks, key=lambda one: one.block)))


def _warnings(rooms: list[Rounding]) -> list[str]:
    seen = {room.block: room.visits for room in rooms if room.visits is not None}
    so = "no bits cost anything, so the lowest that the floors leave, rounded to the nearest."
    return unvisited(seen, so)
