"""The configuration of a model without some of its blocks, and without parts of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.anatomy.model import Anatomy
from secateur.anatomy.parts import Parts, belongs_to
from secateur.anatomy.resized import own_class
from secateur.anatomy.resolve import resolve_config
from secateur.core.errors import AnatomyError

__all__ = ["shorter_config"]

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
OWN, SKIP = "per_layer_config", "skip"


def shorter_config(
    config: Mapping[str, Any],
    anatomy: Anatomy,
    kept: Sequence[int],
    skips: Mapping[int, Sequence[str]],
    parts: Parts,
) -> tuple[dict[str, Any], Anatomy]:
    """Keys of config.json to replace or add, and the anatomy of the model that is then built.

    Args:
        config: the content of config.json.
        anatomy: of the model before the cut.
        kept: blocks that stay, in order.
        skips: by block, the parts that it loses (by its old number).
        parts: of the blocks.

    Raises:
        AnatomyError: a config without the number of blocks, or blocks that change with their place.
    """
    updates = _fewer(config, len(anatomy.blocks), kept)
    if skips:
        own = dict(updates.get(OWN, {}))
        for new, old in enumerate(kept):
            if lost := skips.get(old):
                block = own.get(str(new), {})
                own[str(new)] = {**block, SKIP: sorted({*block.get(SKIP, ()), *lost})}
        updates |= {**own_class(config), OWN: own, "block_parts": {part: dict(parts[part]) for part in parts}}
    made = resolve_config({**config, **updates})
    expected = [_left(anatomy, old, skips.get(old, ()), parts) for old in kept]
    if [block.parameters for block in made.blocks] != expected:
        raise AnatomyError(
            f"blocks of {anatomy.family!r} change with their place",
            "blocks that are built alike wherever they stand",
            "remove channels instead: flap",
        )
    return updates, made


def _fewer(config: Mapping[str, Any], count: int, kept: Sequence[int]) -> dict[str, Any]:
    """Keys that change with the number of blocks: it, and every list with an entry a block."""
    if len(kept) == count:
        return {OWN: config[OWN]} if OWN in config else {}
    key = next((name for name in LAYER_KEYS if name in config), None)
    if key is None:
        raise AnatomyError("a config that does not say how many blocks there are", "num_hidden_layers")
    updates: dict[str, Any] = {key: len(kept)}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and not name.endswith("token_id"):
            updates[name] = [value[index] for index in kept]
    if OWN in config:
        own = config[OWN]
        updates[OWN] = {str(new): own[str(old)] for new, old in enumerate(kept) if str(old) in own}
    return updates


def _left(anatomy: Anatomy, index: int, lost: Sequence[str], parts: Parts) -> dict[str, tuple[int, ...]]:
    """Shapes of what a block keeps."""
    modules = [module for part in lost for module in parts[part]]
    shapes = anatomy.blocks[index].parameters.items()
    return {name: shape for name, shape in shapes if not belongs_to(name, modules)}
