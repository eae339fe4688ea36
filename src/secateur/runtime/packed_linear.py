"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.storage.formats import FORMATS, Packed

__all__ = ["KERNELS", "Kernel", "PackedLinear", "unpack_and_multiply"]


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear`, or of a `Conv1D` of transformers, which is one stored transposed.

    Attributes:
        format: id of the format of the weight.
        weight: a stand-in of shape (outputs, inputs, 0), which states dtype and device where code asks.
        bias: of the linear layer, or None.
        stored: the dtype of the file.
        prepared: what a kernel keeps beside the parts.

    Args:
        packed: the weight, (outputs, inputs).
        like: a tensor on the device and of the dtype to compute in.
        bias: of the linear layer.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: Packed, like: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.format, self._parts, self.stored = packed.format, tuple(packed.parts), packed.dtype
        self.prepared: Any = None
        self.weight = nn.Parameter(like.new_empty((*packed.shape, 0)), requires_grad=False)
        self.register_parameter("bias", bias)
        for name, part in packed.parts.items():
            self.register_buffer(f"packed_{name}", part.to(like.device), persistent=False)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts of the weight by name."""
        return {name: getattr(self, f"packed_{name}") for name in self._parts}

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight as it is kept."""
        return sum(part.nbytes for part in self.parts.values())

    def unpacked(self) -> Tensor:
        """The weight, (outputs, inputs), computed anew; in the dtype of the file first, as a dense one is."""
        shape = (self.out_features, self.in_features)
        weight = FORMATS.get(self.format).unpack(self.parts, shape, self.stored)
        return weight.to(self.weight.device, self.weight.dtype)

    def materialize(self) -> nn.Linear:
        """An ordinary layer: the weight unpacked, in the dtype to compute in, and the very same bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.unpacked())
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def move_parts(self, device: torch.device | str) -> None:
        """Keep the parts elsewhere than the layer computes."""
        for name, part in self.parts.items():
            self.register_buffer(f"packed_{name}", part.to(device), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return KERNELS.get(self.format, unpack_and_multiply)(self, inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move everything; of a cast take the dtype to compute in, and leave the parts as they are."""
        kept = self.parts
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in self.parts.items():
            if part.dtype != kept[name].dtype:
                self._buffers[f"packed_{name}"] = kept[name].to(part.device)
        return self

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.format}"


Kernel = Callable[[PackedLinear, Tensor], Tensor]


def unpack_and_multiply(linear: PackedLinear, inputs: Tensor) -> Tensor:
    """What an `nn.Linear` computes: (..., inputs) -> (..., outputs). No gradient reaches the weight."""
    with torch.no_grad():
        weight = linear.unpacked()
    return nn.functional.linear(inputs, weight, linear.bias)


KERNELS: dict[str, Kernel] = {}
"""By format: what computes from the packed weight directly (`runtime.products` has those that are built in).
Where there is none, `unpack_and_multiply`."""
