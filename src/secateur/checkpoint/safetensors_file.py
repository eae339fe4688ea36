"""Tensors of one safetensors file: ranges of it read, and writing one.

The reader of the `safetensors` package maps files, so that what was read stays resident; here every tensor
is read into memory of its own, which goes when the tensor goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoint.durable import replacing
from secateur.checkpoint.packing import Packed, metadata_of
from secateur.checkpoint.safetensors_header import TensorInfo, cut_short, encode_header

__all__ = ["read_packed", "read_tensors", "save_tensors", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that `TensorInfo.dtype` names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def read_tensors(path: Path, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """Read tensors of one file in the order of their bytes, each into fresh memory.

    Neighbours are read back to back without a seek, which the system turns into one sequential read.

    Packed tensors are unpacked one after the other.

    Raises:
        CheckpointError: the file has become shorter since its header was read, or a packed tensor is damaged.
    """
    infos = sorted(infos, key=lambda info: info.start)
    tensors = {info.name: read_packed(path, info).unpack() for info in infos if info.parts}
    plain = [info for info in infos if not info.parts]
    return {**tensors, **_read_plain(path, plain)}


def read_packed(path: Path, info: TensorInfo) -> Packed:
    """A packed tensor as it is stored. Raises `CheckpointError` as `read_tensors`."""
    return Packed.read(info.name, info.format, _read_plain(path, info.parts))


def _read_plain(path: Path, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with path.open("rb", buffering=0) as file:
        position = 0
        for info in sorted(infos, key=lambda info: info.start):
            if info.start != position:
                file.seek(info.start)
            tensors[info.name] = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
            _fill(file, _bytes_of(tensors[info.name]), path)
            position = info.stop
    return tensors


def _fill(file: Any, buffer: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(buffer):  # one system call reads 2 GiB at most
        count = file.readinto(buffer[filled:])
        if not count:
            raise cut_short(path, file.tell(), "the bytes that its header promises")
        filled += count


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def save_tensors(path: Path, tensors: Mapping[str, Tensor | Packed]) -> None:
    """Write tensors (any device, any strides) in the given order; see `durable.replacing`."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored |= tensor.stored(name) if isinstance(tensor, Packed) else {name: tensor}
    formats = {name: tensor.format for name, tensor in tensors.items() if isinstance(tensor, Packed)}
    header = encode_header(
        ((name, _name(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()),
        metadata_of(formats),
    )
    with replacing(path) as file:
        file.write(header)
        for tensor in stored.values():
            file.write(_bytes_of(tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
