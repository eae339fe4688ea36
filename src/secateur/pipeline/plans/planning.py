"""What a run will need and what its result will be good for, before a weight is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from secateur.anatomy.model import Anatomy, Block
from secateur.calibration.driver import BATCH_TOKENS
from secateur.checkpoint.packing import DENSE, FORMATS
from secateur.checkpoint.writer import DISK_FACTOR
from secateur.core.method import Method
from secateur.core.numerics import exact_products
from secateur.core.statistics import BACKWARD
from secateur.evaluation.memory import available_memory_bytes
from secateur.experts.base import ExpertMethod
from secateur.experts.precision import PrecisionMethod
from secateur.formats.loads_in import loads_in
from secateur.pipeline.data import window_length
from secateur.pipeline.opened import Opened, choose_device, choose_dtype, open_model
from secateur.pipeline.plans.packed_decode import packed_decode
from secateur.pipeline.plans.precision import precision_outcome
from secateur.pipeline.plans.sizes import FileSizes
from secateur.pipeline.plans.structure import structure_outcome
from secateur.pipeline.ways.pieces import evaluations
from secateur.pipeline.ways.table import checked_method, most_bytes, planned_sizes
from secateur.recipe import Recipe, parse
from secateur.report.effect import effect
from secateur.structure.base import PieceMethod, SearchMethod, StructureMethod
from secateur.weights.base import WeightMethod

__all__ = ["Estimate", "estimate", "plan"]

INTERPRETER_BYTES = 450_000_000
PROBE = 1024


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    peak_memory_bytes: resident memory of the run on the CPU side.
    seconds: wall clock of calibration, pruning and evaluation on this machine.
    disk_bytes: free space the output folder needs while the run goes on.
    """

    peak_memory_bytes: int
    seconds: float
    disk_bytes: int


def plan(model: str | Path, **settings: Any) -> dict[str, Any]:
    """Bytes, parameters, peak memory and time of a run, and whether its result will be faster.

    Args:
        model: local folder, hub id or `seedling`.
        settings: fields of `Recipe`, as for `secateur.prune`.

    Raises:
        InputError: whatever `prune` would refuse.

    >>> import secateur
    >>> secateur.plan("seedling", method="wanda", sparsity=0.5)["faster"]
    False
    """
    recipe: Recipe = parse(Recipe, {"model": str(model), **settings}, "the settings")
    recipe = recipe.validated()
    opened = open_model(recipe.model)
    method = checked_method(opened, recipe)
    expected = estimate(opened, recipe, method)
    return {
        "model": recipe.model,
        "method": recipe.method,
        "pattern": recipe.pattern,
        "allocation": getattr(method, "spread", recipe.allocation),
        "parameters_before": opened.checkpoint.parameters,
        "bytes_before": opened.checkpoint.nbytes,
        **_outcome(opened, recipe, method),
        "peak_memory_bytes": expected.peak_memory_bytes,
        "available_memory_bytes": available_memory_bytes(),
        "seconds": round(expected.seconds, 1),
        "disk_bytes": expected.disk_bytes,
    }


def _outcome(opened: Opened, recipe: Recipe, method: Method) -> dict[str, Any]:
    """What the result will be: of zeros in dense files, or of matrices that are smaller."""
    if isinstance(method, StructureMethod):
        return structure_outcome(opened, method, recipe)
    if isinstance(method, PrecisionMethod):
        return precision_outcome(opened, method)
    anatomy = opened.anatomy
    before, nbytes = opened.checkpoint.parameters, opened.checkpoint.dense_nbytes
    if isinstance(method, WeightMethod):
        return _zeros_outcome(opened, recipe, method)
    found = planned_sizes(opened, method, recipe)
    if found is None:
        freed = int(anatomy.block_parameters * recipe.resolved_sparsity)
        after = nbytes - round(nbytes * freed / before)
        found = FileSizes(recipe.resolved_sparsity, before - freed, after, exact=False)
    return {
        "sparsity": found.sparsity,
        "budget": recipe.budget,
        "parameters_prunable": anatomy.block_parameters,
        "zeros_after": 0,
        "parameters_after": found.parameters,
        "bytes_after": found.nbytes,
        "exact": found.exact,
        "faster": not isinstance(method, ExpertMethod),
        "effect": effect(
            recipe.pattern,
            found.sparsity,
            removes=method.removes,
            bytes_before=nbytes,
            bytes_after=found.nbytes,
        ),
        "loads_in": {
            "transformers": "yes: as it is where its class has such blocks, else after `import secateur` "
            "or with trust_remote_code=True",
            "vllm": "where all blocks come out alike, else padded: `secateur export --format dense`",
            "gguf": "by `secateur export`; blocks that differ in llama, mistral, qwen2 and phi3 only",
        },
    }


def _zeros_outcome(opened: Opened, recipe: Recipe, method: WeightMethod) -> dict[str, Any]:
    """Of matrices with zeros: smaller in a format that leaves them out, faster where a kernel does so too."""
    sparsity, prunable = recipe.resolved_sparsity, opened.anatomy.prunable_parameters
    stored = "armor" if method.stores_factors else recipe.format
    before, after = opened.checkpoint.nbytes, _stored_bytes(opened, recipe)
    facts = {
        "sparsity": sparsity,
        "parameters_prunable": prunable,
        "zeros_after": int(prunable * sparsity) if method.leaves_zeros else 0,
        "parameters_after": opened.checkpoint.parameters,
        "bytes_after": after,
        "exact": stored == DENSE,
        "loads_in": _loads_zeros(opened, stored),
    }
    said = partial(effect, recipe.pattern, sparsity, removes=method.removes, storage=stored)
    if stored in (DENSE, "armor"):
        return {**facts, "faster": False, "effect": said()}
    decode = packed_decode(opened, recipe)
    return {
        **facts,
        "faster": decode.faster,
        "decode_speedup": decode.speedup,
        "effect": f"{decode.words} {said(bytes_before=before, bytes_after=after)}",
    }


