"""The configuration of a model that was cut: the stock one where all blocks are alike, else sizes a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.anatomy.look import look_at
from secateur.anatomy.model import Anatomy, Shape
from secateur.anatomy.skeleton import build_meta
from secateur.anatomy.sliced import OUTPUT_KEY
from secateur.core.errors import AnatomyError
from secateur.loading import MODEL_TYPE, REMOTE_CODE

__all__ = ["is_stock", "resized_config"]

Sizes = Mapping[str, int]
"""By space, its size in one block."""


def resized_config(
    config: Mapping[str, Any],
    anatomy: Anatomy,
    sizes: Sequence[Sizes],
    shapes: Sequence[Mapping[str, Shape]],
    biases: Sequence[str] = (),
    whole: Sizes | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keys of config.json to replace or add, checked against the model that is then built.

    Args:
        config: the content of config.json.
        anatomy: of the model before the cut.
        sizes: of the spaces that were cut, a block.
        shapes: of all tensors after the cut, a block.
        biases: matrices that get a bias they did not have.
        extra: further keys, which the loading code alone understands.
        whole: sizes of spaces that are cut in the whole model alike, inside the blocks and outside.

    Raises:
        AnatomyError: the model classes of this family cannot have these sizes.
    """
    known, keys = config.get("per_layer_config", {}), {"output": OUTPUT_KEY, **anatomy.keys}
    own = [
        {**known.get(str(index), {}), **{keys[space]: size for space, size in block.items()}}
        for index, block in enumerate(sizes)
    ]
    fixed = {"head_dim": anatomy.spaces["head_dim"]} if "head_dim" in anatomy.spaces else {}
    fixed |= {anatomy.keys[space]: size for space, size in (whole or {}).items()}
    stock: dict[str, Any] = {**fixed, **own[0]}
    alike = all(block == own[0] for block in own) and not biases and not extra and is_stock(config)
    if alike and _gives({**config, **stock}, anatomy, shapes):
        return stock
    updates = {
        **fixed,
        "model_type": MODEL_TYPE,
        "base_model_type": config.get("base_model_type", config["model_type"]),
        "architectures": ["SecateurForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{REMOTE_CODE.removesuffix('.py')}.SecateurConfig",
            "AutoModelForCausalLM": f"{REMOTE_CODE.removesuffix('.py')}.SecateurForCausalLM",
        },
        "per_layer_config": {str(index): block for index, block in enumerate(own)},
        "block_biases": list(dict.fromkeys([*config.get("block_biases", ()), *biases])),
        **(extra or {}),
    }
    if not _gives({**config, **updates}, anatomy, shapes):
        cut = ", ".join(sorted({space for block in sizes for space in block}))
        raise AnatomyError(
            f"{anatomy.family!r} derives the shapes of its blocks from other sizes than {cut}",
            "a family whose attention has a head_dim of its own",
            "remove feed-forward channels only: -O targets=ffn",
        )
    return updates


def is_stock(config: Mapping[str, Any]) -> bool:
    """Whether transformers loads a model of this configuration with a class of its own."""
    return config.get("model_type") != MODEL_TYPE


def _gives(config: Mapping[str, Any], anatomy: Anatomy, shapes: Sequence[Mapping[str, Shape]]) -> bool:
    """Whether the model of this configuration has blocks of these shapes."""
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        seen = look_at(build_meta(made), anatomy.blocks_path).shapes
    except (AnatomyError, StrictDataclassError, ValueError, TypeError):
        return False
    return [dict(block) for block in shapes] == seen
