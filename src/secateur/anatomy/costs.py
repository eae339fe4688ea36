"""What a model costs to hold and to run, read off its anatomy."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from secateur.anatomy.model import Anatomy, Block, Matrix

__all__ = ["cached_values_per_token", "macs_per_token", "non_embedding_parameters"]

ACTIVE_KEYS = ("num_experts_per_tok", "moe_top_k", "top_k_experts")


def non_embedding_parameters(anatomy: Anatomy) -> int:
    """All parameters but those of the embedding and of an untied head."""
    ends = (f"{anatomy.embedding}.", f"{anatomy.head}.")
    left_out = (prod(shape) for name, shape in anatomy.outer.items() if name.startswith(ends))
    return anatomy.parameters - sum(left_out)


def macs_per_token(anatomy: Anatomy, config: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one token: the matrices of all blocks and the head.

    Of the experts of a layer those that one token goes through count. Attention over what is in the cache,
    which grows with the text, is left out.
    """
    head = anatomy.spaces.get("vocab", 0) * anatomy.spaces.get("hidden", 0)
    active = next((config[key] for key in ACTIVE_KEYS if config.get(key)), None)
    return head + sum(_block_macs(block, active) for block in anatomy.blocks)


def _block_macs(block: Block, active: int | None) -> int:
    plain = sum(matrix.size for matrix in block.matrices if matrix.expert is None)
    experts = [matrix for matrix in block.matrices if matrix.expert is not None]
    count = len({matrix.expert for matrix in experts}) or 1
    return plain + sum(matrix.size for matrix in experts) * min(active or count, count) // count


def cached_values_per_token(anatomy: Anatomy) -> int | None:
    """Numbers that the cache keeps of one token (keys and values of all blocks), or None where the anatomy
    does not show them."""
    found = [_cached(block) for block in anatomy.blocks]
    return None if None in found else sum(values or 0 for values in found)


def _cached(block: Block) -> int | None:
    shared = sum(_rows(matrix, "kv_heads") for matrix in block.matrices)
    if shared:
        return shared
    # heads of their own: a third of their rows are queries
    rows = sum(_rows(matrix, "heads") for matrix in block.matrices)
    read = [matrix.shape[1] for matrix in block.matrices if matrix.columns.segments[0].space == "heads"]
    return rows - read[0] if len(read) == 1 and rows == 3 * read[0] else None


def _rows(matrix: Matrix, space: str) -> int:
    return sum(segment.size for segment in matrix.rows.segments if segment.space == space)