def _stored_bytes(opened: Opened, recipe: Recipe) -> int:
    """Of a result whose matrices have zeros, in the format asked for; dense where that is not known."""
    whole = opened.checkpoint.dense_nbytes
    if recipe.format == DENSE:
        return whole
    itemsize, sparsity, pattern = (
        opened.stored_dtype.itemsize,
        recipe.resolved_sparsity,
        recipe.parsed_pattern,
    )
    form, saved = FORMATS.get(recipe.format), 0
    for block in opened.anatomy.blocks:
        for matrix in block.matrices:
            packed = form.expected_bytes(matrix.shape, itemsize, sparsity, pattern)
            dense = matrix.shape[0] * matrix.shape[1] * itemsize
            saved += max(dense - packed, 0) if packed is not None else 0
    return whole - saved


def _loads_zeros(opened: Opened, format: str) -> dict[str, str]:
    checkpoint = opened.checkpoint
    if format != DENSE:
        return loads_in(checkpoint.config, checkpoint.tensors, formats=[format])
    return {
        "transformers": "yes: same class and configuration, dense files",
        "vllm": "yes, as the dense model (it runs no sparse weights)",
        "gguf": loads_in(checkpoint.config, checkpoint.tensors)["gguf"],
    }


def estimate(opened: Opened, recipe: Recipe, method: Method) -> Estimate:
    """Peak memory and time from the shapes, and from one short matrix product timed on this machine."""
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device, opened.stored_dtype)
    tokens = recipe.calibration.samples * window_length(opened, recipe.calibration.length)
    evaluation_tokens = tokens // max(recipe.calibration.samples, 1) * recipe.evaluation_windows
    length = tokens // max(recipe.calibration.samples, 1)
    batch_tokens = max(length, length * (recipe.calibration.batch_size or 0), BATCH_TOKENS[device.type])
    operations = _operations(opened.anatomy, method, tokens, evaluation_tokens)
    if isinstance(method, PieceMethod):  # a variant runs the blocks from its piece on: half of them
        tried = evaluations(opened, method, recipe.resolved_sparsity)
        operations += 1.0 * tried * tokens * opened.anatomy.prunable_parameters
    seconds = operations / _operations_per_second(device)
    return Estimate(
        _memory(opened, method, dtype.itemsize, tokens, 2 * evaluation_tokens, batch_tokens),
        seconds,
        int(DISK_FACTOR * most_bytes(opened, method, recipe))
        + _search_bytes(opened.anatomy, method, dtype.itemsize),
    )


def _memory(
    opened: Opened, method: Method, itemsize: int, tokens: int, kept_tokens: int, batch_tokens: int
) -> int:
    anatomy = opened.anatomy
    outer = (anatomy.parameters - anatomy.block_parameters) * itemsize
    largest = max(anatomy.blocks, key=lambda block: block.size)
    block = largest.size * (2 * itemsize)
    hidden = anatomy.spaces["hidden"]
    activations = (max(tokens, kept_tokens) if method.statistics else kept_tokens) * hidden * itemsize
    widest = max((max(m.shape) for m in largest.matrices), default=hidden)
    working = batch_tokens * widest * itemsize * 4
    return INTERPRETER_BYTES + outer + block + activations + max(working, _solver_bytes(largest, method))


def _solver_bytes(block: Block, method: Method) -> int:
    matrix = max((m.shape[0] * m.shape[1] for m in block.matrices), default=0)
    if "hessian" not in method.statistics:
        return matrix * 4 * 5
    widths = [_input_width(block, site) for site in block.sites]
    return sum(width * width for width in widths) * 8 + max(widths) ** 2 * 12 + matrix * 4 * 4


def _search_bytes(anatomy: Anatomy, method: Method, itemsize: int) -> int:
    """Matrices at all levels, none smaller than when it is whole."""
    if not isinstance(method, SearchMethod):
        return 0
    writers = (units.writer for block in anatomy.blocks for units in method.units(block))
    return method.levels * itemsize * sum(writer.size for writer in writers)


def _operations(anatomy: Anatomy, method: Method, tokens: int, evaluation_tokens: int) -> float:
    """Floating-point operations of the whole run."""
    forward = 2.0 * anatomy.prunable_parameters
    total = forward * 2 * evaluation_tokens
    if method.statistics:
        total += forward * 2 * tokens
    if method.statistics & BACKWARD:
        total += forward * 4 * tokens * getattr(method, "looks", 1)
    if isinstance(method, SearchMethod):
        total += forward * method.tokens_judged
    if "hessian" in method.statistics:
        for block in anatomy.blocks:
            for site in block.sites:
                width = _input_width(block, site)
                total += tokens * width * width * 2.0 + width**3
            total += sum(2.0 * m.shape[0] * m.shape[1] ** 2 for m in block.matrices)
    return total


def _input_width(block: Block, site: str) -> int:
    return next((m.shape[1] for m in block.matrices if m.input == site), 0)


def _operations_per_second(device: torch.device) -> float:
    """What a float32 product of two 1024 x 1024 matrices reaches here, halved for everything around it."""
    a = torch.ones(PROBE, PROBE, device=device)
    with exact_products():
        torch.mm(a, a)
        started = time.perf_counter()
        for _ in range(3):
            total = torch.mm(a, a)
        float(total[0, 0])
    return 3 * 2 * PROBE**3 / (time.perf_counter() - started) / 2
