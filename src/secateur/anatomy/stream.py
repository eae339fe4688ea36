"""How the blocks of a model read and write the residual stream, where it can be given another basis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from secateur.anatomy.conditions import holds
from secateur.anatomy.config import values_of
from secateur.anatomy.cut import residual_spaces
from secateur.anatomy.family import listed, load_family
from secateur.anatomy.model import Anatomy, Axis, Block, Matrix
from secateur.core.errors import AnatomyError

__all__ = ["Stream", "stream_of"]

REMEDY = "remove heads and channels instead: flap"
Branch = tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """Attributes:
    steps: of every block, in order: the branches that read the same stream, whose outputs are added to it.
        A branch is a norm and the modules behind it; the first is attention.
    centred: the norms subtract the mean.
    embeddings: modules outside the blocks whose rows are added up to what enters block 0.
    """

    steps: tuple[tuple[Branch, ...], ...]
    centred: bool
    embeddings: tuple[str, ...]

    @property
    def norms(self) -> list[str]:
        return [branch[0] for step in self.steps for branch in step]

    def step(self, matrix: Matrix) -> int:
        """In which step a matrix stands."""
        return next(number for number, step in enumerate(self.steps) if any(map(_has(matrix), step)))

    def norm(self, matrix: Matrix) -> str:
        """The norm of its branch."""
        return next(branch[0] for step in self.steps for branch in step if _has(matrix)(branch))

    def writers(self, block: Block, step: int | None = None) -> list[Matrix]:
        """The matrices that add to the stream, of one step or of all."""
        found = [matrix for matrix in block.matrices if _is_hidden(matrix.rows)]
        return [matrix for matrix in found if step is None or self.step(matrix) == step]

    def readers(self, block: Block) -> list[Matrix]:
        """The matrices that multiply what the norms give."""
        return [matrix for matrix in block.matrices if _is_hidden(matrix.columns)]

    def new_biases(self, block: Block) -> list[str]:
        """Readers that get a bias: that of their norm, where they have none to add it to."""
        return [
            matrix.name
            for matrix in self.readers(block)
            if f"{self.norm(matrix)}.bias" in block.parameters
            and f"{matrix.name}.bias" not in block.parameters
        ]


def stream_of(config: PretrainedConfig, anatomy: Anatomy) -> Stream:
    """The stream of a model whose blocks do nothing to it but what norms, what reads them and one writer a
    branch do.

    Raises:
        AnatomyError: another kind of model.
    """
    family = load_family(getattr(config, "base_model_type", config.model_type))
    values = values_of(config)
    if family is not None and family.norms and not getattr(config, "residual_shortcuts", None):
        branches = [(norm, *listed(modules)) for norm, modules in family.norms.items()]
        parallel = bool(family.parallel_when) and holds(family.parallel_when, values)
        steps = (tuple(branches),) if parallel else tuple((branch,) for branch in branches)
        stream = Stream(steps, family.centred, _embeddings(anatomy))
        allowed = not family.norms_when or holds(family.norms_when, values)
        if allowed and _is_known(anatomy, stream):
            return stream
    raise AnatomyError(
        f"blocks of {anatomy.family!r}",
        "attention and one feed-forward part, each after a norm and added to the residual stream",
        REMEDY,
    )


def _embeddings(anatomy: Anatomy) -> tuple[str, ...]:
    """Those of tokens and of positions: a row each, as wide as the stream."""
    stream = residual_spaces(anatomy)
    return tuple(
        name.removesuffix(".weight")
        for name, axes in anatomy.outer_axes.items()
        if len(axes) == 2
        and axes[1].segments[0].space in stream
        and axes[0].segments[0].space in (None, "vocab")
        and name != f"{anatomy.head}.weight"
    )


def _is_known(anatomy: Anatomy, stream: Stream) -> bool:
    outside = {f"{path}.weight" for path in (*stream.embeddings, anatomy.norm, anatomy.head)}
    known = anatomy.outer.keys() <= outside | {f"{anatomy.norm}.bias"}
    return known and all(_block_is_known(block, stream) for block in anatomy.blocks)


def _block_is_known(block: Block, stream: Stream) -> bool:
    """Whether nothing but norms, what reads them and one writer of each branch has an axis in `hidden`."""
    branches = [branch for step in stream.steps for branch in step]
    norms = {f"{norm}.{kind}" for norm in stream.norms for kind in ("weight", "bias")}
    own = {
        name
        for matrix in block.matrices
        if any(map(_has(matrix), branches))
        for name in (matrix.parameter, f"{matrix.name}.bias")
    }
    touching = {name for name, axes in block.axes.items() if any(map(_is_hidden, axes))}
    written = [[m for m in block.matrices if _is_hidden(m.rows) and _has(m)(branch)] for branch in branches]
    alone = all(matrix.expert is None for matrix in block.matrices)
    return alone and touching <= norms | own and all(len(found) == 1 for found in written)


def _has(matrix: Matrix) -> Callable[[Branch], bool]:
    """Whether a branch has this matrix."""
    return lambda branch: matrix.name.partition(".")[0] in branch[1:]


def _is_hidden(axis: Axis) -> bool:
    return [segment.space for segment in axis.segments] == ["hidden"]
