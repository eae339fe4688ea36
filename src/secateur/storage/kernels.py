"""Formats whose weights are multiplied as they lie in memory, by the compiled kernel of `runtime`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.checkpoint.safetensors_file import torch_dtype
from secateur.checkpoint.safetensors_header import TensorInfo
from secateur.runtime.build import library, why_missing
from secateur.runtime.kernel import Layout, Matrix, Path, linear
from secateur.storage.bitmask import row_offsets
from secateur.storage.packed_linear import KERNELS, PackedLinear, unpack_and_multiply

__all__ = [
    "KERNELS",
    "compiled",
    "computes_from",
    "has_own_kernel",
    "kernel_of",
    "kernel_words",
    "matrix_of",
    "no_kernel",
    "weight_bytes",
]

STORED = (torch.bfloat16, torch.float16)
UNPACKING = ("armor",)
"""Formats whose kernels save memory, not time."""
TAKEN = "the kernel takes 16-bit weights in bitmask or 2:4, computing in float32 or their own dtype"


def compiled(packed: PackedLinear, inputs: Tensor) -> Tensor:
    """What an `nn.Linear` with these weights computes, up to the order of float32 sums.

    The kernel computes with the weights of the file: where a dense model would round them once more, on other
    devices, for gradients and under transformations of torch the weight is unpacked.
    """
    if not _applies(packed, inputs):
        return unpack_and_multiply(packed, inputs)
    kernel, matrix = library(), matrix_of(packed)
    if kernel is None or matrix is None:
        return unpack_and_multiply(packed, inputs)
    return linear(kernel, matrix, inputs, packed.bias)


def matrix_of(packed: PackedLinear) -> Matrix | None:
    """The weight as the kernel takes it; None for a pattern or dtype that it does not know.

    Kept with the module until its parts are others (after a move to another device and back).
    """
    known = packed.prepared
    if isinstance(known, Matrix) and known.values is packed.packed_values:
        return known
    matrix = packed.prepared = _matrix(packed, packed.parts)
    return matrix


def kernel_of(model: nn.Module) -> str | None:
    """What computes from the packed weights of a model, in a few words; None where it has none."""
    formats = sorted({module.format for module in model.modules() if isinstance(module, PackedLinear)})
    if not formats:
        return None
    if any(KERNELS.get(format) is compiled for format in formats):
        return kernel_words() or f"none, packed weights are unpacked for every product: {why_missing()}"
    own = [format for format in formats if format in KERNELS]
    return f"that of {', '.join(own)}" if own else f"none, {formats[0]} is unpacked for every product"


def kernel_words() -> str | None:
    """The kernel of this machine in a few words; None where there is none."""
    kernel = library()
    names = {Path.PORTABLE: "compiled, without AVX2", Path.AVX2: "compiled, AVX2"}
    return None if kernel is None else names[Path(kernel.secateur_path())]


def computes_from(info: TensorInfo, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a packed tensor, as its header tells, in a model of this dtype."""
    stored = torch_dtype(info.dtype)
    if len(info.shape) != 2 or stored not in STORED or dtype not in (torch.float32, stored):
        return False
    if info.format not in ("nm", "nm-columns"):
        return info.format == "bitmask"
    columns = info.shape[1] if info.format == "nm" else info.shape[0]
    shapes = {part.name: part.shape for part in info.parts}
    return _two_of_four(shapes[f"{info.name}.values"], columns)


def has_own_kernel(format: str) -> bool:
    """Whether something else than the compiled kernel computes from a format, without unpacking all of it."""
    return KERNELS.get(format, compiled) is not compiled and format not in UNPACKING


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


def _matrix(packed: PackedLinear, parts: dict[str, Tensor]) -> Matrix | None:
    shape, values = (packed.out_features, packed.in_features), parts["values"]
    if packed.stored not in STORED:
        return None
    if packed.format == "bitmask":
        mask = parts["mask"]
        return Matrix(shape, Layout.BITMASK, mask.contiguous(), values, row_offsets(mask))
    if not _two_of_four(values.shape, shape[1]):
        return None
    offsets = torch.arange(shape[0] + 1, dtype=torch.int64) * (shape[1] // 2)
    return Matrix(shape, Layout.TWO_OF_FOUR, parts["indices"].contiguous(), values, offsets)


def _two_of_four(values: tuple[int, ...], columns: int) -> bool:
    """By the shape of the values; rows are of whole bytes."""
    return tuple(values[1:]) == (columns // 4, 2) and columns % 8 == 0


def _applies(packed: PackedLinear, inputs: Tensor) -> bool:
    weight, dtype = packed.weight, inputs.dtype
    return (
        weight.is_cpu
        and inputs.is_cpu
        and dtype == weight.dtype
        and (dtype == torch.float32 or dtype == packed.stored)
        and not (torch.is_grad_enabled() and _needs_gradients(packed, inputs))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(inputs) in (Tensor, nn.Parameter)
    )


def _needs_gradients(packed: PackedLinear, inputs: Tensor) -> bool:
    return inputs.requires_grad or (packed.bias is not None and packed.bias.requires_grad)


KERNELS.update({"bitmask": compiled, "nm": compiled})
