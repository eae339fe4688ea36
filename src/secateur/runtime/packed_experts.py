"""Routed experts whose weights stay packed in memory; those that are visited are multiplied one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.layout import FileLayout, Piece
from secateur.anatomy.mixture import Mixture
from secateur.anatomy.model import Block
from secateur.checkpoint.reader import Checkpoint
from secateur.runtime.packed_linear import PackedLinear
from secateur.storage.formats import Packed
from secateur.storage.low_bit import LowBitStack, packed_matrices, rows_together

__all__ = ["PackedExperts", "packed_experts"]


class PackedExperts(nn.Module):
    """Takes the place of a module of fused experts, gated or not, with or without biases.

    A route behind the last expert is left out.

    Attributes:
        experts: the stock module, for its activation and biases; its matrices are stand-ins without elements.
        first, second: the matrices of each expert; one that is stored in parts has them in order of its rows.

    Args:
        experts: the stock module.
        first, second: by expert, the packed tensors of the matrix that multiplies its input, and of the one
            that multiplies its activation.
        like: a tensor on the device and of the dtype to compute in.
        biases: names of (n, outputs) parameters of the stock module that are added to the two products.
    """

    def __init__(
        self,
        experts: nn.Module,
        first: Sequence[Sequence[Packed]],
        second: Sequence[Sequence[Packed]],
        like: Tensor,
        biases: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.experts: Any = experts
        self.first, self.second = _matrices(first, like), _matrices(second, like)
        self._biases = tuple(biases)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights as they are kept."""
        return sum(one.packed_bytes for one in self.modules() if isinstance(one, PackedLinear))

    def forward(self, hidden_states: Tensor, routes: Tensor, gates: Tensor) -> Tensor:
        """(tokens, d) of (tokens, d) hidden states, (tokens, k) routes and their weights."""
        output = torch.zeros_like(hidden_states)
        visits = torch.bincount(routes.flatten(), minlength=len(self.first)).tolist()
        for expert in range(len(self.first)):
            if visits[expert]:
                tokens, slots = torch.where(routes == expert)
                own = self._expert(expert, hidden_states[tokens]) * gates[tokens, slots, None]
                output.index_add_(0, tokens, own.to(output.dtype))
        return output

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        added = [getattr(self.experts, name)[expert] for name in self._biases] or [None, None]
        product = _product(self.first[expert], rows, added[0])
        gated = getattr(self.experts, "has_gate", True)
        activated = self.experts._apply_gate(product) if gated else self.experts.act_fn(product)
        return _product(self.second[expert], activated, added[1])


def packed_experts(
    checkpoint: Checkpoint,
    layout: FileLayout,
    block: Block,
    mixture: Mixture,
    module: nn.Module,
    like: Tensor,
) -> PackedExperts | None:
    """The experts of a block, packed; `None` where some of their tensors are not.

    Args:
        checkpoint, layout: where they are stored.
        block, mixture: what they are.
        module: the stock module, whose matrices are stand-ins.
        like: a tensor on the device and of the dtype to compute in.
    """
    order = sorted(mixture.stacks, key=lambda matrix: block.sites[matrix.input].kind != "experts_input")
    pieces = [layout.pieces(block.index, matrix.parameter) for matrix in order]
    every = [piece for own in pieces for piece in own]
    whole = all(_of_experts(piece, checkpoint.formats.get(piece.name)) for piece in every)
    biases = [f"{matrix.parameter.rpartition('.')[2]}_bias" for matrix in order]
    present = [name for name in biases if hasattr(module, name)]
    if not whole or len(pieces) != 2 or present not in ([], biases):
        return None
    if len(list(module.parameters())) != 2 + len(present):
        return None
    first, second = (_by_expert(checkpoint, own, mixture.count) for own in pieces)
    return PackedExperts(module, first, second, like, present)


def _of_experts(piece: Piece, format: str | None) -> bool:
    """Whether a tensor is packed by itself for each expert: of one of them, or of all in one."""
    return format == LowBitStack.id if piece.expert is None else format is not None


def _by_expert(checkpoint: Checkpoint, pieces: Sequence[Piece], count: int) -> list[list[Packed]]:
    """The packed tensors of each expert in the order of their rows."""
    found: list[list[Packed]] = [[] for _ in range(count)]
    for piece in sorted(pieces, key=lambda piece: piece.rows or (0, 0)):
        packed = checkpoint.read_packed(piece.name)
        if piece.expert is not None:
            found[piece.expert].append(packed)
            continue
        for own, matrix in zip(found, packed_matrices(packed), strict=True):
            own.append(matrix)
    return found


def _matrices(packed: Sequence[Sequence[Packed]], like: Tensor) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleList(PackedLinear(one, like) for one in rows_together(several)) for several in packed
    )


def _product(pieces: nn.Module, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Of (tokens, inputs) with a matrix that is stored in these parts."""
    parts = [piece(rows) for piece in pieces.children()]
    found: Tensor = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return found if bias is None else found + bias
