"""What llama.cpp can hold and how families are written for it, as data. Needs no torch."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

__all__ = ["Architecture", "GgufFamily", "architectures", "families"]

FOLDER = resources.files("secateur.formats")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(_Entry):
    """A graph of llama.cpp; the fields are described in architectures.yaml."""

    rotary: Literal["neighbours", "halves"]
    biases: frozenset[str]
    uneven: bool = False
    square: bool = False
    tied: bool = True


class GgufFamily(_Entry):
    """A family of transformers; the fields are described in families.yaml."""

    architectures: list[str]
    tensors: dict[str, str]
    activation: list[str]
    split: dict[str, list[str]] = {}
    values: dict[str, str | float] = {}
    needs: dict[str, str] = {}
    notes: dict[str, str] = {}
    plus_one: bool = False
    pattern: int = 0

    def parts(self, path: str) -> list[str]:
        """The tensors that a parameter becomes; nothing for one that is not known."""
        return self.split.get(path) or ([self.tensors[path]] if path in self.tensors else [])


@cache
def architectures() -> dict[str, Architecture]:
    """By the name that llama.cpp has for them."""
    return TypeAdapter(dict[str, Architecture]).validate_python(_read("architectures.yaml"))


@cache
def families() -> dict[str, GgufFamily]:
    """By model type."""
    return TypeAdapter(dict[str, GgufFamily]).validate_python(_read("families.yaml"))


def _read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
