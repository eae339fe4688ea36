"""Scores kept beside a result, to plan other ratios of the same model and method from."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.core.errors import InputError
from secateur.core.method import Method
from secateur.pipeline.opened import Opened

__all__ = ["NO_SCORES", "origin_of", "read_scores", "scores_file"]

NO_SCORES = "leave --scores out to score this model"


def origin_of(opened: Opened, method: Method, exclude: Collection[str] = ()) -> dict[str, str]:
    """What scores hold for: model, method, and its options but those excluded."""
    settings = method.model_dump_json(exclude=set(exclude))
    return {"model": opened.checkpoint.fingerprint(), "method": method.id, "options": settings}


def scores_file(scores: Mapping[str, Tensor], origin: Mapping[str, str]) -> bytes:
    """The content of `scores.safetensors`."""
    metadata = {"origin": json.dumps(origin)}  # one key: several come in any order
    return save({name: tensor.contiguous() for name, tensor in scores.items()}, metadata)


def read_scores(path: Path, origin: Mapping[str, str]) -> dict[str, Tensor]:
    """The scores in a file. Raises `InputError` for no such file, and for scores of another origin."""
    try:
        with safe_open(path, "pt") as file:
            seen = json.loads((file.metadata() or {}).get("origin", "{}"))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = f"{path} is no file of scores ({error})"
        raise InputError(reason, "scores.safetensors of a run", NO_SCORES) from error
    for key, expected in origin.items():
        if seen.get(key) != expected:
            raise InputError(f"{path} holds scores of {key} {seen.get(key)}", f"{key} {expected}", NO_SCORES)
    return found
