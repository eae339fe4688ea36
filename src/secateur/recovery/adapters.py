"""LoRA by peft, on the matrices that anatomy names, with a change that respects zeros."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur.anatomy.model import Anatomy, Block, Matrix
from secateur.recovery.student import Student, matrix_parameters

__all__ = ["AdaptedStudent"]

ADAPTER = "default"
"""The name of the only adapter."""


class AdaptedStudent(Student):
    """Linear layers with adapters; the weights under them are not trained.

    Args:
        ranks: a block.
        scale: of the change B A.
        dropout: of the inputs of the adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        ranks: Sequence[int],
        *,
        scale: float,
        dropout: float,
        keep_zeros: bool,
    ) -> None:
        super().__init__(model, anatomy, keep_zeros=keep_zeros)
        linear = {
            _module(block, matrix): (matrix, ranks[block.index])
            for block in anatomy.blocks
            for matrix in block.matrices
            if matrix.expert is None
        }
        _inject(model, linear, scale, dropout)
        self._layers: dict[str, Any] = {path: model.get_submodule(path) for path in linear}
        for path, layer in self._layers.items():
            self._prepare(path, layer, linear[path][0])
        self.training(False)

    def _prepare(self, path: str, layer: Any, matrix: Matrix) -> None:
        for side in ("lora_A", "lora_B"):
            weight = getattr(layer, side)[ADAPTER].float().weight
            self.parameters[f"{path}.{side}"] = weight.requires_grad_()
        weight = layer.base_layer.weight.detach()
        kept = (weight.T if matrix.transposed else weight) != 0
        if self.keep_zeros and not bool(kept.all()):
            vars(layer)["forward"] = partial(_masked_forward, layer, kept)

    def training(self, mode: bool) -> None:
        for layer in self._layers.values():
            layer.lora_dropout.train(mode)

    def _trained(self, block: Block, name: str, old: Tensor) -> Tensor | None:
        layer = self._layers.get(f"{block.prefix}.{name.removesuffix('.weight')}")
        if layer is None or not name.endswith(".weight"):
            return None
        change = _change(layer)
        change = (change.T if matrix_parameters(block)[name].transposed else change).to(old.device)
        return torch.where(change == 0, old.float(), old.float() + change)  # keeps the sign of a zero


def _module(block: Block, matrix: Matrix) -> str:
    return f"{block.prefix}.{matrix.parameter.removesuffix('.weight')}"


def _inject(
    model: PreTrainedModel, linear: dict[str, tuple[Matrix, int]], scale: float, dropout: float
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {path: rank for path, (_, rank) in linear.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        target_modules=list(linear),
        rank_pattern={re.escape(path): rank for path, rank in ranks.items()},
        alpha_pattern={re.escape(path): rank * scale for path, rank in ranks.items()},
        lora_dropout=dropout,
        fan_in_fan_out=any(matrix.transposed for matrix, _ in linear.values()),
    )
    inject_adapter_in_model(config, model, ADAPTER)
    model.requires_grad_(False)


def _change(layer: Any) -> Tensor:
    """(out, in) float32 of what an adapter adds to its matrix."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    change: Tensor = (up @ down) * layer.scaling[ADAPTER]
    return change


def _masked_forward(layer: Any, kept: Tensor, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer as it will be after merging: the change reaches only weights that are not zero."""
    output: Tensor = layer.base_layer(inputs, *args, **kwargs)
    change = _change(layer) * kept
    dropped = layer.lora_dropout[ADAPTER](inputs.to(change.dtype))
    return output + functional.linear(dropped, change).to(output.dtype)
