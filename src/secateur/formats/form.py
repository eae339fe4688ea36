"""The sizes of a decoder block by block, as `config.json` states them. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.anatomy.family import load_family

__all__ = ["Form"]

BIAS = re.compile(r"\.\d+\.(.+)\.bias$")


@dataclass(frozen=True)
class Form:
    """What an engine must be able to hold.

    Attributes:
        family: the model type whose class the blocks are built from.
        config: the content of config.json over the defaults of the family.
        heads, kv_heads, ffn: a number a block.
        skipped: parts that a block does without: `self_attn`, `mlp`.
        biases: matrices of blocks that have one, by path inside the block.
        experts: routed experts of every block that states their number.
    """

    family: str
    config: Mapping[str, Any]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    skipped: tuple[frozenset[str], ...]
    biases: frozenset[str]
    experts: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Iterable[str]) -> Form | None:
        """From a configuration and the names of the tensors; None where it lacks a size."""
        kind = str(config.get("base_model_type", config.get("model_type")))
        family = load_family(kind)
        whole = {**(family.defaults if family else {}), **config}
        for name, other in (family.aliases if family else {}).items():
            value = whole.get(name, whole.get(other))
            whole |= {name: value, other: value}
        layers, sizes = whole.get("num_hidden_layers"), whole.get("per_layer_config") or {}
        if not isinstance(layers, int):
            return None
        own = [{**whole, **sizes.get(str(index), {})} for index in range(layers)]
        heads = [block.get("num_attention_heads") for block in own]
        shared = [block.get("num_key_value_heads") or block.get("num_attention_heads") for block in own]
        widths = [block.get("intermediate_size") for block in own]
        if not all(isinstance(size, int) for size in (*heads, *shared, *widths, whole.get("hidden_size"))):
            return None
        found = (BIAS.search(name) for name in tensors)
        return cls(
            kind,
            whole,
            tuple(heads),  # type: ignore[arg-type]
            tuple(shared),  # type: ignore[arg-type]
            tuple(widths),  # type: ignore[arg-type]
            tuple(frozenset(block.get("skip") or ()) for block in own),
            frozenset(match[1] for match in found if match),
            _experts(kind, own),
        )

    @property
    def sliced(self) -> bool:
        """Each half of a block has a basis of its own (slicegpt)."""
        return bool(self.config.get("residual_shortcuts"))

    @property
    def layers(self) -> int:
        return len(self.heads)

    @property
    def hidden(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.hidden // int(self.config["num_attention_heads"]))

    @property
    def even(self) -> bool:
        """Whether all blocks have the same sizes and all their parts."""
        lists = (self.heads, self.kv_heads, self.ffn, self.experts)
        return not any(self.skipped) and all(len(set(sizes)) <= 1 for sizes in lists)

    @property
    def square(self) -> bool:
        """Whether the heads of every block together are as wide as the model."""
        return all(heads * self.head_dim == self.hidden for heads in self.heads)


def _experts(kind: str, blocks: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    family = load_family(kind)
    key = family.spaces.get("experts") if family else None
    counts = [block.get(key) for block in blocks] if isinstance(key, str) else []
    return tuple(count for count in counts if isinstance(count, int))
