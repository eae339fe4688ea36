"""Where blocks come from: one at a time out of a checkpoint folder, or out of a model in memory."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from secateur.anatomy.layout import FileLayout
from secateur.anatomy.model import Anatomy
from secateur.anatomy.resolve import build_skeleton, resolve
from secateur.anatomy.skeleton import load_tensors, unload_tensors
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.safetensors_file import torch_dtype

__all__ = ["BlockSource", "FolderSource", "MemorySource"]


class BlockSource(Protocol):
    """A stream of the blocks of one model.

    Attributes:
        anatomy: what the model is made of.
        config: of the model.
        model: the model around the blocks, in eval mode, what is outside of them loaded on `device`.
        trunk: the same where no logits are wanted yet: a head of its own may not be loaded.
        device, dtype: where and in what the model computes.
    """

    @property
    def anatomy(self) -> Anatomy: ...
    @property
    def config(self) -> Any: ...
    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def trunk(self) -> PreTrainedModel: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def open(self, index: int) -> nn.Module:
        """Block `index` of `model` with its parameters on `device`."""

    def store(self, index: int, module: nn.Module) -> None:
        """Take the block back, changed or not; its memory may be freed."""

    def release(self) -> None:
        """Free what stands outside the blocks; it is loaded again when next asked for."""

    def in_dtype(self, dtype: torch.dtype) -> BlockSource:
        """The same blocks, computing in another dtype."""


class SkeletonSource(ABC):
    """A model without weights whose blocks are filled when opened and emptied when stored.

    What stands outside the blocks is loaded when `model` is first asked for; tied weights once.
    """

    def __init__(self, config: Any, device: torch.device | str, dtype: torch.dtype) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self._skeleton = build_skeleton(config, dtype)
        self.anatomy = resolve(config, self._skeleton)
        self._blocks: Any = self._skeleton.get_submodule(self.anatomy.blocks_path)
        self._outer_parts: dict[bool, dict[str, Tensor]] = {}
        _move_real_buffers(self._skeleton, self.device)

    @cached_property
    def trunk(self) -> PreTrainedModel:
        load_tensors(self._skeleton, self.outer(head=False))
        return self._skeleton

    @cached_property
    def model(self) -> PreTrainedModel:
        load_tensors(self.trunk, self.outer(head=True))
        return self._skeleton

    def release(self) -> None:
        """Free what stands outside the blocks; it is loaded again when next asked for."""
        for part in self._outer_parts.values():
            load_tensors(self._skeleton, {name: tensor.to("meta") for name, tensor in part.items()})
        self._outer_parts.clear()
        for loaded in ("trunk", "model"):
            vars(self).pop(loaded, None)
        _return_free_memory()

    def outer(self, *, head: bool) -> dict[str, Tensor]:
        """A head that is not tied, or everything else outside the blocks, on `device` and in `dtype`."""
        if head not in self._outer_parts:
            self._outer_parts[head] = self._placed(self._outer_tensors(head), "")
        return self._outer_parts[head]

    def open(self, index: int) -> nn.Module:
        """Block `index` with its parameters on `device`; nothing requires a gradient."""
        module: nn.Module = self._blocks[index]
        prefix = self.anatomy.blocks[index].prefix + "."
        tensors = self._block_tensors(index)
        _return_free_memory()  # what they were assembled from
        load_tensors(module, self._placed(tensors, prefix))
        return module

    def store(self, index: int, module: nn.Module) -> None:
        """Drop the parameters of a block, after `_save` had them."""
        self._save(index, module)
        unload_tensors(module)
        _return_free_memory()

    @abstractmethod
    def _outer_tensors(self, head: bool) -> dict[str, Tensor]:
        """What `outer` is made of, by full name; tied parameters are one tensor."""

    @abstractmethod
    def _block_tensors(self, index: int) -> dict[str, Tensor]:
        """Parameters and persistent buffers of a block by their name inside it."""

    def _save(self, index: int, module: nn.Module) -> None:
        return

    def _placed(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The tensors on `device` and in `dtype`; one tensor under two names stays one."""
        copies: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(self.device, self._dtype_of(prefix + name, tensor))
        return {name: copies[id(tensor)] for name, tensor in tensors.items()}

    def _dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """`dtype`, except for integers and for what the model class always keeps in float32."""
        if not tensor.is_floating_point():
            return tensor.dtype
        kept = self._skeleton._keep_in_fp32_modules_strict or ()
        return torch.float32 if any(part in name for part in kept) else self.dtype


