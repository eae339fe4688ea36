"""What a model is made of, from `config.json` and its family file alone: no model is built, no torch needed.

Nothing is known here of what a version of transformers really builds; whoever needs that calls `resolve`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from secateur.anatomy.conditions import holds
from secateur.anatomy.config import ConfigFile, Lookup, NotStatedError
from secateur.anatomy.family import listed
from secateur.anatomy.model import Anatomy, Shape
from secateur.anatomy.outline import Outline
from secateur.anatomy.resolver import assemble
from secateur.anatomy.sizes import Sizes

__all__ = ["predict"]


def predict(config: ConfigFile) -> Anatomy:
    """The anatomy that `resolve` would find.

    Raises:
        NotStatedError: neither config nor family file say enough.
        AnatomyError: a config that does not fit its family file.
    """
    sizes = Sizes.of(config.family, config.model_type, config.size)
    return assemble(config.family, sizes, _Prediction(config, sizes).outline())


class _Prediction:
    def __init__(self, config: ConfigFile, sizes: Sizes) -> None:
        self.config, self.family, self.sizes = config, config.family, sizes
        self.known: dict[str, int] = {**sizes.others, **sizes.spaces}

    def outline(self) -> Outline:
        family = self.family
        for condition in family.assumes:
            if not holds(condition, self._lookup(None)):
                raise NotStatedError(f"the family file assumes {condition}")
        layers = self.known.get("layers")
        if layers is None:
            raise NotStatedError("the config does not say how many blocks there are")
        outer = {name: tuple(listed(axes)) for name, axes in family.outer.items()}
        alias, source = f"{family.head}.weight", f"{family.embedding}.weight"
        tied = {alias: source} if self.config.value("tie_word_embeddings") else {}
        return Outline(
            shapes=[self._shapes(family.parameters, index) for index in range(layers)],
            transposed=[{} for _ in range(layers)],
            outer={name: shape for name, shape in self._shapes(outer).items() if name not in tied},
            tied=tied,
            base_prefix=family.blocks.partition(".")[0],
            embedding=family.embedding,
            head=family.head,
        )

    def _shapes(self, axes: Mapping[str, Iterable[str]], index: int | None = None) -> dict[str, Shape]:
        """Shapes of those parameters that are there."""
        present = (name for name in axes if self._is_there(name, index))
        return {name: tuple(axis.size for axis in self.sizes.axes(axes[name])) for name in present}

    def _is_there(self, name: str, index: int | None) -> bool:
        found = self.family.conditions(name)
        if not found:
            return name not in self.family.biases
        return all(self._holds(condition, index) for condition in found)

    def _holds(self, condition: str | bool, index: int | None) -> bool:
        return condition if isinstance(condition, bool) else holds(condition, self._lookup(index))

    def _lookup(self, index: int | None) -> Lookup:
        """Values of conditions: the place of the block, sizes of the family file, keys of the config."""
        known = self.known if index is None else {**self.known, "index": index}
        return lambda name: known[name] if name in known else self.config.value(name)
