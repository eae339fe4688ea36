"""How this room says no."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.core.errors import AnatomyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["REMEDY", "no_family", "one_line"]

REMEDY = "see the docs, 'add a model family'"


def no_family(config: PretrainedConfig, seen: str, expected: str) -> AnatomyError:
    """For a model that has no family file and cannot be understood without one."""
    return AnatomyError(
        f"no family file for {config.model_type!r}, and {seen}", expected, f"write a family file: {REMEDY}"
    )


def one_line(error: Exception, limit: int = 160) -> str:
    """The message of somebody else's exception, fit for an error of ours."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
