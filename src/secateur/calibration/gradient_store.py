"""Accumulated gradient magnitudes on disk, one file a block, complete after every chunk of sequences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.anatomy.model import Anatomy
from secateur.checkpoint.durable import write_bytes
from secateur.checkpoint.safetensors_file import read_tensors, save_tensors
from secateur.checkpoint.safetensors_header import read_header
from secateur.core.errors import ResumeError

__all__ = ["GradientStore", "Norm"]

Norm = Literal["l1", "l2"]
STATE = "gradients.json"
CHUNKS = "chunks"  # in each file: how many chunks its sums hold


class GradientStore:
    """Sums of |g| (`l1`) or g^2 (`l2`) over sequences, float32, for the matrices of every block.

    Each block file names the chunks of sequences it holds and is replaced whole, and a chunk counts once all
    blocks hold it. So a run killed at any moment finds out for every block what is missing.

    Attributes:
        folder: of this store alone.
        meta: norm, sequences, tokens, and loss (mean over sequences, nats a token) of what was collected.
    """

    def __init__(self, folder: Path, anatomy: Anatomy) -> None:
        self.folder, self.anatomy = folder, anatomy
        self._state: dict[str, Any] = {"identity": {}, "chunks": []}

    def begin(self, identity: Mapping[str, Any], *, write: bool) -> None:
        """Start, or go on with what a run of the same identity left.

        Raises:
            ResumeError: the folder holds gradients of something else; names what differs.
            OutputError: the folder cannot be written.
        """
        path = self.folder / STATE
        if path.exists():
            self._state = json.loads(path.read_text(encoding="utf-8"))
            _require_equal(self._state["identity"], identity, self.folder)
            return
        self._state = {"identity": dict(identity), "chunks": []}
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save()

    @property
    def chunks(self) -> int:
        """Chunks that all blocks hold."""
        return len(self._state["chunks"])

    @property
    def meta(self) -> dict[str, Any]:
        chunks = self._state["chunks"]
        sequences = sum(chunk["sequences"] for chunk in chunks)
        return {
            "norm": self._state["identity"].get("norm"),
            "sequences": sequences,
            "tokens": sum(chunk["tokens"] for chunk in chunks),
            "loss": sum(chunk["loss"] for chunk in chunks) / max(sequences, 1),
        }

    def holds(self, index: int, chunk: int) -> bool:
        """Whether the file of block `index` holds the sums of this chunk already."""
        path = self._path(index)
        return path.exists() and int(self._read(path, [CHUNKS])[CHUNKS]) > chunk

    def add(self, index: int, chunk: int, sums: Mapping[str, Tensor]) -> None:
        """Add the sums of a chunk, by parameter name, and replace the file."""
        path = self._path(index)
        before = self._read(path, sums) if chunk else {}
        total = {name: before[name].add_(part.cpu()) if chunk else part for name, part in sums.items()}
        save_tensors(path, {CHUNKS: torch.tensor(chunk + 1), **total})

    def close_chunk(self, sequences: float, tokens: float, loss: float, *, write: bool) -> None:
        """Record that all blocks hold the next chunk; `loss` is summed over its sequences."""
        self._state["chunks"].append({"sequences": int(sequences), "tokens": int(tokens), "loss": loss})
        if write:
            self._save()

    def load(self, index: int) -> dict[str, Tensor]:
        """By matrix name of block `index`: (out, in) float32, sum |g| or sqrt(sum g^2)."""
        block = self.anatomy.blocks[index]
        sums = self._read(self._path(index), {matrix.parameter for matrix in block.matrices})
        if self.meta["norm"] == "l2":
            sums = {name: tensor.sqrt_() for name, tensor in sums.items()}
        return {matrix.name: matrix.view(sums) for matrix in block.matrices}

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _read(self, path: Path, names: Iterable[str]) -> dict[str, Tensor]:
        header = read_header(path)
        return read_tensors(path, [header[name] for name in names])

    def _save(self) -> None:
        write_bytes(self.folder / STATE, json.dumps(self._state).encode())


def _require_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    differing = [
        f"{key} {found.get(key)!r} -> {wanted.get(key)!r}"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise ResumeError(
            f"the gradients in {folder} differ in {', '.join(differing)}",
            "gradients of the same run",
            "delete that folder, or use another one",
        )
