"""Formats whose weights are multiplied as they lie, by what `runtime` has for their device, or by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.checkpoint.safetensors_file import torch_dtype
from secateur.checkpoint.safetensors_header import TensorInfo
from secateur.runtime.build import library, why_missing
from secateur.runtime.kernel import Layout, Matrix, Path, linear, path_of
from secateur.runtime.semi_structured import Choices, fits
from secateur.storage.bitmask import row_offsets
from secateur.storage.low_bit_linear import low_bit_linear
from secateur.storage.packed_linear import KERNELS, PackedLinear, unpack_and_multiply

__all__ = [
    "KERNELS",
    "MATRICES",
    "compiled",
    "computes_from",
    "groups",
    "has_own_kernel",
    "kernel_of",
    "kernel_words",
    "matrix_of",
    "no_kernel",
    "product",
    "weight_bytes",
]

STORED = (torch.bfloat16, torch.float16)
UNPACKING = ("armor", "low-bit")
"""Formats whose kernels save memory, not time."""
WORDS = {"low-bit": "torch, from the bytes for few tokens at a time"}
"""What other kernels than the compiled one are."""
TAKEN = "the kernel takes 16-bit weights in bitmask or 2:4, computing in float32 or their own dtype"
CHOICES = Choices()
"""Of this process, for 2:4 on CUDA devices."""
NAMES = {
    Path.PORTABLE: "without AVX2",
    Path.AVX2: "AVX2",
    Path.AVX512: "AVX-512",
    Path.AVX512_BF16: "AVX-512 with bfloat16",
}

AsMatrix = Callable[[Mapping[str, Tensor], tuple[int, int]], Matrix | None]


def compiled(packed: PackedLinear, inputs: Tensor) -> Tensor:
    """What an `nn.Linear` with these weights computes, up to the order of float32 sums.

    The kernel computes with the weights of the file: where a dense model would round them once more, on other
    devices, for gradients and under transformations of torch the weight is unpacked.
    """
    found = product(packed, packed.format, packed.parts, inputs, packed.bias)
    return unpack_and_multiply(packed, inputs) if found is None else found


def product(
    packed: PackedLinear, format: str, parts: Mapping[str, Tensor], inputs: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """inputs W^T (+ bias) from the parts of a matrix W of the shape of the layer, which may be all of its
    weight or one of its factors; None where the kernel does not compute and W must be unpacked."""
    if not _applies(packed, inputs):
        return None
    kernel, matrix = library(), matrix_of(packed, format, parts)
    return None if kernel is None or matrix is None else linear(kernel, matrix, inputs, bias)


def matrix_of(packed: PackedLinear, format: str, parts: Mapping[str, Tensor]) -> Matrix | None:
    """The parts of a matrix as the kernel takes them; None for a pattern or dtype that it does not know.

    Kept with the module until the parts are others (after a move to another device and back).
    """
    known = packed.prepared
    if isinstance(known, Matrix) and known.values is parts["values"]:
        return known
    if packed.stored not in STORED or format not in MATRICES:
        return None
    matrix = packed.prepared = MATRICES[format](parts, (packed.out_features, packed.in_features))
    return matrix


def groups(packed: PackedLinear, inputs: Tensor) -> Tensor:
    """`compiled`, or the product with a semi-structured tensor of torch where 2:4 lies on a CUDA device."""
    sparse = _semi_structured(packed, inputs)
    if sparse is None:
        return compiled(packed, inputs)
    outputs = nn.functional.linear(inputs.reshape(-1, packed.in_features), sparse, packed.bias)
    return outputs.view(*inputs.shape[:-1], packed.out_features)


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
    return _two_of_four(shapes[f"{info.name}.values"], columns)


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


@dataclass(frozen=True)
class _OnDevice:
    """A semi-structured weight, and the part that it was made of, now in the memory of the host."""

    values: Tensor
    weight: Tensor


def _semi_structured(packed: PackedLinear, inputs: Tensor) -> Tensor | None:
    shape = packed.out_features, packed.in_features
    known = packed.prepared
    if not (_same_numbers(packed, inputs) and inputs.dtype == packed.stored and inputs.numel()):
        return None
    if isinstance(known, _OnDevice) and known.values is packed.parts["values"]:
        return known.weight
    if not _two_of_four(packed.parts["values"].shape, shape[1]) or not fits(
        shape, inputs.dtype, inputs.device
    ):
        return None
    found = CHOICES.sparse(shape, inputs.reshape(-1, shape[1]), packed.unpacked)
    if found is not None:
        packed.move_parts("cpu")  # the device need not hold the weight twice
        packed.prepared = _OnDevice(packed.parts["values"], found)
    return found


def _computing(layer: PackedLinear) -> str:
    device, function = layer.weight.device, KERNELS.get(layer.format)
    if function is None:
        return f"none, {layer.format} is unpacked for every product"
    if layer.format == "nm":
        told = CHOICES.told((layer.out_features, layer.in_features), layer.stored, device)
        if told is not None:
            return told
    ours = function in (compiled, groups)
    if not (ours or isinstance(layer.prepared, Matrix)):
        return WORDS.get(layer.format, f"that of {layer.format}")
    words = kernel_words() if device.type == "cpu" else None
    if device.type == "cpu" and words is None:
        return f"none, packed weights are unpacked for every product: {why_missing()}"
    if words is None or (ours and matrix_of(layer, layer.format, layer.parts) is None):
        return f"{layer.format} on {device} unpacked for every product"
    return words


def _from_bitmask(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Matrix:
    mask = parts["mask"]
    return Matrix(shape, Layout.BITMASK, mask.contiguous(), parts["values"], row_offsets(mask))


def _from_groups(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Matrix | None:
    rows, columns = shape
    if not _two_of_four(parts["values"].shape, columns):
        return None
    offsets = torch.arange(rows + 1, dtype=torch.int64) * (columns // 2)
    return Matrix(shape, Layout.TWO_OF_FOUR, parts["indices"].contiguous(), parts["values"], offsets)


MATRICES: dict[str, AsMatrix] = {"bitmask": _from_bitmask, "nm": _from_groups}
"""By format: its parts as a matrix of the kernel, which shares their memory. All that a format needs to have
its products, or those of a factor that it packs, computed by the kernel (`product`)."""


def _two_of_four(values: tuple[int, ...], columns: int) -> bool:
    """By the shape of the values; rows are of whole bytes."""
    return tuple(values[1:]) == (columns // 4, 2) and columns % 8 == 0


def _applies(packed: PackedLinear, inputs: Tensor) -> bool:
    known = inputs.dtype == torch.float32 or inputs.dtype == packed.stored
    return inputs.is_cpu and known and _same_numbers(packed, inputs)


def _same_numbers(packed: PackedLinear, inputs: Tensor) -> bool:
    """Whether a kernel's product may stand for that of torch: no cast, gradient or transformation is due."""
    weight = packed.weight
    return (
        inputs.device == weight.device
        and inputs.dtype == weight.dtype
        and not (torch.is_grad_enabled() and _needs_gradients(packed, inputs))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(inputs.device.type)
        and type(inputs) in (Tensor, nn.Parameter)
    )


def _needs_gradients(packed: PackedLinear, inputs: Tensor) -> bool:
    return inputs.requires_grad or (packed.bias is not None and packed.bias.requires_grad)


KERNELS.update({"bitmask": compiled, "nm": groups, "low-bit": low_bit_linear})
