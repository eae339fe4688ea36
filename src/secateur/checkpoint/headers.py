"""A checkpoint folder, opened from config, index and headers alone. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from secateur.checkpoint.locate import locate
from secateur.checkpoint.safetensors_header import TensorInfo, read_header
from secateur.checkpoint.validation import (
    pop_packing,
    read_json,
    refuse_quantised_config,
    refuse_quantised_tensors,
    require_packed,
    shard_names,
)
from secateur.core.errors import CheckpointError

__all__ = ["Headers"]

SAMPLES, SAMPLE_BYTES = 256, 4096
COMPANION = re.compile(
    r"(generation_)?config\.json|.*token.*|(vocab|merges|spiece|tekken|chat_template).*"
    r"|.*\.(model|tiktoken|spm|jinja)|.*processor.*\.json|(licen[cs]e|copying|notice|use_policy).*"
)
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|npy|npz|ot|tflite)(\.index\.json|_data)?"
)
Self = TypeVar("Self", bound="Headers")


@dataclass(frozen=True)
class Headers:
    """What is known of the files of a model before a weight is read.

    Attributes:
        folder: where the files are.
        config: `config.json`, as that of the unpacked model.
        tensors: what the shards hold, in the order of the bytes on the disk; packed tensors as those that
            they stand for.

    >>> from secateur.checkpoint.headers import Headers
    >>> Headers.open("seedling").config["model_type"]
    'llama'
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls: type[Self], model: str | Path, *, revision: str | None = None) -> Self:
        """Read and validate config, index and headers; no weight is touched.

        Args:
            model: folder, hub id or `"seedling"`.
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointError: missing, damaged, cut short, at odds with the index, quantised, or packed in
                a way that is not known here.
        """
        folder = locate(model, revision)
        config = read_json(folder / "config.json", "a Hugging Face checkpoint folder with config.json")
        packed = pop_packing(folder, config)
        refuse_quantised_config(folder, config)
        tensors = _headers(folder, shard_names(folder))
        refuse_quantised_tensors(folder, tensors.values())
        require_packed(folder, packed, tensors.values())
        return cls(folder, config, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of all tensors in memory, unpacked."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def formats(self) -> dict[str, str]:
        """The formats of packed tensors by name."""
        return {name: tensor.format for name, tensor in self.tensors.items() if tensor.format}

    @property
    def parameters(self) -> int:
        """Elements of all tensors on disk."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor on disk."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def shards(self) -> list[str]:
        """File names of the weights."""
        return list(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    def fingerprint(self) -> str:
        """SHA-256 of the config and, of each shard, size, header and 256 pages spread over it.

        A shard of up to 1 MiB is covered whole. Copies of a checkpoint agree; names of folders do not count.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            path = self.folder / shard
            size = path.stat().st_size
            digest.update(f"{shard} {size} ".encode())
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(file.read(length))
                for sample in range(SAMPLES):
                    file.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def companions(self) -> list[Path]:
        """Files that belong to the model beside its weights: config, tokenizer, chat template, licence.

        Python files only when the config refers to them (`auto_map`); README.md describes the
        original and stays behind.
        """
        files = [*self.folder.iterdir(), *self.folder.glob("additional_chat_templates/*.jinja")]
        code = "auto_map" in self.config
        return sorted(path for path in files if path.is_file() and _accompanies(path.name.lower(), code))


def _headers(folder: Path, shards: dict[str, set[str]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard, promised in shards.items():
        try:
            header = read_header(folder / shard)
        except OSError as error:
            raise CheckpointError(f"{folder / shard} cannot be read ({error.strerror})") from error
        stored = {part.name for info in header.values() for part in info.stored}
        for name in sorted(promised - stored):
            raise CheckpointError(
                f"the index of {folder} places tensor {name!r} in {shard}, which lacks it",
                "an index that fits its shards",
                "copy or download the checkpoint again",
            )
        for name in sorted(header.keys() & tensors.keys()):
            raise CheckpointError(
                f"tensor {name!r} lies in both {tensors[name].file} and {shard} of {folder}",
                "every tensor once",
                "remove the stale file",
            )
        tensors.update(header)
    return tensors


def _accompanies(name: str, code: bool) -> bool:
    if name.endswith(".py"):
        return code
    return bool(COMPANION.fullmatch(name)) and not WEIGHTS.fullmatch(name)