class FolderSource(SkeletonSource):
    """Blocks of a checkpoint folder, read when opened and forgotten when stored; the folder never changes.

    Args:
        checkpoint: opened folder.
        device: where to compute.
        dtype: to compute in; by default float32 on the CPU and the dtype of the files elsewhere.
        read: may give the tensors of block `i` by their names on disk instead of the folder (a block that
            was pruned already), or `None`.
        outer_of: a source of the same folder whose embeddings, norm and head serve here too, so that they
            are in memory once.

    Raises:
        AnatomyError: a model that is not known.
        CheckpointError: files that do not fit the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        read: Callable[[int], Mapping[str, Tensor] | None] | None = None,
        outer_of: FolderSource | None = None,
    ) -> None:
        self.checkpoint, self._read, self._outer_of = checkpoint, read, outer_of
        stored = next(info.dtype for info in checkpoint.tensors.values() if info.is_floating_point)
        config = AutoConfig.from_pretrained(checkpoint.folder)
        super().__init__(config, device, dtype or _default_dtype(torch.device(device), torch_dtype(stored)))
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        self.layout = FileLayout(self.anatomy, shapes)

    def in_dtype(self, dtype: torch.dtype) -> FolderSource:
        if dtype == self.dtype:
            return self
        return FolderSource(self.checkpoint, device=self.device, dtype=dtype, read=self._read)

    def release(self) -> None:
        super().release()
        if self._outer_of is not None:
            self._outer_of.release()

    def _outer_tensors(self, head: bool) -> dict[str, Tensor]:
        if self._outer_of is not None:
            return self._outer_of.outer(head=head)
        own = self.layout.head_names()
        names = own if head else [name for name in self.layout.outer_names() if name not in own]
        return self.layout.assemble_outer(self.checkpoint.read(names))

    def _block_tensors(self, index: int) -> dict[str, Tensor]:
        tensors = self._read(index) if self._read else None
        if tensors is None:
            tensors = self.checkpoint.read(self.layout.block_names(index))
        return self.layout.assemble(index, tensors)


class MemorySource(SkeletonSource):
    """Blocks of a model in memory: those that are stored change the model.

    Where device and dtype are the model's own, weights are shared and not copied.

    Args:
        model: a causal language model; its mode and configuration are left alone.
        device: where to compute; by default where the model is.
        dtype: to compute in; by default float32 on the CPU and the model's own elsewhere.

    Raises:
        AnatomyError: a model that is not known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._whole = model
        device = torch.device(device) if device is not None else model.device
        super().__init__(model.config, device, dtype or _default_dtype(device, model.dtype))
        self._own_blocks: Any = model.get_submodule(self.anatomy.blocks_path)

    def in_dtype(self, dtype: torch.dtype) -> MemorySource:
        return self if dtype == self.dtype else MemorySource(self._whole, device=self.device, dtype=dtype)

    def _outer_tensors(self, head: bool) -> dict[str, Tensor]:
        if head:  # weights that are in memory anyway come all at once
            return {}
        tensors = self._whole.state_dict(keep_vars=True)
        return {name: tensors[name] for name in (*self.anatomy.outer, *self.anatomy.tied)}

    def _block_tensors(self, index: int) -> dict[str, Tensor]:
        return dict(self._own_blocks[index].state_dict(keep_vars=True))

    def _save(self, index: int, module: nn.Module) -> None:
        own = self._own_blocks[index].state_dict()
        for name, tensor in module.state_dict().items():
            if tensor.data_ptr() != own[name].data_ptr():
                own[name].copy_(tensor)


def _return_free_memory() -> None:
    """Hand freed memory back to the system: blocks come and go in sizes that fragment glibc's heap, which
    would grow from block to block."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None  # another C library


def _default_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else stored


def _move_real_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers the model computes for itself go to the device; those of the files come with their block."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
