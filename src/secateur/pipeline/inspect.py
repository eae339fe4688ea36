"""What a model is made of, from its headers and configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.pipeline.opened import open_model

__all__ = ["inspect"]


def inspect(model: str | Path) -> dict[str, Any]:
    """Family, blocks, spaces, parameters, bytes and what can be pruned.

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
    opened = open_model(model)
    checkpoint = opened.checkpoint
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        key = str(info.dtype).removeprefix("torch.")
        dtypes[key] = dtypes.get(key, 0) + info.nbytes
    files = {info.file for info in checkpoint.tensors.values()}
    return {
        "model": str(model),
        "folder": str(opened.folder),
        "architecture": (opened.config.architectures or [type(opened.config).__name__])[0],
        **opened.anatomy.summary(),
        "bytes": checkpoint.nbytes,
        "shards": len(files),
        "dtypes": dtypes,
        "max_length_tokens": opened.max_length,
        "tensors": len(checkpoint.tensors),
        "untouched_tensors": list(opened.layout.untouched),
        "fingerprint": checkpoint.fingerprint(),
    }
