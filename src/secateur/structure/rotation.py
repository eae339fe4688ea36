"""Bases of the residual stream and blocks written in them (structured-baselines, section 2.2).

A basis is (d, d') float64 with orthonormal columns: entries of x @ basis are the coordinates that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.anatomy.model import Block
from secateur.anatomy.sliced import ATTENTION_SHORTCUT, FEED_FORWARD_SHORTCUT, writers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Bases", "lost_energy", "rotate_block", "turned"]


@dataclass(frozen=True)
class Bases:
    """Bases at the three places of a block: where it is entered, between its halves, and where it is left."""

    entering: Tensor
    between: Tensor
    leaving: Tensor


def turned(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Another basis of the same subspace, drawn evenly from all; it depends on the subspace and the generator
    alone, not on the signs and the order that an eigensolver happens to give."""
    import torch

    drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64).to(basis.device)
    rotation, upper = torch.linalg.qr(basis.T @ drawn)
    product: Tensor = basis @ (rotation * upper.diagonal().sign())
    return product


def lost_energy(covariance: Tensor, basis: Tensor) -> float:
    """The part of sum |x|^2 outside the basis: the tail of the eigenvalues, where it is principal."""
    whole = float(covariance.trace())
    kept = float(((covariance @ basis) * basis).sum())
    return max(0.0, 1 - kept / whole) if whole > 0 else 0.0


def rotate_block(
    block: Block, norms: Mapping[str, str], parameters: Mapping[str, Tensor], bases: Bases
) -> dict[str, Tensor]:
    """The tensors of a block that reads and writes in these bases, its norms folded into what reads them.

    Args:
        norms: the two norms and the module that reads each, attention first.
        parameters: in-memory tensors of the dense block.

    Returns:
        In-memory tensors of the new block, in the dtypes of the old.
    """
    places = {}
    steps = ((bases.entering, bases.between), (bases.between, bases.leaving))
    for (norm, half), (read, written) in zip(norms.items(), steps, strict=True):
        places[half] = parameters[f"{norm}.weight"].double()[:, None] * read, written
    out = set(writers(block))
    new = {name: tensor for name, tensor in parameters.items() if name.rpartition(".")[0] not in norms}
    for matrix in block.matrices:
        read, written = places[matrix.name.partition(".")[0]]
        weight = matrix.view(parameters).double()
        changed = written.T @ weight if matrix in out else weight @ read
        new[matrix.parameter] = changed.to(parameters[matrix.parameter].dtype)
        bias = f"{matrix.name}.bias"
        if matrix in out and bias in parameters:
            new[bias] = (written.T @ parameters[bias].double()).to(parameters[bias].dtype)
    dtype = parameters[block.matrices[0].parameter].dtype
    new[ATTENTION_SHORTCUT] = (bases.between.T @ bases.entering).to(dtype)
    new[FEED_FORWARD_SHORTCUT] = (bases.leaving.T @ bases.between).to(dtype)
    return new
