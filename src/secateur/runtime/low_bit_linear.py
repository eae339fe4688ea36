"""Linear layers of a few bits: few tokens are multiplied byte by byte, many with the weights unpacked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.quantise.products import byte_products, in_bytes
from secateur.runtime.packed_linear import PackedLinear, same_numbers
from secateur.storage.low_bit import LowBit

__all__ = ["low_bit_linear"]

LOOKUPS = 8
"""Tokens times bits from which unpacking takes less time than looking sums up."""


def low_bit_linear(packed: PackedLinear, inputs: Tensor) -> Tensor:
    """What an `nn.Linear` with the numbers of the grid computes.

    They are those of `low_bit`, never rounded to the dtype of the file. Sums of bytes are of float32.
    """
    parts = packed.parts
    if _looks_up(packed, parts, inputs):
        rows = inputs.reshape(-1, packed.in_features).float()
        found = byte_products(parts, rows).view(*inputs.shape[:-1], packed.out_features)
        return (found if packed.bias is None else found + packed.bias).to(inputs.dtype)
    with torch.no_grad():
        shape = (packed.out_features, packed.in_features)
        weight = LowBit.unpack(parts, shape, packed.weight.dtype)
    return nn.functional.linear(inputs, weight, packed.bias)


def _looks_up(packed: PackedLinear, parts: Mapping[str, Tensor], inputs: Tensor) -> bool:
    if not (inputs.is_cpu and same_numbers(packed, inputs)):
        return False
    tokens, bits = inputs.numel() // packed.in_features, parts["layout"].tolist()[0]
    return 0 < tokens * bits < LOOKUPS and in_bytes(parts)
