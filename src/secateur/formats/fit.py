"""Which graph of llama.cpp holds a model, and the keys that describe it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from secateur.anatomy.conditions import holds
from secateur.core.errors import ExportError
from secateur.formats.catalogue import Architecture, GgufFamily, architectures, families
from secateur.formats.form import Form
from secateur.formats.rope import rope_keys

__all__ = ["NO_MLP", "Fit", "fit"]

PAD = "pad it to uniform sizes: secateur export MODEL --format dense -o PATH"
SLICED = "remove heads and channels instead: flap"
NO_MLP = 1
"""Channels, all zero, of a block without a feed-forward part: llama.cpp drops the attention of a block
whose feed_forward_length is 0 (its graph `deci` leaves such a block before the residual sum)."""


@dataclass(frozen=True)
class Fit:
    """How a model is written.

    Attributes:
        name: the architecture, as llama.cpp calls it.
        architecture: what it can hold.
        family: how the family is written.
        form: sizes and parts of the blocks.
        notes: what behaves otherwise in llama.cpp, one sentence each.
    """

    name: str
    architecture: Architecture
    family: GgufFamily
    form: Form
    notes: list[str] = field(default_factory=list)

    def heads(self, index: int) -> tuple[int, int]:
        """Query and key-value heads that the file has in a block.

        llama.cpp takes the width of a head from block 0, which therefore keeps one group, all zero, where
        the model has none.
        """
        form = self.form
        if "self_attn" not in form.skipped[index]:
            return form.heads[index], form.kv_heads[index]
        return (max(form.heads[index] // form.kv_heads[index], 1), 1) if index == 0 else (0, 0)

    def ffn(self, index: int) -> int:
        """Channels that the file has in a block."""
        return NO_MLP if "mlp" in self.form.skipped[index] else self.form.ffn[index]

    def keys(self) -> dict[str, Any]:
        """Keys of the file, the architecture in front of them left out."""
        form, config = self.form, self.form.config
        blocks = range(form.layers)
        heads, shared = zip(*map(self.heads, blocks), strict=True)
        keys: dict[str, Any] = {
            "vocab_size": config["vocab_size"],
            "context_length": config["max_position_embeddings"],
            "embedding_length": form.hidden,
            "block_count": form.layers,
            "feed_forward_length": self._sizes([self.ffn(index) for index in blocks]),
            "attention.head_count": self._sizes(heads),
            "attention.head_count_kv": self._sizes(shared),
            "attention.key_length": form.head_dim,
            "attention.value_length": form.head_dim,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            **rope_keys(config, form.head_dim),
        }
        for key, source in self.family.values.items():
            value = config.get(source) if isinstance(source, str) else source
            if value is not None:
                keys[key] = value
        if pattern := _windows(self):
            keys["attention.sliding_window_pattern"] = pattern
        return keys

    def _sizes(self, sizes: Any) -> int | list[int]:
        return list(sizes) if self.architecture.uneven else int(sizes[0])


def fit(form: Form | None, kind: str) -> Fit:
    """The first architecture that holds the model.

    Args:
        form: the model; None where its config lacks the sizes of such models.
        kind: its model type, for the message.

    Raises:
        ExportError: none does, with the reason of the last.
    """
    known = families()
    if form is None or form.family not in known:
        raise ExportError(
            f"no GGUF for model type {kind!r}",
            f"one of {', '.join(sorted(known))}",
            "convert it with llama.cpp's own script",
        )
    if form.sliced:
        raise ExportError(f"a sliced {form.family!r} as GGUF", "a residual stream of one basis", SLICED)
    family = known[form.family]
    _require(form, family)
    reasons = []
    for name in family.architectures:
        architecture = architectures()[name]
        reason = _misfit(form, family, architecture)
        if not reason:
            found = Fit(name, architecture, family, form, _notes(form, family))
            rope_keys(form.config, form.head_dim)
            return found
        reasons.append(f"architecture {name} of llama.cpp holds no {reason}")
    raise ExportError(f"{form.family!r} as GGUF: {reasons[-1]}", "", PAD)


def _misfit(form: Form, family: GgufFamily, architecture: Architecture) -> str:
    """What the architecture cannot hold; empty when it holds everything."""
    if not architecture.uneven and not form.even:
        return "blocks of different sizes"
    if architecture.square and not form.square:
        return f"heads that are together wider or narrower than hidden_size {form.hidden}"
    for path in sorted(form.biases):
        if not set(family.parts(path)) <= architecture.biases:
            return f"bias of {path}"
    return ""


def _require(form: Form, family: GgufFamily) -> None:
    """What no architecture of the family could make up for."""
    config = {**form.config, "head_dim": form.head_dim}
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation is not None and activation not in family.activation:
        raise ExportError(f"activation {activation!r} in {form.family!r}", " or ".join(family.activation))
    for condition, reason in family.needs.items():
        if not holds(condition, config.get):
            raise ExportError(f"{form.family!r} with {reason}", "a model without", PAD)


def _notes(form: Form, family: GgufFamily) -> list[str]:
    return [note for condition, note in family.notes.items() if holds(condition, form.config.get)]


def _windows(found: Fit) -> list[bool] | None:
    """Which blocks attend to a window, where that is not what llama.cpp assumes."""
    every, kinds = found.family.pattern, found.form.config.get("layer_types")
    if not every or not kinds:
        return None
    windows = [kind == "sliding_attention" for kind in kinds]
    usual = [(index + 1) % every != 0 for index in range(len(windows))]
    return None if windows == usual else windows
