"""SparseGPT's update as published, column by column: the slow reference that the fast one must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.pattern import Pattern


def published_factor(hessian: Tensor, damping: float) -> Tensor:
    """(C, C) upper factor U of the inverse, H^-1 = U^T U: Cholesky, inverse, Cholesky."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def published_sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float = 0.5,
    pattern: Pattern | None = None,
    blocksize: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, float]:
    """New weight (R, C) and sum of the losses (one-shot-baselines, section 2.4).

    `pattern` None is the published block-wise choice. The count is the exact one of the section
    (`floor(p * R * B)` a block), not the published `<= threshold`.
    """
    weight, columns = weight.clone(), weight.shape[1]
    upper = published_factor(hessian, damping)
    total = 0.0
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        block = weight[:, start:stop].clone()
        factor = upper[start:stop, start:stop]
        pruned = torch.zeros_like(block, dtype=torch.bool)
        errors, new = torch.zeros_like(block), torch.zeros_like(block)
        if pattern is None:
            scores = block**2 / factor.diagonal() ** 2
            order = scores.flatten().sort(stable=True).indices
            pruned.view(-1)[order[: int(sparsity * block.numel() + 1e-6)]] = True
        for i in range(stop - start):
            if pattern is not None and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                scores = block[:, group] ** 2 / factor.diagonal()[group] ** 2
                lowest = scores.sort(dim=1, stable=True).indices[:, : pattern.of - pattern.keep]
                pruned.scatter_(1, i + lowest, True)
            column = block[:, i].clone()
            column[pruned[:, i]] = 0
            error = (block[:, i] - column) / factor[i, i]
            block[:, i:] -= torch.outer(error, factor[i, i:])
            new[:, i], errors[:, i] = column, error
            total += float((error**2).sum()) / 2
        weight[:, start:stop] = new
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight, total
