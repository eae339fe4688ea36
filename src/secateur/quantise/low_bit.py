"""How a matrix of a few bits is stored: named parts, from which alone it can be read.

Parts of a (rows, columns) matrix:

    layout  int32 (2,)              bits of a code, and the columns of a group
    codes   uint8 (rows, bytes)     a little-endian stream of bits for each row, up to a whole byte
    scale   float16 (rows, groups)  the last group of a row is what is left of it
    low     float16 (rows, groups)  what code 0 means; left out with one bit, where it is minus half the scale
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.quantise.codes import pack_codes, row_bytes, unpack_codes
from secateur.quantise.gptq import Quantised
from secateur.quantise.grid import METADATA, Grid

__all__ = ["PARTS", "low_of", "parts_of", "quantised_of", "weight_of", "wrong_with"]

PARTS = ("layout", "codes", "scale")
"""That every matrix has."""
PIECE = 1 << 17
"""Weights that are unpacked at a time."""
MOST_BITS = 8


def parts_of(quantised: Quantised) -> dict[str, Tensor]:
    """What is stored; `quantised_of` gives it back to the bit."""
    grid = quantised.grid
    parts = {
        "layout": torch.tensor([grid.bits, grid.group], dtype=torch.int32),
        "codes": pack_codes(quantised.codes, grid.bits),
        "scale": grid.scale.to(METADATA),
    }
    return parts if grid.bits == 1 else {**parts, "low": grid.low.to(METADATA)}


def quantised_of(parts: Mapping[str, Tensor], columns: int) -> Quantised:
    """What was stored of a matrix with so many columns, on the device of the parts."""
    bits, group = (int(number) for number in parts["layout"])
    grid = Grid(bits, group, parts["scale"].float(), low_of(parts))
    return Quantised(grid, unpack_codes(parts["codes"], bits, columns))


def weight_of(parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, columns) that was stored; on the CPU some rows at a time, so that what is needed besides stays
    in the cache."""
    rows = len(parts["codes"])
    if not parts["codes"].is_cpu:
        return quantised_of(parts, columns).weight.to(dtype)
    weight, step = torch.empty(rows, columns, dtype=dtype), max(1, PIECE // max(columns, 1))
    for start in range(0, rows, step):
        own = {name: part if name == "layout" else part[start : start + step] for name, part in parts.items()}
        weight[start : start + step] = quantised_of(own, columns).weight
    return weight


def low_of(parts: Mapping[str, Tensor]) -> Tensor:
    """(rows, groups) float32: what code 0 means."""
    return parts["low"].float() if "low" in parts else -parts["scale"].float() / 2


def wrong_with(parts: Mapping[str, Tensor], rows: int, columns: int) -> str:
    """Why these cannot be the parts of a (rows, columns) matrix; empty where they can."""
    layout = parts["layout"]
    if layout.shape != (2,) or layout.dtype != torch.int32:
        return f"its layout is {layout.dtype} of {tuple(layout.shape)}"
    bits, group = layout.tolist()
    if not (1 <= bits <= MOST_BITS and group >= 1):
        return f"it has {bits} bits in groups of {group}"
    groups = (torch.float16, (rows, -(-columns // group)))
    expected = {"codes": (torch.uint8, (rows, row_bytes(columns, bits))), "scale": groups}
    expected |= {"low": groups} if bits > 1 else {}
    for name, (dtype, shape) in expected.items():
        if name not in parts:
            return f"{name} is missing"
        if parts[name].dtype != dtype or parts[name].shape != shape:
            seen = f"{parts[name].dtype} of {tuple(parts[name].shape)}"
            return f"its {name} is {seen}, not {dtype} of {shape}"
    if not all(bool(torch.isfinite(parts[name]).all()) for name in expected if name != "codes"):
        return "its grid is not finite"
    return ""
