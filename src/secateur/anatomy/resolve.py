"""From a config to an `Anatomy`: a family file evaluated against it, then verified against the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.anatomy.config import values_of
from secateur.anatomy.family import load_family
from secateur.anatomy.infer import infer
from secateur.anatomy.look import look_at
from secateur.anatomy.model import Anatomy
from secateur.anatomy.resolver import assemble
from secateur.anatomy.sizes import Sizes
from secateur.anatomy.skeleton import build_meta, build_skeleton, check_decoder
from secateur.anatomy.sliced import FLAG, sliced_family
from secateur.loading.modeling_secateur import BlockConfig

__all__ = ["build_skeleton", "resolve", "resolve_config"]


def resolve(config: PretrainedConfig, skeleton: PreTrainedModel | None = None) -> Anatomy:
    """The anatomy of the decoder that `config` describes; no weight is read.

    Args:
        config: of a text-only decoder.
        skeleton: a model of this config, real or on the meta device, where the caller has one already.

    Raises:
        AnatomyError: not a decoder, or a parameter whose role is not known for certain.
    """
    check_decoder(config)
    model = skeleton if skeleton is not None else build_meta(config)
    kind = getattr(config, "base_model_type", config.model_type)
    family = load_family(kind)
    if family is None:
        return infer(config, model)
    if told := getattr(config, FLAG, None):
        family = sliced_family(family, told)
    sizes = Sizes.of(family, kind, values_of(config))
    own = {
        int(index): Sizes.of(family, kind, values_of(BlockConfig(config, changed)))
        for index, changed in getattr(config, "block_sizes", {}).items()
    }
    return assemble(family, sizes, look_at(model, family.blocks), own)


def resolve_config(config: Mapping[str, Any]) -> Anatomy:
    """`resolve` for the content of a config.json."""
    return resolve(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
