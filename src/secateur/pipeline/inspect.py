"""What a model is made of, from its headers and configuration alone."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.anatomy.config import ConfigFile, NotStatedError, longest_input
from secateur.anatomy.layout import FileLayout
from secateur.anatomy.model import Anatomy
from secateur.anatomy.predict import predict
from secateur.checkpoint.headers import Headers
from secateur.core.errors import InputError
from secateur.formats.loads_in import loads_in

__all__ = ["inspect"]

logger = logging.getLogger(__name__)


def inspect(model: str | Path) -> dict[str, Any]:
    """Family, blocks, spaces, parameters, bytes and what can be pruned.

    Where the family file says all that is needed, neither torch nor transformers is imported, and config keys
    that do not decide about shapes (activations, rotary embeddings) are not checked before `plan` or `prune`.
    Elsewhere the model is built without its weights.

    Args:
        model: local folder, hub id or `seedling`. No weight is read.

    Returns:
        A JSON-able dictionary.

    Raises:
        CheckpointError, AnatomyError: a model that cannot be opened or is not known.

    >>> import secateur
    >>> secateur.inspect("seedling")["family"]
    'llama'
    """
    headers = Headers.open(model)
    known = _predicted(headers) or _built(headers)
    dtypes: dict[str, int] = {}
    for info in headers.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    return {
        "model": str(model),
        "folder": str(headers.folder),
        "architecture": known.architecture,
        **known.anatomy.summary(),
        "bytes": headers.nbytes,
        "dense_bytes": headers.dense_nbytes,
        "formats": dict(Counter(headers.formats.values())),
        "shards": len(headers.shards),
        "dtypes": dtypes,
        "max_length_tokens": known.max_length,
        "tensors": len(headers.tensors),
        "untouched_tensors": list(known.layout.untouched),
        "loads_in": loads_in(headers.config, headers.tensors, formats=headers.formats.values()),
        "fingerprint": headers.fingerprint(),
    }


@dataclass(frozen=True)
class _Known:
    architecture: str
    max_length: int
    anatomy: Anatomy
    layout: FileLayout


def _predicted(headers: Headers) -> _Known | None:
    """From the family file; `None` where it leaves anything open or does not fit the files."""
    try:
        config = ConfigFile(headers.config)
        anatomy = predict(config)
        layout = FileLayout(anatomy, headers.shapes)
        return _Known(config.architecture, longest_input(config.value), anatomy, layout)
    except (NotStatedError, InputError) as reason:
        logger.debug("%s is inspected through its model: %s", headers.folder, reason)
        return None


def _built(headers: Headers) -> _Known:
    """From the model, built without weights: takes any model that can be pruned, and knows what is wrong."""
    from secateur.pipeline.opened import open_model  # imports torch and transformers, which takes seconds

    opened = open_model(headers.folder)
    architecture = (opened.config.architectures or [type(opened.config).__name__])[0]
    return _Known(architecture, opened.max_length, opened.anatomy, opened.layout)
