"""Writing a GGUF file tensor by tensor, through the `gguf` package."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoint.durable import staged
from secateur.core.errors import ExportError, MissingExtraError
from secateur.core.progress import Progress
from secateur.formats.gguf_tensors import Entry

__all__ = ["DTYPES", "require_gguf", "stored_as", "write_gguf"]

DTYPES = ("f16", "bf16", "f32", "q8_0")
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PIECE = 1 << 24
"""Values that are converted at a time."""
ROUTER = "ffn_gate_inp"


def require_gguf() -> Any:
    """The `gguf` package. Raises `MissingExtraError` without it."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "writing GGUF files") from error
    return gguf


def stored_as(entry: Entry, dtype: str) -> str:
    """How a tensor is stored: vectors and routers in float32, rows of no whole groups of 32 not as q8_0."""
    if len(entry.shape) == 1 or ROUTER in entry.name:
        return "f32"
    return "f16" if dtype == "q8_0" and entry.shape[-1] % 32 else dtype


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    entries: Sequence[Entry],
    dtype: str,
    progress: Progress,
) -> int:
    """Write a file that takes its name when it is whole. One tensor is in memory at a time.

    Args:
        keys: full names, without `general.architecture`.
        dtype: of matrices, one of `DTYPES`.

    Returns:
        The bytes of the file.

    Raises:
        OutputError: the disk refuses the file.
        ExportError: values that `dtype` cannot hold.
        MissingExtraError: without the `gguf` package.
    """
    gguf = require_gguf()
    logging.getLogger("gguf").setLevel(logging.WARNING)
    with staged(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _add_keys(gguf, writer, keys, dtype)
            for entry in entries:
                _announce(gguf, writer, entry, stored_as(entry, dtype))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress.task(f"writing {path.name}", len(entries)) as task:
                for entry in entries:
                    writer.write_tensor_data(_encoded(gguf, entry, stored_as(entry, dtype)))
                    task.advance()
        finally:
            writer.close()
    return path.stat().st_size


def _add_keys(gguf: Any, writer: Any, keys: Mapping[str, Any], dtype: str) -> None:
    file_type = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}[dtype]
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add[type(value)](key, value)


def _announce(gguf: Any, writer: Any, entry: Entry, stored: str) -> None:
    kind = getattr(gguf.GGMLQuantizationType, stored.upper())
    group, group_bytes = gguf.GGML_QUANT_SIZES[kind]
    nbytes = prod(entry.shape) // group * group_bytes
    writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)


def _encoded(gguf: Any, entry: Entry, stored: str) -> Any:
    """The bytes of a tensor, converted piece by piece."""
    tensor = entry.read()
    if tuple(tensor.shape) != tuple(entry.shape):
        raise ExportError(f"{entry.name} is {tuple(tensor.shape)}", f"{entry.shape}", "report this model")
    if stored in FLOATS:
        return _as_float(entry, tensor, FLOATS[stored])
    rows = tensor.reshape(-1, entry.shape[-1])
    pieces = torch.split(rows, max(PIECE // entry.shape[-1], 1))
    kind = getattr(gguf.GGMLQuantizationType, stored.upper())
    return np.concatenate([gguf.quants.quantize(piece.float().numpy(), kind) for piece in pieces])


def _as_float(entry: Entry, tensor: Tensor, dtype: torch.dtype) -> Any:
    converted = tensor.to(dtype).contiguous()
    if not bool(torch.isfinite(converted).all()):
        raise ExportError(f"{entry.name} has values that float16 cannot hold", "", "use --dtype bf16 or f32")
    return converted.view(torch.uint8 if dtype == torch.bfloat16 else dtype).numpy()
