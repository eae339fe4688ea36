"""What computes from the packed weights of each format that is built in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from secateur.runtime.armor_linear import armor_linear
from secateur.runtime.compiled import compiled, two_of_four
from secateur.runtime.low_bit_linear import low_bit_linear
from secateur.runtime.packed_linear import KERNELS, PackedLinear, same_numbers
from secateur.runtime.semi_structured import Choices, fits

__all__ = ["CHOICES", "KERNELS", "groups"]

CHOICES = Choices()
"""Of this process, for 2:4 on CUDA devices."""


def groups(packed: PackedLinear, inputs: Tensor) -> Tensor:
    """`compiled`, or the product with a semi-structured tensor of torch where 2:4 lies on a CUDA device."""
    sparse = _semi_structured(packed, inputs)
    if sparse is None:
        return compiled(packed, inputs)
    outputs = nn.functional.linear(inputs.reshape(-1, packed.in_features), sparse, packed.bias)
    return outputs.view(*inputs.shape[:-1], packed.out_features)


@dataclass(frozen=True)
class _OnDevice:
    """A semi-structured weight, and the part that it was made of, now in the memory of the host."""

    values: Tensor
    weight: Tensor


def _semi_structured(packed: PackedLinear, inputs: Tensor) -> Tensor | None:
    shape = packed.out_features, packed.in_features
    known = packed.prepared
    if not (same_numbers(packed, inputs) and inputs.dtype == packed.stored and inputs.numel()):
        return None
    if isinstance(known, _OnDevice) and known.values is packed.parts["values"]:
        return known.weight
    if not two_of_four(packed.parts["values"].shape, shape[1]) or not fits(
        shape, inputs.dtype, inputs.device
    ):
        return None
    found = CHOICES.sparse(shape, inputs.reshape(-1, shape[1]), packed.unpacked)
    if found is not None:
        packed.move_parts("cpu")  # the device need not hold the weight twice
        packed.prepared = _OnDevice(packed.parts["values"], found)
    return found


KERNELS.update({"armor": armor_linear, "bitmask": compiled, "low-bit": low_bit_linear, "nm": groups})
