"""A model loaded in the way in which it is fastest here: weights stay packed where a kernel takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from secateur.pipeline.opened import Opened
from secateur.runtime.facts import computes_from, has_own_kernel, kernel_of, no_kernel, weight_bytes

__all__ = ["UNPACKED", "Loaded", "load_fastest", "why_unpacked"]

UNPACKED = "most of them are stored transposed in another format than nm"
"""Weights from which nothing computes, whatever the kernel takes."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        words: how it was loaded: `dense`, or `packed` with what computes, or `dense` with why not packed.
        weight_bytes: memory of its parameters and buffers.
    """

    model: PreTrainedModel
    words: str
    weight_bytes: int


def load_fastest(opened: Opened, dtype: torch.dtype, device: torch.device) -> Loaded:
    """Keep weights packed where the kernel computes from most of them, else unpack them while loading."""
    reason = why_unpacked(opened, dtype, device)
    model = opened.load(dtype, device, packed=reason is None)
    words = f"packed ({kernel_of(model)})" if reason is None else "dense"
    return Loaded(model, f"dense ({reason})" if reason else words, weight_bytes(model))


def why_unpacked(opened: Opened, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why weights are better not kept packed: None where they are, empty where none of them is packed."""
    tensors, unpacked = opened.checkpoint.tensors, _unpacked(opened)
    packed = [tensors[name] for name in opened.checkpoint.formats]
    if not packed:
        return ""
    half = sum(info.numel for info in packed) / 2
    if sum(info.numel for info in packed if has_own_kernel(info.format)) > half:
        return None
    taken = [info for info in packed if computes_from(info, dtype)]
    if reason := no_kernel(device, taken=sum(info.numel for info in taken) > half):
        return reason
    return None if sum(info.numel for info in taken if info.name not in unpacked) > half else UNPACKED


def _unpacked(opened: Opened) -> set[str]:
    """Names on disk of matrices that are stored transposed and packed as they lie."""
    formats, names = opened.checkpoint.formats, set[str]()
    for block in opened.anatomy.blocks:
        for matrix in block.matrices:
            files = opened.layout.files_of(block.index, matrix.parameter)
            if matrix.transposed:
                names.update(name for name in files if formats.get(name) != "nm-columns")
    return names
