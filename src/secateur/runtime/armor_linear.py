"""Linear layers of A S B: one factor after the other, without their product."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.factored import times_right
from secateur.runtime.compiled import product
from secateur.runtime.packed_linear import PackedLinear
from secateur.storage.armor import FactoredFormat, core_of, core_parts

__all__ = ["armor_linear"]


def armor_linear(packed: PackedLinear, inputs: Tensor) -> Tensor:
    """(..., inputs) -> (..., outputs): A (S (B x)) + bias.

    S is multiplied by as it lies in memory where the kernel can, else unpacked.
    """
    if inputs.dtype != packed.weight.dtype and not torch.is_autocast_enabled(inputs.device.type):
        raise RuntimeError(f"inputs of {inputs.dtype} for a layer of {packed.weight.dtype}")
    left, right = (packed.parts[name].to(inputs.dtype) for name in FactoredFormat.parts)
    inner = times_right(inputs.reshape(-1, packed.in_features), right.mT)
    outer = times_right(_times_core(packed, inner), left.mT)
    outer = outer.view(*inputs.shape[:-1], packed.out_features)
    return outer if packed.bias is None else outer + packed.bias.to(outer.dtype)


def _times_core(packed: PackedLinear, inner: Tensor) -> Tensor:
    """(rows, inputs) -> (rows, outputs): inner S^T."""
    format, parts = core_parts(packed.parts)
    found = product(packed, format.id, parts, inner)
    if found is None:
        core = core_of(packed.parts, (packed.out_features, packed.in_features))
        found = inner @ core.to(inner.dtype).T
    return found
