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
from secateur.checkpoint.safetensors_header import TensorInfo, cut_short, encode_header

__all__ = ["read_tensors", "save_tensors", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that `TensorInfo.dtype` names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def read_tensors(path: Path, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """Read tensors of one file in the order of their bytes, each into fresh memory.

    Neighbours are read back to back without a seek, which the system turns into one sequential read.

    Raises:
        CheckpointError: the file has become shorter since its header was read.
    """
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


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors (any device, any strides) in the given order; see `durable.replacing`."""
    header = encode_header(
        (name, _name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()
    )
    with replacing(path) as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
