"""The configuration of a model that was cut: the stock one where all blocks are alike, else sizes a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.anatomy.family import listed, load_family
from secateur.anatomy.look import look_at
from secateur.anatomy.model import Anatomy, Shape
from secateur.anatomy.skeleton import build_meta
from secateur.anatomy.sliced import OUTPUT_KEY, STREAM_KEY
from secateur.core.errors import AnatomyError
from secateur.loading import HEAD_SIZE, MODEL_TYPE, OWN_HEADS, REMOTE_CODE

__all__ = ["fixed_heads", "is_stock", "own_class", "resized_config"]

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
        biases: matrices that get a bias they did not have. The stock class may give biases to others as
            well: the anatomy of the new configuration tells.
        extra: further keys, which the loading code alone understands.
        whole: sizes of spaces that are cut in the whole model alike, inside the blocks and outside.

    Raises:
        AnatomyError: the model classes of this family cannot have these sizes; or `whole` where the hidden
            size has come to say nothing of the heads.
    """
    known, keys = (
        config.get("per_layer_config", {}),
        {"stream": STREAM_KEY, "output": OUTPUT_KEY, **anatomy.keys},
    )
    names = _names(anatomy)
    if whole and OWN_HEADS in config:
        raise AnatomyError(
            f"a narrower {anatomy.family!r} whose blocks have lost heads",
            "one with all its heads",
            "make it narrower first, and remove heads then",
        )
    own = [
        {
            **known.get(str(index), {}),
            **{key: size for space, size in block.items() for key in names(keys[space])},
        }
        for index, block in enumerate(sizes)
    ]
    fixed = {"head_dim": anatomy.spaces["head_dim"]} if "head_dim" in anatomy.spaces else {}
    fixed |= {anatomy.keys[space]: size for space, size in (whole or {}).items()}
    shared = _shared(own)
    switches = None if extra else _switches(anatomy, biases)
    if switches is not None and is_stock(config) and shared is not None:
        stock: dict[str, Any] = fixed | _as_named(
            shared, config, {keys[s] for block in sizes for s in block}, names
        )
        stock |= dict.fromkeys(switches.values(), True)
        if _gives({**config, **stock}, anatomy, _with_biases(shapes, switches)):
            return stock
    updates = {
        **fixed,
        **own_class(config),
        **(_own_heads(anatomy, names) if any("heads" in block for block in sizes) else {}),
        "per_layer_config": {str(index): block for index, block in enumerate(own)},
        "block_biases": list(dict.fromkeys([*config.get("block_biases", ()), *biases])),
        **(extra or {}),
    }
    added = _with_biases(shapes, [f"{name}.bias" for name in biases])
    if not _gives({**config, **updates}, anatomy, added):
        cut = ", ".join(sorted({space for block in sizes for space in block}))
        raise AnatomyError(
            f"{anatomy.family!r} derives the shapes of its blocks from other sizes than {cut}",
            "a family whose attention has a head_dim of its own",
            "remove feed-forward channels only: -O targets=ffn",
        )
    return updates


def _names(anatomy: Anatomy) -> Callable[[str], tuple[str, ...]]:
    """All names of a config key: a class of transformers reads now one of them, now the other."""
    family = load_family(anatomy.family)
    pairs = [*family.aliases.items()] if family else []
    return lambda key: (key, *(b if key == a else a for a, b in pairs if key in (a, b)))


def fixed_heads(anatomy: Anatomy) -> bool:
    """Whether the stock class of the family can have no fewer heads of the same width."""
    family = load_family(anatomy.family)
    return family is not None and bool(family.square_attention)


def _own_heads(anatomy: Anatomy, names: Callable[[str], tuple[str, ...]]) -> dict[str, Any]:
    """What the loading code has to know to build attention with fewer heads of the same width; nothing where
    the config of the family states that width."""
    family = load_family(anatomy.family)
    if family is None or not family.square_attention:
        return {}
    matrices = {matrix.name: matrix for block in anatomy.blocks for matrix in block.matrices}.values()
    writers = {m.name: m for m in matrices if m.columns.segments[0].space == "heads"}
    readers = [m.name for m in matrices if m.rows.segments[0].space == "heads"]
    told = {
        "attention": family.square_attention,
        "readers": readers,
        "writers": [*writers],
        "count": list(names(anatomy.keys["heads"])),
        "hidden": list(names(listed(family.spaces["hidden"])[0])),
    }
    return {OWN_HEADS: told, HEAD_SIZE: next(iter(writers.values())).columns.segments[0].unit}


def _shared(own: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The sizes of all blocks, where those that have a size agree on it."""
    shared: dict[str, Any] = {}
    for block in own:
        if any(shared.setdefault(key, size) != size for key, size in block.items()):
            return None
    return shared


def _as_named(
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    keys: Iterable[str],
    names: Callable[[str], tuple[str, ...]],
) -> dict[str, int]:
    """Sizes under the names that the file has for these keys, or under the key where it has none."""
    stated = {key: [name for name in names(key) if name in config] or [key] for key in keys}
    return {name: sizes[key] for key, found in stated.items() for name in found}


def own_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json that let the class of secateur load the model."""
    module = REMOTE_CODE.removesuffix(".py")
    return {
        "model_type": MODEL_TYPE,
        "base_model_type": config.get("base_model_type", config["model_type"]),
        "architectures": ["SecateurForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.SecateurConfig",
            "AutoModelForCausalLM": f"{module}.SecateurForCausalLM",
        },
    }


def is_stock(config: Mapping[str, Any]) -> bool:
    """Whether transformers loads a model of this configuration with a class of its own."""
    return config.get("model_type") != MODEL_TYPE


def _switches(anatomy: Anatomy, biases: Sequence[str]) -> dict[str, str] | None:
    """The biases that come with the config keys which give these matrices theirs -> their key; None where
    there is no such key for one of them."""
    family = load_family(anatomy.family)
    known = family.bias_switches if family else {}
    keys = {known.get(f"{name}.bias") for name in biases}
    return None if None in keys else {bias: key for bias, key in known.items() if key in keys}


def _with_biases(shapes: Sequence[Mapping[str, Shape]], biases: Iterable[str]) -> list[dict[str, Shape]]:
    """Shapes with these biases, in the blocks that have the matrices."""
    added = [(bias, f"{bias.removesuffix('bias')}weight") for bias in biases]
    return [
        {**block, **{bias: block[weight][:1] for bias, weight in added if weight in block}}
        for block in shapes
    ]


def _gives(config: Mapping[str, Any], anatomy: Anatomy, shapes: Sequence[Mapping[str, Shape]]) -> bool:
    """Whether the model of this configuration has blocks of these shapes."""
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        seen = look_at(build_meta(made), anatomy.blocks_path).shapes
    except (AnatomyError, StrictDataclassError, ValueError, TypeError):
        return False
    return [dict(block) for block in shapes] == seen
