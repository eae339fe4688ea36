"""Blocks of one size for engines that know no other: what was cut away comes back as zeros.

(structured-baselines, section 8: any runtime of the family loads it, without a gain in speed.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.anatomy.model import Anatomy
from secateur.anatomy.resized import is_stock
from secateur.anatomy.resolve import resolve_config
from secateur.anatomy.sliced import FLAG
from secateur.core.errors import AnatomyError, ExportError
from secateur.formats.fit import SLICED
from secateur.loading import HEAD_SIZE, OWN_HEADS

__all__ = ["ADDED", "uniform"]

ADDED = ("auto_map", "base_model_type", "per_layer_config", "block_biases", OWN_HEADS, HEAD_SIZE)
"""Keys of models whose blocks differ, which a stock model does not have."""
FLAGS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
"""What gives a stock class biases in one part of its blocks, where it has such a key."""


def uniform(config: Mapping[str, Any], anatomy: Anatomy) -> tuple[dict[str, Any], Anatomy]:
    """Configuration and anatomy of the stock model in which every block is as large as the largest.

    Args:
        config: the content of config.json.
        anatomy: of the model that it describes.

    Raises:
        ExportError: a model that is stock already, or one that no stock class can hold.
    """
    if is_stock(config):
        raise ExportError(
            f"a model of type {config.get('model_type')!r}, whose blocks are uniform already",
            "one with sizes of its own in each block",
            "use the folder as it is",
        )
    if config.get(FLAG):
        raise ExportError("a sliced model", "blocks of one basis, which zeros can widen", SLICED)
    family, own = config["base_model_type"], config.get("per_layer_config", {}).values()
    changed = {key for block in own for key in block if key in anatomy.keys.values()}
    if OWN_HEADS in config:  # all heads, or they would be wider
        changed -= {*config[OWN_HEADS]["count"]}
    sizes = {key: max(block.get(key, config.get(key, 0)) for block in own) for key in changed}
    kept = {key: value for key, value in config.items() if key not in ADDED}
    plain = {**kept, **sizes, "model_type": family, "architectures": [_class_name(family)]}
    plain |= {FLAGS[part]: True for part in _biased(config) if part in FLAGS}
    try:
        stock = resolve_config(plain)
    except (AnatomyError, ValueError) as error:
        raise ExportError(f"no stock {family!r} of these sizes ({error})") from error
    _require_room(anatomy, stock, family)
    return plain, stock


def _biased(config: Mapping[str, Any]) -> set[str]:
    return {name.partition(".")[0] for name in config.get("block_biases", ())}


def _class_name(family: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return str(name if isinstance(name, str) else name[0])


def _require_room(anatomy: Anatomy, stock: Anatomy, family: str) -> None:
    """Raise `ExportError` unless every tensor fits into the stock model."""
    for block, room in zip(anatomy.blocks, stock.blocks, strict=True):
        for name, shape in block.parameters.items():
            wide = room.parameters.get(name)
            if wide is None:
                raise ExportError(
                    f"{block.prefix}.{name}, which the stock class of {family!r} does not have",
                    "a model without added biases",
                    "prune with -O compensate=none or least_squares, or export to gguf",
                )
            if any(a > b for a, b in zip(shape, wide, strict=True)):
                raise ExportError(
                    f"{block.prefix}.{name} of {shape}", f"at most {wide} in a stock {family!r}"
                )
