"""Models whose residual stream was sliced: what every step of a block reads and writes has its own basis."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from secateur.anatomy.cut import cut_shapes
from secateur.anatomy.family import Family, listed
from secateur.anatomy.model import Anatomy, Block, Shape
from secateur.anatomy.stream import Stream
from secateur.core.errors import AnatomyError

__all__ = [
    "FLAG",
    "OUTPUT_KEY",
    "STREAM_KEY",
    "require_unsliced",
    "shortcuts_of",
    "sliced_family",
    "sliced_flag",
    "sliced_shapes",
    "sliced_size",
]

FLAG = "residual_shortcuts"
"""Config key of such models: what the loading code has to know of them (see `sliced_flag`)."""
STREAM_KEY, OUTPUT_KEY = "stream_size", "output_size"
"""Keys in the sizes of a block: what it reads, and what it writes where that differs."""
SHORTCUTS = {1: ("block_shortcut",), 2: ("attention_shortcut", "mlp_shortcut")}
"""By the number of steps in a block, the matrices that lead from the basis before a step to that after it."""


def shortcuts_of(steps: int) -> tuple[str, ...]:
    """Names of the shortcut matrices of a block of so many steps."""
    return SHORTCUTS[steps]


def require_unsliced(config: Mapping[str, Any]) -> None:
    """Raise `AnatomyError` for a sliced model, whose blocks cannot be left out."""
    if config.get(FLAG):
        raise AnatomyError(
            "blocks of a sliced model, each of which hands on to the next in a basis of its own",
            "a model that was not sliced",
            "remove blocks first and slice then",
        )


def sliced_flag(anatomy: Anatomy, stream: Stream, *, slice_head: bool) -> dict[str, Any]:
    """What the loading code has to know: steps, shortcuts, readers, writers a step; what stands outside."""
    block = anatomy.blocks[0]
    return {
        "steps": [[list(branch) for branch in step] for step in stream.steps],
        "shortcuts": list(shortcuts_of(len(stream.steps))),
        "readers": [matrix.name for matrix in stream.readers(block)],
        "writers": [
            [matrix.name for matrix in stream.writers(block, step)] for step in range(len(stream.steps))
        ],
        "embeddings": list(stream.embeddings),
        "norm": anatomy.norm,
        "head_bias": slice_head and f"{anatomy.norm}.bias" in anatomy.outer,
    }


def sliced_family(family: Family, told: Mapping[str, Any]) -> Family:
    """What the family file would say of a sliced model: norms without weights, shortcuts, and last matrices
    that write `output` entries."""
    last = {path: family.matrices[path].model_copy(update={"rows": "output"}) for path in told["writers"][-1]}
    norms = {branch[0] for step in told["steps"] for branch in step}
    kept = {name: axes for name, axes in family.vectors.items() if name.rpartition(".")[0] not in norms}
    *inner, final = told["shortcuts"]
    shortcuts = {**{name: ["hidden", "hidden"] for name in inner}, final: ["output", "hidden"]}
    wide = listed(family.spaces["hidden"])
    changes = {
        "matrices": {**family.matrices, **last},
        "vectors": {**kept, **shortcuts},
        "spaces": {**family.spaces, "hidden": [STREAM_KEY, *wide]},
        "sizes": {**family.sizes, "output": [OUTPUT_KEY, STREAM_KEY, *wide]},
        "norms": {},
    }
    return Family.model_validate({**{name: getattr(family, name) for name in Family.model_fields}, **changes})


def sliced_shapes(stream: Stream, block: Block, width: int, written: int) -> dict[str, Shape]:
    """Shapes of a block that reads `width` entries and writes `written`."""
    shapes = cut_shapes(block, {"hidden": width})
    for matrix in stream.writers(block, len(stream.steps) - 1):
        rest = shapes[matrix.parameter]
        shapes[matrix.parameter] = (rest[0], written) if matrix.transposed else (written, rest[1])
        if f"{matrix.name}.bias" in shapes:
            shapes[f"{matrix.name}.bias"] = (written,)
    gone = {f"{norm}.{kind}" for norm in stream.norms for kind in ("weight", "bias")}
    shapes = {name: shape for name, shape in shapes.items() if name not in gone}
    for name in stream.new_biases(block):
        shapes[f"{name}.bias"] = (next(m for m in block.matrices if m.name == name).rows.size,)
    *inner, final = shortcuts_of(len(stream.steps))
    return shapes | dict.fromkeys(inner, (width, width)) | {final: (written, width)}


def sliced_size(anatomy: Anatomy, stream: Stream, width: int, last: int) -> int:
    """Parameters of all blocks, shortcuts included, when all but the last write `width` entries."""
    final = anatomy.blocks[-1]
    return sum(
        prod(shape)
        for block in anatomy.blocks
        for shape in sliced_shapes(stream, block, width, last if block is final else width).values()
    )
