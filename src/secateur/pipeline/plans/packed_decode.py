"""What packed weights will do to decoding on this machine: one matrix is timed, the rest is counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from secateur.anatomy.model import Matrix
from secateur.core.pattern import Pattern
from secateur.pipeline.fastest import UNPACKED
from secateur.pipeline.opened import Opened, choose_device, choose_dtype
from secateur.recipe import Recipe
from secateur.runtime.compiled import STORED
from secateur.runtime.facts import kernel_words, no_kernel
from secateur.runtime.packed_linear import PackedLinear
from secateur.storage.formats import Packed

__all__ = ["PackedDecode", "packed_decode", "probe", "whole_model"]

LEAST = 1.1
"""Times as fast from which on a model is called faster: less is within what measurements vary."""
EXPERTS = "Decoding is not estimated: most weights are routed experts, of which a token reads few."
STREAM_BYTES = 1 << 28
"""Weights that a timed pass goes through, as decoding does: more than caches hold."""
PROBE_ELEMENTS = 1 << 24
REPEATS = 5


@dataclass(frozen=True)
class PackedDecode:
    """Attributes:
    words: a sentence.
    speedup: decoding against the dense model, at batch 1; None where no kernel computes from the result.
    """

    words: str
    speedup: float | None = None

    @property
    def faster(self) -> bool:
        return self.speedup is not None and self.speedup >= LEAST


def packed_decode(opened: Opened, recipe: Recipe) -> PackedDecode:
    """Of a result of `recipe`, whose format is one of packed weights: seconds, and no weight is read."""
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device, opened.stored_dtype)
    matrices = [matrix for block in opened.anatomy.blocks for matrix in block.matrices]
    known = [matrix for matrix in matrices if _known(matrix, recipe, opened.stored_dtype, dtype)]
    taken = [matrix for matrix in known if _stays_packed(matrix, recipe)]
    half = sum(matrix.size for matrix in matrices) / 2
    reason = no_kernel(device, taken=_size(known) > half)
    if reason is None and _size([matrix for matrix in matrices if matrix.expert is not None]) > half:
        return PackedDecode(EXPERTS)
    if reason is None and _size(taken) <= half:
        reason = UNPACKED
    if reason is not None:
        return PackedDecode(f"No kernel computes from the result: {reason}.")
    largest = max(taken, key=lambda matrix: matrix.size)
    nbytes = _size(taken) * opened.stored_dtype.itemsize
    gain = probe(largest.shape, opened.stored_dtype, dtype, recipe, nbytes)
    speedup = round(whole_model(gain, _size(taken), _read(opened) - _size(taken)), 3)
    return PackedDecode(
        f"Kept packed ({kernel_words()}), decoding at batch 1 is estimated at {speedup:.2f} times the speed "
        f"of the dense model in {str(dtype).removeprefix('torch.')}: products with its largest matrix, timed "
        f"here, are {gain:.2f} times as fast, and what is not packed takes as long as before.",
        speedup,
    )


def whole_model(gain: float, packed: int, dense: int) -> float:
    """Times as fast: time goes with the weights that a token reads, and those packed take 1 / gain of it.

    >>> whole_model(2.0, packed=300, dense=100)
    1.6
    """
    return (packed + dense) / (packed / gain + dense)


def probe(
    shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype, recipe: Recipe, nbytes: int
) -> float:
    """Times as fast as a dense `linear`: one row times matrices of this shape, packed as the recipe says.

    Args:
        shape: (outputs, inputs); of a large matrix some rows are timed, which take their share of its time.
        stored: dtype of the files.
        dtype: of activations and dense weights.
        nbytes: of all such weights in the model, dense; as many are gone through, up to `STREAM_BYTES`.
    """
    rows, columns = min(shape[0], max(PROBE_ELEMENTS // shape[1], 1)), shape[1]
    weight = _sparse((rows, columns), recipe.parsed_pattern, recipe.resolved_sparsity).to(stored)
    copies = max(min(nbytes, STREAM_BYTES) // weight.nbytes, 1)
    packed = Packed.of(weight, recipe.format)
    layers = [PackedLinear(_copy(packed), torch.empty(0, dtype=dtype)) for _ in range(copies)]
    dense = [weight.to(dtype, copy=True) for _ in range(copies)]
    x = torch.ones(1, columns, dtype=dtype)
    before, after = _in_turn(
        lambda: [nn.functional.linear(x, one) for one in dense], lambda: [one(x) for one in layers]
    )
    return before / after


def _known(matrix: Matrix, recipe: Recipe, stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such weights."""
    pattern, two_of_four = recipe.parsed_pattern, Pattern("n:m", 2, 4)
    fits = recipe.format == "bitmask" or (pattern == two_of_four and matrix.shape[1] % 8 == 0)
    return fits and stored in STORED and dtype in (torch.float32, stored)


def _stays_packed(matrix: Matrix, recipe: Recipe) -> bool:
    return matrix.expert is None and not (matrix.transposed and recipe.format == "bitmask")


def _size(matrices: Sequence[Matrix]) -> int:
    return sum(matrix.size for matrix in matrices)


def _read(opened: Opened) -> int:
    """Weights that a token reads: those of the blocks and of the head, which is as large as the embedding."""
    anatomy = opened.anatomy
    return anatomy.block_parameters + prod(anatomy.outer[f"{anatomy.embedding}.weight"])


def _sparse(shape: tuple[int, int], pattern: Pattern, sparsity: float) -> Tensor:
    if pattern.kind == "n:m":  # which of the places are kept takes no time
        weight = torch.ones(shape)
        weight.view(shape[0], -1, pattern.of)[..., pattern.keep :] = 0
        return weight
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) >= sparsity).float()


def _copy(packed: Packed) -> Packed:
    return replace(packed, parts={name: part.clone() for name, part in packed.parts.items()})


@torch.inference_mode()
def _in_turn(*works: Callable[[], object]) -> list[float]:
    """Median seconds of each, after one run that does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    for repeat in range(REPEATS + 1):
        for seen, work in zip(seconds, works, strict=True):
            started = time.perf_counter()
            work()
            if repeat:
                seen.append(time.perf_counter() - started)
    return [statistics.median(seen) for seen in seconds]
