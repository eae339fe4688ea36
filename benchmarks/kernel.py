"""Packed weights against dense ones: one linear layer, decode batches, several models' shapes.

    python benchmarks/kernel.py --repeats 15 --out docs/evidence/kernel.md

Every cell is measured in turn with the dense bfloat16 and float32 `linear` of the same weights. The limit is
what fewer bytes alone could give: dense bytes over packed bytes. Where torch is slower than memory, as with
several rows on a CPU without bfloat16 units, more than the limit is reached.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tables import write_table
from torch import Tensor

from secateur.checkpoint.packing import Packed
from secateur.storage.kernels import kernel_of
from secateur.storage.packed_linear import PackedLinear

SHAPES = {
    "1B": ((2048, 2048), (5632, 2048), (2048, 5632)),
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
}
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
ROWS = (1, 4, 8)
HEADS = [
    "model", "outputs x inputs", "zeros", "rows", "dense bf16, us", "packed, us", "times dense bf16",
    "of the limit", "times dense fp32",
]  # fmt: skip


def sparse(rows: int, columns: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "2:4":
        noise = torch.rand(rows, columns // 4, 4, generator=generator)
        zeros = (noise.argsort(-1) < 2).view(rows, columns)
    else:
        zeros = torch.rand(rows, columns, generator=generator) < float(kind)
    return weight.masked_fill_(zeros, 0).bfloat16()


def in_turn(works: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 2):
        for seen, work in zip(seconds, works, strict=True):
            started = time.perf_counter()
            work()
            if repeat > 1:
                seen.append(time.perf_counter() - started)
    return [statistics.median(seen) for seen in seconds]


def measured(
    model: str, shape: tuple[int, int], kind: str, rows: tuple[int, ...], repeats: int
) -> list[list[str]]:
    weight = sparse(*shape, kind)
    layer = PackedLinear(Packed.of(weight, "nm" if kind == "2:4" else "bitmask"), weight[:0])
    limit = weight.nbytes / layer.packed_bytes
    wide = weight.float()
    found = []
    for count in rows:
        x = torch.randn(count, shape[1]).bfloat16()
        x32 = x.float()
        works = [
            lambda x=x: torch.nn.functional.linear(x, weight),
            lambda x=x: layer(x),
            lambda x=x32: torch.nn.functional.linear(x, wide),
        ]
        dense, packed, dense32 = in_turn(works, repeats)
        found.append([
            model, f"{shape[0]} x {shape[1]}", kind if kind == "2:4" else f"{float(kind):.0%}", str(count),
            f"{dense * 1e6:,.0f}", f"{packed * 1e6:,.0f}", f"{dense / packed:.2f}",
            f"{dense / packed / limit:.0%}", f"{dense32 / packed:.2f}",
        ])  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--zeros", nargs="+", default=[*map(str, SPARSITIES), "2:4"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    layer = PackedLinear(Packed.of(torch.eye(8).bfloat16(), "bitmask"), torch.empty(0, dtype=torch.bfloat16))
    with torch.inference_mode():
        rows = [
            row
            for model in arguments.models
            for shape in SHAPES[model]
            for kind in arguments.zeros
            for row in measured(model, shape, kind, tuple(arguments.rows), arguments.repeats)
        ]
    notes = (
        f"Medians of {arguments.repeats} calls in turn, {torch.get_num_threads()} threads. Packed: bfloat16 "
        f"in and out, {kernel_of(layer)}. The limit: bytes of the dense weight over those of the packed one."
    )
    write_table("Packed weights against dense ones", HEADS, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
