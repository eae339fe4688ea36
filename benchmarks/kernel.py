"""Packed weights against dense ones: one linear layer, decode batches and a prompt, several models' shapes.

    python benchmarks/kernel.py --out docs/evidence/kernel.md

All ways to compute one product are measured in turn: dense bfloat16 and float32, and every packed weight.
The limit is what fewer bytes alone could give: dense bytes over packed bytes. Where torch is slower than
memory, as with several rows on a CPU without bfloat16 units, more than the limit is reached. A prompt is
computed with the first matrix of each model only. The whole takes about ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tables import write_table
from torch import Tensor

from secateur.checkpoint.packing import Packed
from secateur.core.factored import Factored
from secateur.core.pattern import Pattern
from secateur.runtime.facts import kernel_of
from secateur.runtime.packed_linear import PackedLinear
from secateur.storage.armor import packed as factors

SHAPES = {
    "1B": ((2048, 2048), (5632, 2048), (2048, 5632)),
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "14B": ((5120, 5120), (13824, 5120), (5120, 13824)),
}
KINDS = ("0.5", "0.6", "0.7", "0.8", "2:4")
"""Shares of zeros anywhere, 2:4, and `armor`: 2:4 between blocks of 128."""
BLOCK = 128
ROWS = (1, 4, 8, 64)
PROMPT = 512
PROMPT_KINDS = ("0.5", "2:4")
FEWEST = 3
"""Counted rounds that no budget of time cuts off."""
HEADS = [
    "model", "outputs x inputs", "zeros", "rows", "dense bf16, us", "packed, us", "times dense bf16",
    "of the limit", "times dense fp32",
]  # fmt: skip


def sparse(rows: int, columns: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    if kind in ("2:4", "armor"):
        noise = torch.rand(rows, columns // 4, 4, generator=generator)
        zeros = (noise.argsort(-1) < 2).view(rows, columns)
    else:
        zeros = torch.rand(rows, columns, generator=generator) < float(kind)
    return weight.masked_fill_(zeros, 0).bfloat16()


def packed_layer(shape: tuple[int, int], kind: str) -> PackedLinear:
    weight = sparse(*shape, kind)
    if kind == "armor":
        blocks = [torch.eye(BLOCK).repeat(length // BLOCK, 1, 1) for length in shape]
        packed = factors(Factored(blocks[0], weight.float(), blocks[1]), weight.dtype, Pattern.parse("2:4"))
    else:
        packed = Packed.of(weight, "nm" if kind == "2:4" else "bitmask")
    return PackedLinear(packed, weight[:0])


def in_turn(works: Sequence[Callable[[], object]], repeats: int, seconds: float) -> list[float]:
    """Median seconds of each, in up to `repeats` rounds after one to warm up."""
    seen: list[list[float]] = [[] for _ in works]
    began = time.perf_counter()
    for counted in range(-1, repeats):
        if counted >= FEWEST and time.perf_counter() - began > seconds:
            break
        for own, work in zip(seen, works, strict=True):
            started = time.perf_counter()
            work()
            if counted >= 0:
                own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in seen]


class Rivals:
    """A dense weight and packed ones of its shape."""

    def __init__(self, model: str, shape: tuple[int, int], kinds: Sequence[str]) -> None:
        self.name = [model, f"{shape[0]} x {shape[1]}"]
        self.layers = {kind: packed_layer(shape, kind) for kind in kinds}
        self.dense = sparse(*shape, kinds[0])
        self.wide = self.dense.float()

    def rows(self, count: int, kinds: Sequence[str], repeats: int, seconds: float) -> list[list[str]]:
        """A row of the table for each kind, with so many rows of activations."""
        x = torch.randn(count, self.dense.shape[1]).bfloat16()
        x32, linear, kinds = x.float(), torch.nn.functional.linear, [k for k in kinds if k in self.layers]
        works = [lambda: linear(x, self.dense), lambda: linear(x32, self.wide)]
        works += [partial(self.layers[kind], x) for kind in kinds]
        dense, dense32, *times = in_turn(works, repeats, seconds)
        return [
            [
                *self.name, kind if kind in ("2:4", "armor") else f"{float(kind):.0%}", str(count),
                f"{dense * 1e6:,.0f}", f"{packed * 1e6:,.0f}", f"{dense / packed:.2f}",
                f"{dense / packed / self.limit(kind):.0%}", f"{dense32 / packed:.2f}",
            ]
            for kind, packed in zip(kinds, times, strict=True)
        ]  # fmt: skip

    def limit(self, kind: str) -> float:
        return float(self.dense.nbytes / self.layers[kind].packed_bytes)


def measured(model: str, arguments: argparse.Namespace) -> list[list[str]]:
    found = []
    for shape in SHAPES[model]:
        rivals = Rivals(model, shape, arguments.zeros)
        for count in arguments.rows:
            found += rivals.rows(count, arguments.zeros, arguments.repeats, arguments.seconds)
        if shape == SHAPES[model][0] and arguments.prompt:
            found += rivals.rows(arguments.prompt, PROMPT_KINDS, arguments.repeats, arguments.seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10, help="of a product, after which rounds end")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--zeros", nargs="+", choices=[*KINDS, "armor"], default=KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="rows of a prompt, 0 for none")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with torch.inference_mode():
        rows = [row for model in arguments.models for row in measured(model, arguments)]
        layer = packed_layer((8, 8), "0.5")
        layer(torch.ones(1, 8).bfloat16())
    notes = (
        f"Medians of {FEWEST} to {arguments.repeats} calls in turn, {torch.get_num_threads()} threads. "
        f"Packed: bfloat16 in and out, {kernel_of(layer)}. The limit: bytes of the dense weight over those "
        "of the packed one."
    )
    write_table("Packed weights against dense ones", HEADS, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
