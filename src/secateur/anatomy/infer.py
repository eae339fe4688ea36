"""An anatomy for a decoder without a family file."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from secateur.anatomy.model import Anatomy
from secateur.core.errors import AnatomyError

__all__ = ["infer"]


def infer(config: PretrainedConfig, model: PreTrainedModel) -> Anatomy:
    """Raises `AnatomyError`."""
    raise AnatomyError(f"model type {config.model_type!r}", "a family with a family file")
