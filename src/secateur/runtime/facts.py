"""What computes from packed weights here, in words and by the header: for plans, reports and `bench`."""

from __future__ import annotations

import torch
from torch import nn

from secateur.checkpoint.safetensors_file import torch_dtype
from secateur.checkpoint.safetensors_header import TensorInfo
from secateur.runtime import products
from secateur.runtime.build import library, why_missing
from secateur.runtime.compiled import STORED, compiled, matrix_of, two_of_four
from secateur.runtime.kernel import Matrix, Path, path_of
from secateur.runtime.packed_linear import PackedLinear
from secateur.runtime.products import KERNELS, groups

__all__ = ["computes_from", "has_own_kernel", "kernel_of", "kernel_words", "no_kernel", "weight_bytes"]

UNPACKING = ("armor", "low-bit")
"""Formats whose kernels save memory, not time."""
WORDS = {"low-bit": "torch, from the bytes for few tokens at a time"}
"""What other kernels than the compiled one are."""
TAKEN = "the kernel takes 16-bit matrices, one a tensor, in bitmask or 2:4, in float32 or their own dtype"
NAMES = {
    Path.PORTABLE: "without AVX2",
    Path.AVX2: "AVX2",
    Path.AVX512: "AVX-512",
    Path.AVX512_BF16: "AVX-512 with bfloat16",
}


def kernel_of(model: nn.Module) -> str | None:
    """What computes from the packed weights of a model, in words; None where it has none.

    On a CUDA device, and of factors, it is known once the model has run.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return "; ".join(sorted({_computing(layer) for layer in layers})) or None


def kernel_words() -> str | None:
    """The kernel of this machine in a few words; None where there is none."""
    kernel = library()
    return None if kernel is None else f"compiled, {NAMES[path_of(kernel)]}"


def computes_from(info: TensorInfo, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a packed tensor, as its header tells, in a model of this dtype."""
    stored = torch_dtype(info.dtype)
    if len(info.shape) != 2 or stored not in STORED or dtype not in (torch.float32, stored):
        return False
    if info.format not in ("nm", "nm-columns"):
        return info.format == "bitmask"
    columns = info.shape[1] if info.format == "nm" else info.shape[0]
    shapes = {part.name: part.shape for part in info.parts}
    return two_of_four(shapes[f"{info.name}.values"], columns)


def has_own_kernel(format: str) -> bool:
    """Whether something else than the compiled kernel computes from a format, without unpacking all of it."""
    return KERNELS.get(format, compiled) not in (compiled, groups) and format not in UNPACKING


def no_kernel(device: torch.device, *, taken: bool = True) -> str | None:
    """Why nothing computes from packed weights on a device; None where the kernel does.

    Args:
        taken: whether these are weights that the kernel takes.
    """
    if device.type != "cpu":
        return "the kernel is one for CPUs"
    return why_missing() if taken else TAKEN


def weight_bytes(model: nn.Module) -> int:
    """Memory of the parameters and buffers of a model, packed or not; shared ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


def _computing(layer: PackedLinear) -> str:
    device, function = layer.weight.device, KERNELS.get(layer.format)
    if function is None:
        return f"none, {layer.format} is unpacked for every product"
    if layer.format == "nm":
        told = products.CHOICES.told((layer.out_features, layer.in_features), layer.stored, device)
        if told is not None:
            return told
    ours = function in (compiled, groups)
    if not (ours or isinstance(layer.prepared, Matrix)):
        on_cpu = WORDS.get(layer.format) if device.type == "cpu" else None
        return on_cpu or f"that of {layer.format}"
    words = kernel_words() if device.type == "cpu" else None
    if device.type == "cpu" and words is None:
        return f"none, packed weights are unpacked for every product: {why_missing()}"
    if words is None or (ours and matrix_of(layer, layer.format, layer.parts) is None):
        return f"{layer.format} on {device} unpacked for every product"
    return words
