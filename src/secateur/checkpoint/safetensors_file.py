"""One safetensors file: its header, ranges of it as tensors, and writing one.

The format: https://github.com/huggingface/safetensors#format (8 bytes of header length, little endian;
a JSON header; the tensors without gaps). The reader of the `safetensors` package maps files, so that what
was read stays resident; here every tensor is read into memory of its own, which goes when the tensor goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoint.durable import replacing
from secateur.core.errors import CheckpointError

__all__ = ["TensorInfo", "encode_header", "read_header", "read_tensors", "save_tensors"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT_BYTES = 100_000_000
LFS_POINTER = b"version "


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `stop` (absolute) of `file` (a name in the checkpoint folder)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file in the order of their bytes, from its header alone.

    Raises:
        CheckpointError: not a safetensors file, cut short, or a header at odds with itself or the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == LFS_POINTER:
            raise CheckpointError(
                f"{path} is a git-lfs pointer", "the weights themselves", "run: git lfs pull"
            )
        if length > HEADER_LIMIT_BYTES:
            raise _damaged(path, f"a header of {length} bytes")
        if size < 8 + length:
            raise _cut_short(path, size, "a whole header")
        raw = file.read(length)
    tensors = _parse(path, raw)
    stop = tensors[-1].stop if tensors else 8 + length
    if size < stop:
        raise _cut_short(path, size, f"{stop} bytes, as its header says")
    if size > stop:
        raise _damaged(path, f"{size - stop} bytes more than its header says")
    return {tensor.name: tensor for tensor in tensors}


def _cut_short(path: Path, size: int, expected: str) -> CheckpointError:
    return CheckpointError(f"{path} is cut short: {size} bytes", expected, "copy or download it again")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}", "a safetensors file", "copy or download it again")


def _parse(path: Path, raw: bytes) -> list[TensorInfo]:
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        tensors = [_info(path, name, entry, 8 + len(raw)) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header does not parse ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = 8 + len(raw)
    for tensor in tensors:
        if tensor.start != end:
            raise _damaged(path, f"a gap or an overlap before tensor {tensor.name!r}")
        end = tensor.stop
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return unique


def _info(path: Path, name: str, entry: dict[str, Any], data: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"tensor {name!r} of {path} has dtype {entry['dtype']}",
            "F64, F32, F16 or BF16 weights",
            "start from the checkpoint before quantisation",
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"shape or offsets of {name!r}")
    if stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {stop - start} bytes for shape {list(shape)} in {entry['dtype']}")
    return TensorInfo(name, dtype, shape, path.name, data + start, data + stop)


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
            tensors[info.name] = torch.empty(info.shape, dtype=info.dtype)
            _fill(file, _bytes_of(tensors[info.name]), path)
            position = info.stop
    return tensors


def _fill(file: Any, buffer: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(buffer):  # one system call reads 2 GiB at most
        count = file.readinto(buffer[filled:])
        if not count:
            raise _cut_short(path, file.tell(), "the bytes that its header promises")
        filled += count


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def encode_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and JSON header for tensors laid out in the given order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors (any device, any strides) in the given order; see `durable.replacing`."""
    header = encode_header((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    with replacing(path) as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor))
