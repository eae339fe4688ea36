"""How much attention every token receives from those after it, without a matrix of all pairs in memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_received"]

CHUNK = 128
"""Queries at a time."""


def attention_received(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    real: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mean over heads and over the queries that can see a key of the attention that it gets: column sums of
    the attention matrix (mc-moe, sections 2.5 and 5.1).

    Args:
        query: (B, H, Q, D), the last Q positions.
        key: (B, G, K, D), each for H / G heads.
        scaling: of the products.
        mask: (B or 1, 1 or H, Q, K): bool, true where a key is seen, or what is added to the products; None:
            each query sees all keys up to its own position.
        real: (B, Q) bool, the queries that count; by default all.
        sinks: (H,) products that take part in the softmax and belong to no key.

    Returns:
        (B, K) float32; zero where no query sees a key.
    """
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    grouped = query.view(batch, groups, heads // groups, queries, width)
    received = torch.zeros(batch, keys, device=query.device)
    watching = torch.zeros_like(received)
    for start in range(0, queries, CHUNK):
        part = slice(start, min(start + CHUNK, queries))
        products = (grouped[:, :, :, part] @ key[:, :, None].mT).float().mul_(scaling)
        products = products.view(batch, heads, -1, keys)
        seen = _seen(mask, part, queries, keys, query.device)
        products += (
            seen
            if seen.is_floating_point()
            else torch.zeros_like(seen, dtype=torch.float32).masked_fill_(~seen, -torch.inf)
        )
        weights = _softmax(products, sinks)
        visible = (seen > torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() else seen)[:, :1]
        counted = visible.expand(batch, 1, -1, keys)
        if real is not None:
            counted = counted & real[:, None, part, None]
        received += (weights.mean(1) * counted[:, 0]).sum(1)
        watching += counted[:, 0].sum(1)
    return received / watching.clamp_min(1)


def _seen(mask: Tensor | None, part: slice, queries: int, keys: int, device: torch.device) -> Tensor:
    if mask is not None:
        return mask[:, :, part, :keys]
    places = torch.arange(keys - queries + part.start, keys - queries + part.stop, device=device)
    return (torch.arange(keys, device=device) <= places[:, None])[None, None]


def _softmax(products: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the keys; a query that sees none, such as padding, gives nothing."""
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*products.shape[:3], 1)
        return torch.cat([products, column], dim=-1).softmax(-1)[..., :-1]
    return products.softmax(-1).nan_to_num(0.0)
