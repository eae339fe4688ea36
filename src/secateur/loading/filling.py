"""Packed weights of a folder, put into a model that has stand-ins in their places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.anatomy.layout import FileLayout
from secateur.anatomy.mixture import mixture_of
from secateur.anatomy.resolve import resolve
from secateur.checkpoint.reader import Checkpoint
from secateur.runtime import products  # noqa: F401  (what computes from packed weights)
from secateur.runtime.packed_experts import PackedExperts, packed_experts
from secateur.runtime.packed_linear import PackedLinear
from secateur.storage.nm import GroupsInColumns

__all__ = ["Filling"]


@dataclass(frozen=True)
class _Place:
    """A parameter of the model with packed tensors: `block` is None outside the blocks."""

    name: str
    files: list[str]
    block: int | None
    own: str
    tied: bool = False


class Filling:
    """What of a model comes from packed tensors.

    Args:
        folder: a checkpoint with packed tensors.
        config: of the model.

    Raises:
        CheckpointError, AnatomyError: files that are damaged, or do not fit the model.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self.checkpoint, self._config = Checkpoint.open(folder), config

    @cached_property
    def _layout(self) -> FileLayout:
        return FileLayout(self._anatomy, self.checkpoint.shapes)

    @cached_property
    def _anatomy(self) -> Any:
        return resolve(self._config)

    @cached_property
    def places(self) -> dict[str, _Place]:
        """By full name in the causal language model."""
        return {place.name: place for place in self._places()}

    def _places(self) -> Iterator[_Place]:
        anatomy, layout, packed = self._anatomy, self._layout, self.checkpoint.formats
        for block in anatomy.blocks:
            for own in block.parameters:
                files = layout.files_of(block.index, own)
                if any(file in packed for file in files):
                    yield _Place(f"{block.prefix}.{own}", files, block.index, own)
        shared = anatomy.tied.keys() | anatomy.tied.values()
        for name, files in layout.outer_files().items():
            if any(file in packed for file in files):
                yield _Place(name, files, None, name, tied=name in shared)

    def place_of(self, parameter: str) -> _Place | None:
        """The place of a parameter by its name in the model, which may lack the prefix of the base model."""
        found = self.places.get(parameter)
        return found or self.places.get(f"{self._anatomy.base_prefix}.{parameter}")

    def fill(self, model: nn.Module, *, keep_packed: bool) -> None:
        """Replace all stand-ins of a model, one after the other.

        Args:
            keep_packed: let linear layers and routed experts keep their weights packed; what is neither, is
                tied or, in a linear layer, is made of several tensors is unpacked, and so is what is stored
                transposed in another format than `nm-columns`.
        """
        for name, parameter in list(model.named_parameters()):
            place = self.place_of(name)
            if place is None or parameter.numel() or parameter.shape[-1:] != (0,):
                continue
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            if isinstance(module, PackedExperts):
                continue
            if keep_packed and (experts := self._experts(place, module, parameter)):
                model.set_submodule(path, experts)
            elif keep_packed and (linear := self._linear(place, module, parameter)):
                model.set_submodule(path, linear)
            else:
                parameter.data = self._unpacked(place).to(parameter.device, parameter.dtype)

    def _experts(self, place: _Place, module: nn.Module, like: nn.Parameter) -> PackedExperts | None:
        """What keeps the routed experts of a block packed, if this is a parameter of theirs."""
        if place.block is None:
            return None
        block = self._anatomy.blocks[place.block]
        mixture = mixture_of(block)
        if mixture is None or place.own not in {matrix.parameter for matrix in mixture.stacks}:
            return None
        return packed_experts(self.checkpoint, self._layout, block, mixture, module, like)

    def _linear(self, place: _Place, module: nn.Module, like: nn.Parameter) -> PackedLinear | None:
        """What takes the place of a linear layer, if this is one and its weight can stay packed."""
        file, lying = place.files[0], type(module) is Conv1D
        if place.tied or len(place.files) != 1 or not (lying or type(module) is nn.Linear):
            return None
        if lying and self.checkpoint.formats[file] != GroupsInColumns.id:
            return None
        packed = self.checkpoint.read_packed(file)
        bias = next((own for name, own in module.named_parameters() if name == "bias"), None)
        return PackedLinear(GroupsInColumns.swapped(packed) if lying else packed, like, bias)

    def _unpacked(self, place: _Place) -> Tensor:
        stored = self.checkpoint.read(place.files)
        if place.block is None:
            return self._layout.assemble_outer(stored)[place.own]
        return self._layout.assemble_one(place.block, place.own, stored)
