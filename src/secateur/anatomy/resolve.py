"""From a config to an `Anatomy`: a family file evaluated against it, then verified against the model."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from secateur.anatomy.config import values_of
from secateur.anatomy.family import load_family
from secateur.anatomy.infer import infer
from secateur.anatomy.look import look_at
from secateur.anatomy.model import Anatomy
from secateur.anatomy.resolver import assemble
from secateur.anatomy.sizes import Sizes
from secateur.anatomy.skeleton import build_meta, build_skeleton, check_decoder

__all__ = ["build_skeleton", "resolve"]


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
    family = load_family(config.model_type)
    if family is None:
        return infer(config, model)
    sizes = Sizes.of(family, config.model_type, values_of(config))
    return assemble(family, sizes, look_at(model, family.blocks))
