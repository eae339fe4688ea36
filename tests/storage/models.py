"""Tiny checkpoints with many zeros, dense and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from torch import Tensor

import secateur

IDS = torch.arange(24)[None]


def save_sparse(family: str, folder: Path, **changes: Any) -> Path:
    """Several shards; seven of ten weights of every matrix but the embeddings are zero."""
    save_tiny(family, folder, max_shard_size="100KB", **changes)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim > 1 and "embed" not in name and "wte" not in name:
                tensor.masked_fill_(torch.rand(tensor.shape, generator=generator) < 0.7, 0)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def save_packed(model: Path, folder: Path, format: str = "bitmask") -> Path:
    facts = secateur.export(model, folder, format=format)
    assert facts["tensors_packed"] > 0
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    """Everything in the files of a folder, read by the stock library."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
