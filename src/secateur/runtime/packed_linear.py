"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from secateur.core.transforms import runs_as_called
from secateur.storage.formats import FORMATS, Packed

__all__ = ["KERNELS", "Kernel", "PackedLinear", "same_numbers", "unpack_and_multiply"]


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
            self.register_buffer(f"packed_{name}", part.to(like.device))

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
        self.prepared = None
        for name, part in self.parts.items():
            self._buffers[f"packed_{name}"] = part.to(device)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs). Raises `RuntimeError`, as a dense layer, for another last axis."""
        if inputs.shape[-1] != self.in_features:
            raise RuntimeError(f"inputs of shape {tuple(inputs.shape)} for {self}")
        return KERNELS.get(self.format, unpack_and_multiply)(self, inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move everything; of a cast take the dtype to compute in, and leave the parts as they are."""
        self.prepared, kept = None, self.parts
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in self.parts.items():
            if part.dtype != kept[name].dtype:
                self._buffers[f"packed_{name}"] = kept[name].to(part.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take parts of any size, if together they are a weight of this shape. Raises `CheckpointError`."""
        parts = {name: state_dict.get(f"{prefix}packed_{name}", part) for name, part in self.parts.items()}
        shape = (self.out_features, self.in_features)
        FORMATS.get(self.format).check(parts, f"{prefix}weight", shape)
        self.prepared = None
        for name, part in self.parts.items():
            if part.shape != parts[name].shape:
                self._buffers[f"packed_{name}"] = part.new_empty(parts[name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.format}"


Kernel = Callable[[PackedLinear, Tensor], Tensor]


def same_numbers(packed: PackedLinear, inputs: Tensor) -> bool:
    """Whether a kernel's product may stand for that of torch: no cast, gradient or transformation is due."""
    weight = packed.weight
    return (
        inputs.device == weight.device
        and inputs.dtype == weight.dtype
        and not (torch.is_grad_enabled() and _needs_gradients(packed, inputs))
        and not torch.is_autocast_enabled(inputs.device.type)
        and type(inputs) in (Tensor, nn.Parameter)
        and runs_as_called()
        and unpack_dual(inputs).tangent is None  # type: ignore[no-untyped-call]
    )


def _needs_gradients(packed: PackedLinear, inputs: Tensor) -> bool:
    return inputs.requires_grad or (packed.bias is not None and packed.bias.requires_grad)


def unpack_and_multiply(linear: PackedLinear, inputs: Tensor) -> Tensor:
    """What an `nn.Linear` computes: (..., inputs) -> (..., outputs). No gradient reaches the weight."""
    with torch.no_grad():
        weight = linear.unpacked()
    return nn.functional.linear(inputs, weight, linear.bias)


KERNELS: dict[str, Kernel] = {}
"""By format: what computes from the packed weight directly (`runtime.products` has those that are built in).
Where there is none, `unpack_and_multiply`."""
