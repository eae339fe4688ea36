"""Models whose residual stream was sliced: each half of a block has a basis of its own."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from secateur.anatomy.cut import cut_shapes
from secateur.anatomy.family import Family
from secateur.anatomy.model import Anatomy, Block, Matrix, Shape
from secateur.core.errors import AnatomyError

__all__ = [
    "ATTENTION_SHORTCUT",
    "FEED_FORWARD_SHORTCUT",
    "FLAG",
    "OUTPUT_KEY",
    "require_sliceable",
    "require_unsliced",
    "sliced_family",
    "sliced_shapes",
    "sliced_size",
    "writers",
]

FLAG = "residual_shortcuts"
"""Config key of such models."""
OUTPUT_KEY = "output_size"
"""Key in the sizes of a block that writes more than it reads."""
ATTENTION_SHORTCUT, FEED_FORWARD_SHORTCUT = "attention_shortcut", "mlp_shortcut"


def require_unsliced(config: Mapping[str, Any]) -> None:
    """Raise `AnatomyError` for a sliced model, whose blocks cannot be left out."""
    if config.get(FLAG):
        raise AnatomyError(
            "blocks of a sliced model, each of which hands on to the next in a basis of its own",
            "a model that was not sliced",
            "remove blocks first and slice then",
        )


def sliced_family(family: Family) -> Family:
    """What the family file would say of a sliced model: norms without weights, shortcuts, and a last matrix
    that writes `output` entries."""
    last = [path for path, entry in family.matrices.items() if entry.rows == "hidden"][-1]
    matrices = {**family.matrices, last: family.matrices[last].model_copy(update={"rows": "output"})}
    kept = {
        name: axes for name, axes in family.vectors.items() if name.rpartition(".")[0] not in family.norms
    }
    shortcuts = {ATTENTION_SHORTCUT: ["hidden", "hidden"], FEED_FORWARD_SHORTCUT: ["output", "hidden"]}
    sizes = {**family.sizes, "output": [OUTPUT_KEY, "hidden_size"]}
    changes = {"matrices": matrices, "vectors": {**kept, **shortcuts}, "sizes": sizes, "norms": {}}
    return Family.model_validate({**{name: getattr(family, name) for name in Family.model_fields}, **changes})


def require_sliceable(anatomy: Anatomy) -> None:
    """Raise `AnatomyError` unless every use of the residual stream is known and commutes with rotations."""
    known = {f"{anatomy.norm}.weight", f"{anatomy.embedding}.weight", f"{anatomy.head}.weight"}
    if (
        anatomy.norms
        and anatomy.outer.keys() <= known
        and anatomy.norm
        and all(_is_known(anatomy, block) for block in anatomy.blocks)
    ):
        return
    raise AnatomyError(
        f"blocks of {anatomy.family!r}",
        "attention and one feed-forward part, each after an RMS norm and added to the residual stream",
        "remove heads and channels instead: flap",
    )


def _is_known(anatomy: Anatomy, block: Block) -> bool:
    """Whether nothing but norms, what reads them and one writer of each half has an axis in `hidden`."""
    halves, norms = list(anatomy.norms.values()), {f"{norm}.weight" for norm in anatomy.norms}
    own = {matrix.parameter for matrix in block.matrices if matrix.name.partition(".")[0] in halves}
    own |= {f"{matrix.name}.bias" for matrix in block.matrices}
    touching = {
        name
        for name, axes in block.axes.items()
        if any(segment.space == "hidden" for axis in axes for segment in axis.segments)
    }
    found = [matrix.name.partition(".")[0] for matrix in block.matrices if _writes(matrix)]
    alone = all(matrix.expert is None for matrix in block.matrices)
    return alone and norms <= touching <= norms | own and found == halves


def _writes(matrix: Matrix) -> bool:
    return [segment.space for segment in matrix.rows.segments] == ["hidden"]


def writers(block: Block) -> tuple[Matrix, Matrix]:
    """The matrices that add attention and the feed-forward part to the residual stream."""
    first, second = (matrix for matrix in block.matrices if _writes(matrix))
    return first, second


def sliced_shapes(anatomy: Anatomy, block: Block, width: int, written: int) -> dict[str, Shape]:
    """Shapes of a block that reads `width` entries and writes `written`."""
    shapes = cut_shapes(block, {"hidden": width})
    last = writers(block)[1]
    shapes[last.parameter] = (written, *shapes[last.parameter][1:])
    if f"{last.name}.bias" in shapes:
        shapes[f"{last.name}.bias"] = (written,)
    for norm in anatomy.norms:
        del shapes[f"{norm}.weight"]
    return shapes | {ATTENTION_SHORTCUT: (width, width), FEED_FORWARD_SHORTCUT: (written, width)}


def sliced_size(anatomy: Anatomy, width: int, last: int) -> int:
    """Parameters of all blocks, shortcuts included, when all but the last write `width` entries."""
    final = anatomy.blocks[-1]
    return sum(
        prod(shape)
        for block in anatomy.blocks
        for shape in sliced_shapes(anatomy, block, width, last if block is final else width).values()
    )
