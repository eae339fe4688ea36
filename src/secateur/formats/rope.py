"""Rotary embeddings as llama.cpp takes them: keys of the file, and factors of the frequencies. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from secateur.core.errors import ExportError

__all__ = ["rope_factors", "rope_keys"]

BETAS = {"beta_fast": 32, "beta_slow": 1}


def rope_keys(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Keys behind the architecture: `rope.freq_base`, `rope.scaling.type`, ...

    Raises:
        ExportError: a kind of scaling that llama.cpp computes otherwise or not at all.
    """
    rope, window = _parameters(config)
    keys = {"rope.dimension_count": head_dim, "rope.freq_base": float(rope.get("rope_theta", 10000.0))}
    if window is not None:
        keys["rope.freq_base_swa"] = float(window.get("rope_theta", 10000.0))
        if _kind(window) != "default":
            raise _unknown(f"{_kind(window)} inside sliding windows")
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0) != 1.0:
        raise _unknown("a share of each head only")
    return keys | _scaling(rope, config)


def rope_factors(config: Mapping[str, Any], head_dim: int) -> list[float] | None:
    """What each of the head_dim / 2 frequencies is divided by (the scaling of Llama 3.1), or None."""
    rope, _ = _parameters(config)
    if _kind(rope) != "llama3":
        return None
    base, factor = float(rope.get("rope_theta", 10000.0)), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    length = float(rope["original_max_position_embeddings"])
    turns = [length / (2 * math.pi) * base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    shares = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
    return [1 / ((1 - share) / factor + share) for share in shares]


def _parameters(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Of full attention, and of windows where they differ; old and new spellings of config.json."""
    found = config.get("rope_parameters")
    if isinstance(found, Mapping) and "full_attention" in found:
        return dict(found["full_attention"]), dict(found["sliding_attention"])
    if isinstance(found, Mapping):
        return dict(found), None
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    local = config.get("rope_local_base_freq")
    return old, None if local is None else {"rope_theta": local}


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    kind = _kind(rope)
    if kind in ("default", "llama3"):
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    own = [key for key, usual in BETAS.items() if rope.get(key) not in (None, usual)]
    own += [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    if kind != "yarn" or own:
        raise _unknown(f"{kind} with {own[0]}" if own else kind)
    length = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(length or 0),
    }


def _unknown(what: str) -> ExportError:
    return ExportError(
        f"rotary embeddings of kind {what}",
        "default, linear, llama3 or plain yarn",
        "convert this model with llama.cpp's own script",
    )
