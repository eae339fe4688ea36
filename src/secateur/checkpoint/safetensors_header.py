"""The header of a safetensors file: which tensors lie where. Needs no torch.

The format: https://github.com/huggingface/safetensors#format (8 bytes of header length, little endian;
a JSON header; the tensors without gaps).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from secateur.checkpoint.packing import CHECKSUM, formats_in, refused
from secateur.core.errors import CheckpointError

__all__ = ["TensorInfo", "cut_short", "encode_header", "read_header"]

DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Names in the file -> names in torch and bytes of one element."""
CODES = {name: code for code, (name, _) in DTYPES.items()}
ITEMSIZES = dict(DTYPES.values())
HEADER_LIMIT_BYTES = 100_000_000
LFS_POINTER = b"version "


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `stop` (absolute) of `file` (a name in the checkpoint folder).

    `dtype` is the name that torch has for it, such as `bfloat16`. A packed tensor (see `packing`) appears as
    the tensor that it stands for, with its `format` and, in `parts`, what the file holds of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int
    format: str = ""
    parts: tuple[TensorInfo, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in memory, unpacked."""
        return self.numel * self.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return sum(part.stored_bytes for part in self.parts) or self.stop - self.start

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """What the file holds: itself, or its parts."""
        return self.parts or (self,)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZES[self.dtype]

    @property
    def is_floating_point(self) -> bool:
        return "float" in self.dtype


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file in the order of their bytes, from its header alone.

    Raises:
        CheckpointError: not a safetensors file, cut short, a header at odds with itself or the file, or
            packed tensors of a layout or format that is not known.
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
            raise cut_short(path, size, "a whole header")
        raw = file.read(length)
    tensors, metadata = _parse(path, raw)
    stop = tensors[-1].stop if tensors else 8 + length
    if size < stop:
        raise cut_short(path, size, f"{stop} bytes, as its header says")
    if size > stop:
        raise _damaged(path, f"{size - stop} bytes more than its header says")
    return _unite({tensor.name: tensor for tensor in tensors}, formats_in(str(path), metadata))


def _unite(tensors: dict[str, TensorInfo], formats: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Put a packed tensor in the place of its parts.

    Raises:
        CheckpointError: a part without its tensor, or a packed tensor without what all have.
    """
    if not formats:
        return tensors
    united: dict[str, TensorInfo] = {}
    parts: dict[str, dict[str, TensorInfo]] = {name: {} for name in formats}
    for name, info in tensors.items():
        owner = name if name in formats else name.rpartition(".")[0]
        if owner in formats:
            parts[owner][name] = info
        if name == owner or owner not in formats:
            united[name] = info
    for name, own in parts.items():
        united[name] = _packed(name, formats[name], own)
    return united


def _packed(name: str, format: str, parts: Mapping[str, TensorInfo]) -> TensorInfo:
    for needed in (name, f"{name}.{CHECKSUM}"):
        if needed not in parts:
            raise refused(name, f"{needed} is missing")
    own = parts[name]
    if not own.shape or own.shape[-1] != 0:
        raise refused(name, f"{name} has shape {own.shape}, whose last axis is not 0")
    return replace(own, shape=own.shape[:-1], format=format, parts=tuple(parts.values()))


def cut_short(path: Path, size: int, expected: str) -> CheckpointError:
    """For a file that ends before its time."""
    return CheckpointError(f"{path} is cut short: {size} bytes", expected, "copy or download it again")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}", "a safetensors file", "copy or download it again")


def _parse(path: Path, raw: bytes) -> tuple[list[TensorInfo], dict[str, Any]]:
    """Tensors in the order of their bytes, and the metadata."""
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors = [_info(path, name, entry, 8 + len(raw)) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header does not parse ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = 8 + len(raw)
    for tensor in tensors:
        if tensor.start != end:
            raise _damaged(path, f"a gap or an overlap before tensor {tensor.name!r}")
        end = tensor.stop
    return tensors, metadata


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
    (dtype, itemsize), shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"shape or offsets of {name!r}")
    if stop - start != prod(shape) * itemsize:
        raise ValueError(f"{name!r} has {stop - start} bytes for shape {list(shape)} in {entry['dtype']}")
    return TensorInfo(name, dtype, shape, path.name, data + start, data + stop)


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and JSON header, padded to 8 bytes.

    Args:
        tensors: name, dtype (as in `TensorInfo`) and shape of each, in the order in which they lie.
        metadata: free text by key.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + prod(shape) * ITEMSIZES[dtype]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
