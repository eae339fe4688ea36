"""A model in training: what of it trains, which weights stay zero, and what it gives back block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from secateur.anatomy.model import Anatomy, Block, Matrix

__all__ = ["Student", "WholeStudent", "matrix_parameters"]


class Student(ABC):
    """What the trainer sees of a way to train.

    Attributes:
        model: called with token ids.
        parameters: float32, what the optimiser changes, by a name that a resumed run finds again.

    Args:
        model: in eval mode, changed in place.
        anatomy: of the model.
        keep_zeros: weights of matrices that are zero stay zero.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, *, keep_zeros: bool) -> None:
        self.model, self.anatomy, self.keep_zeros = model.requires_grad_(False), anatomy, keep_zeros
        self.parameters: dict[str, nn.Parameter] = {}

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        return [self.model.get_submodule(block.prefix) for block in self.anatomy.blocks]

    def save_memory(self) -> None:
        """Compute what happens inside a block again on the way back instead of keeping it."""
        for block in self.blocks:
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)

    def training(self, mode: bool) -> None:
        """Randomness on or off. The model's own dropout is never on."""
        return

    def mask_gradients(self) -> None:
        """Called between backward and the clipping of gradients."""
        return

    def merged(self, block: Block, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors after training, in the dtypes they have in the files.

        Args:
            stored: its tensors as they were read, by name inside the block.
        """
        with torch.no_grad():
            return {name: self._mended(block, name, tensor) for name, tensor in stored.items()}

    def _mended(self, block: Block, name: str, old: Tensor) -> Tensor:
        new = self._trained(block, name, old)
        if new is None:
            return old
        new = new.to("cpu", old.dtype)
        masked = self.keep_zeros and name in matrix_parameters(block)
        return torch.where(old == 0, old, new) if masked else new

    @abstractmethod
    def _trained(self, block: Block, name: str, old: Tensor) -> Tensor | None:
        """A tensor of a block after training, float32; `None` where nothing trained it."""


class WholeStudent(Student):
    """Every floating-point parameter of the blocks is trained itself."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, *, keep_zeros: bool) -> None:
        super().__init__(model, anatomy, keep_zeros=keep_zeros)
        self._kept: dict[str, Tensor] = {}
        for block, module in zip(anatomy.blocks, self.blocks, strict=True):
            matrices = matrix_parameters(block)
            for name, parameter in module.named_parameters():
                if not parameter.is_floating_point():
                    continue
                full = f"{block.prefix}.{name}"
                parameter.requires_grad_(True)
                self.parameters[full] = parameter
                if keep_zeros and name in matrices and bool((parameter == 0).any()):
                    self._kept[full] = parameter.detach() != 0

    def mask_gradients(self) -> None:
        """A weight at zero without a gradient has no moments and stays zero under AdamW."""
        for name, kept in self._kept.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.mul_(kept)

    def _trained(self, block: Block, name: str, old: Tensor) -> Tensor | None:
        parameter = self.parameters.get(f"{block.prefix}.{name}")
        return None if parameter is None else parameter.detach()


def matrix_parameters(block: Block) -> dict[str, Matrix]:
    """The parameters that matrices of a block lie in, with the first such matrix."""
    found: dict[str, Matrix] = {}
    for matrix in block.matrices:
        found.setdefault(matrix.parameter, matrix)
    return found
