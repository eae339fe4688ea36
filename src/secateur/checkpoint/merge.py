"""From finished parts to the files of an ordinary checkpoint, by copying bytes in bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.checkpoint.durable import copy_range, replacing, write_bytes
from secateur.checkpoint.packing import metadata_of
from secateur.checkpoint.safetensors_header import TensorInfo, encode_header
from secateur.checkpoint.validation import INDEX, SINGLE

__all__ = ["Placed", "copy_files", "merge_weights", "write_json"]

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Placed:
    """A tensor and the part file that holds it."""

    part: Path
    info: TensorInfo


def merge_weights(folder: Path, tensors: list[Placed], shard_bytes: int) -> None:
    """Write one `model.safetensors`, or numbered shards of about `shard_bytes` with their index.

    The bytes depend on the tensors, their order and `shard_bytes` alone.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        _write_shard(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard)
        weight_map.update((info.name, name) for placed in shard for info in placed.info.stored)
    totals = {
        "total_parameters": sum(placed.info.numel for placed in tensors),
        "total_size": sum(placed.info.stored_bytes for placed in tensors),
    }
    write_json(folder / INDEX, {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))})


def _shards(tensors: list[Placed], shard_bytes: int) -> list[list[Placed]]:
    """Fill shards in order; a tensor larger than `shard_bytes` has one to itself, parts stay together."""
    shards: list[list[Placed]] = [[]]
    filled = 0
    for placed in tensors:
        if shards[-1] and filled + placed.info.stored_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(placed)
        filled += placed.info.stored_bytes
    return shards


def _write_shard(path: Path, shard: list[Placed]) -> None:
    formats = {placed.info.name: placed.info.format for placed in shard if placed.info.format}
    stored = [Placed(placed.part, info) for placed in shard for info in placed.info.stored]
    # Wide dtypes first, as the safetensors package does: every tensor starts at a multiple of its item size.
    stored.sort(key=lambda placed: -placed.info.itemsize)
    header = encode_header(
        ((placed.info.name, placed.info.dtype, placed.info.shape) for placed in stored),
        {**METADATA, **metadata_of(formats)},
    )
    with replacing(path) as file:
        file.write(header)
        for placed in stored:
            with placed.part.open("rb", buffering=0) as part:
                copy_range(part, file, placed.info.start, placed.info.stop)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON as transformers writes it, keys in the given order."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def copy_files(files: list[Path], source: Path, target: Path) -> None:
    """Copy files of one folder (or of folders in it) to the same places in another."""
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        with path.open("rb") as file, replacing(copy) as out:
            shutil.copyfileobj(file, out)
