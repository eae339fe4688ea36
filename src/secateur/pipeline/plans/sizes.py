"""Parameters and bytes of files that are yet to be written."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from secateur.anatomy.layout import FileLayout
from secateur.pipeline.opened import Opened

__all__ = ["FileSizes", "sizes_of"]


@dataclass(frozen=True)
class FileSizes:
    """Attributes:
    sparsity: fraction of the parameters in blocks that goes.
    parameters, nbytes: of all tensors in the files.
    exact: they do not depend on what the run will find.
    """

    sparsity: float
    parameters: int
    nbytes: int
    exact: bool = True


def sizes_of(opened: Opened, layout: FileLayout, sparsity: float, *, exact: bool = True) -> FileSizes:
    """Of files in this layout, in the dtypes of the model: a tensor that it does not have takes that of the
    first matrix of its block, or of the embedding."""
    tensors, source = opened.checkpoint.tensors, opened.layout
    found = {name: (tensors[name].numel, tensors[name].nbytes) for name in source.untouched}
    embedding = f"{opened.anatomy.embedding}.weight"
    outside = next(name for name in source.outer_names() if embedding.endswith(name))
    beside = [source.names_of(block.index, block.matrices[0].parameter)[0] for block in opened.anatomy.blocks]
    for index, shapes in enumerate([*layout.block_shapes(), layout.outer_shapes()]):
        like = beside[index] if index < layout.blocks else outside
        for name, shape in shapes.items():
            info = tensors.get(name, tensors[like])
            found[name] = prod(shape), prod(shape) * info.nbytes // max(info.numel, 1)
    parameters, nbytes = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    return FileSizes(sparsity, parameters, nbytes, exact)
