"""The layers of a run, ordered for pictures and tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

from secateur.report.markup import Markup, Node
from secateur.report.model import Layer
from secateur.report.page import data, table

__all__ = ["Stack", "merge_experts", "where"]

_EXPERT = re.compile(r"\.\d+(?=\.|$)")


def where(layer: Layer) -> str:
    """`block 3 self_attn.q_proj`."""
    return f"block {layer.block} {layer.matrix}"


def _kind(layer: Layer) -> str:
    """The matrix without its expert number: what repeats from block to block."""
    return _EXPERT.sub("", layer.matrix)


def merge_experts(layers: Iterable[Layer]) -> list[Layer]:
    """One row a block and kind of matrix: means weighted by size, seconds added, fallbacks joined."""
    groups: dict[tuple[int, str], list[Layer]] = defaultdict(list)
    for layer in layers:
        groups[layer.block, _kind(layer)].append(layer)
    return [_merged(name, group) if group[1:] else group[0] for (_, name), group in groups.items()]


def _merged(name: str, group: list[Layer]) -> Layer:
    seconds = [layer.seconds for layer in group if layer.seconds is not None]
    return group[0].model_copy(
        update={
            "matrix": name,
            "sparsity_requested": _mean(group, lambda layer: layer.sparsity_requested),
            "sparsity": _mean(group, lambda layer: layer.sparsity),
            "loss": _mean(group, lambda layer: layer.loss),
            "seconds": sum(seconds) if seconds else None,
            "notes": _notes(group),
            "fallbacks": list(dict.fromkeys(phrase for layer in group for phrase in layer.fallbacks)),
        }
    )


def _notes(group: list[Layer]) -> dict[str, float]:
    """Means of the numbers that every layer has."""
    shared = [name for name in group[0].notes if all(name in layer.notes for layer in group)]
    return {name: sum(layer.notes[name] for layer in group) / len(group) for name in shared}


def _mean(group: Iterable[Layer], value: Callable[[Layer], float | None]) -> float | None:
    """Over weights, leaving out layers without a value."""
    pairs = [(v, layer.rows * layer.columns) for layer in group if (v := value(layer)) is not None]
    total = sum(weight for _, weight in pairs)
    return sum(v * weight for v, weight in pairs) / total if total else None


class Stack:
    """Layers with experts merged, by block and by kind of matrix.

    Kinds go by the last word of their name, by the full name where two would look the same.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = merge_experts(layers)
        self.blocks: dict[int, list[Layer]] = defaultdict(list)
        names: dict[str, list[Layer]] = defaultdict(list)
        for layer in sorted(self.layers, key=lambda layer: layer.block):
            self.blocks[layer.block].append(layer)
            names[_kind(layer)].append(layer)
        last = [name.rsplit(".", 1)[-1] for name in names]
        short = (word if last.count(word) == 1 else name for name, word in zip(names, last, strict=True))
        self.kinds = dict(zip(short, names.values(), strict=True))

    def mean(self, value: Callable[[Layer], float]) -> dict[int, float]:
        """The mean of each block over its weights."""
        return {block: _mean(group, value) or 0.0 for block, group in self.blocks.items()}

    def numbers(
        self,
        columns: dict[str, dict[int, float | None]],
        value: Callable[[Layer], float | None],
        show: Callable[[float], str],
    ) -> Markup:
        """A row a block: first `columns` (block to value), then one column a kind."""
        kinds = {name: {layer.block: value(layer) for layer in group} for name, group in self.kinds.items()}
        every = {**columns, **kinds}

        def cell(number: float | None) -> Node:
            return "–" if number is None else data(show(number), number)

        body = [
            [data(str(block), block), *(cell(column.get(block)) for column in every.values())]
            for block in self.blocks
        ]
        return table(["Block", *every], body)
