"""Bases of the residual stream and blocks written in them (structured-baselines, section 2.2).

A basis is (d, d') float64 with orthonormal columns: entries of x @ basis are the coordinates that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from secateur.anatomy.model import Block, Matrix
from secateur.anatomy.sliced import shortcuts_of
from secateur.anatomy.stream import Stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["lost_energy", "rotate_block", "turned", "written_in"]


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
    block: Block, stream: Stream, parameters: Mapping[str, Tensor], bases: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The tensors of a block that reads and writes in these bases, its norms folded into what reads them:
    their weights into matrices, their biases into biases. Where norms subtract the mean, nothing writes one
    any more, so that they come down to root mean squares.

    Args:
        parameters: in-memory tensors of the dense block.
        bases: where the block is entered, after each of its steps, and so where it is left.

    Returns:
        In-memory tensors of the new block, in the dtypes of the old.
    """
    norms, like = set(stream.norms), parameters[block.matrices[0].parameter]
    new = {name: tensor for name, tensor in parameters.items() if name.rpartition(".")[0] not in norms}
    for matrix in stream.readers(block):
        weight, norm, bias = matrix.view(parameters).double(), stream.norm(matrix), f"{matrix.name}.bias"
        if f"{norm}.bias" in parameters:
            added = weight @ parameters[f"{norm}.bias"].double()
            new[bias] = (parameters[bias].double() + added if bias in parameters else added).to(like.dtype)
        if f"{norm}.weight" in parameters:
            weight = weight * parameters[f"{norm}.weight"].double()
        new[matrix.parameter] = _stored(matrix, weight @ bases[stream.step(matrix)], like)
    for matrix in stream.writers(block):
        written, bias = written_in(bases[stream.step(matrix) + 1], stream.centred), f"{matrix.name}.bias"
        new[matrix.parameter] = _stored(matrix, written.T @ matrix.view(parameters).double(), like)
        if bias in parameters:
            new[bias] = (written.T @ parameters[bias].double()).to(like.dtype)
    for number, name in enumerate(shortcuts_of(len(stream.steps))):
        new[name] = (bases[number + 1].T @ bases[number]).to(like.dtype)
    return new


def written_in(basis: Tensor, centred: bool) -> Tensor:
    """The basis for what writes: without the mean over the entries, if the norms that read would drop it."""
    return basis - basis.mean(0) if centred else basis


def _stored(matrix: Matrix, weight: Tensor, like: Tensor) -> Tensor:
    return (weight.T if matrix.transposed else weight).to(like.dtype).contiguous()
