"""What a decoder is made of, as frozen data: blocks, matrices, what each axis means, where inputs arrive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Anatomy", "Axis", "Block", "Matrix", "Segment", "Shape", "Site", "SiteKind"]

Shape = tuple[int, ...]
SiteKind = Literal["input", "experts_input", "experts_hidden"]


@dataclass(frozen=True)
class Segment:
    """`count` consecutive units of `unit` entries each, in the space they can be sliced along.

    8 heads of 16 rows are `Segment("heads", 8, 16)`; gate and up rows that take turns are
    `Segment("ffn", F, 2)`. `space` is `None` where nothing may be cut. `inner` names what the entries of a
    unit are, if the family file has a word for that (`value_dim`).
    """

    space: str | None
    count: int
    unit: int
    inner: str | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        return self.count * self.unit


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor: segments one after the other (several where projections are fused)."""

    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)


@dataclass(frozen=True)
class Matrix:
    """A prunable matrix of a block, always seen as (out, in).

    Attributes:
        name: parameter path without `.weight`, with the expert's number behind it for experts.
        parameter: the in-memory parameter it lies in, named inside the block.
        expert: index into the first dimension of a 3-D parameter, `None` for a plain matrix.
        transposed: stored as (in, out), as in GPT-2's Conv1D.
        rows: output axis.
        columns: input axis.
        input: the site whose tensor it multiplies; matrices with one site read the same tensor.
    """

    name: str
    parameter: str
    expert: int | None
    transposed: bool
    rows: Axis
    columns: Axis
    input: str

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.rows.size, self.columns.size

    @property
    def size(self) -> int:
        return self.rows.size * self.columns.size

    def view(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The (out, in) matrix inside the block's in-memory tensors: same storage, no gradient, writable.

        The same call on a mapping of gradients gives the gradient of this matrix.
        """
        tensor = parameters[self.parameter].detach()
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True)
class Site:
    """Where one or several matrices of a block take their input.

    Attributes:
        name: unique inside the block.
        module: block submodule. A pre-hook on it sees the input for kind `input`; for the other two it is
            the fused experts module, whose expert e computes its first product from `experts_input` and its
            second from `experts_hidden`.
        kind: how to observe it.
    """

    name: str
    module: str
    kind: SiteKind


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        index: position in the stack.
        prefix: path of the block in the model, such as `model.layers.3`.
        matrices: all that may be pruned, in the order of the family file, experts of one parameter together;
            blocks that are alike share the tuple.
        sites: by name.
        parameters: in-memory shape of every parameter and persistent buffer, by name inside the block.
        axes: the same names, each dimension with its spaces.
    """

    index: int
    prefix: str
    matrices: tuple[Matrix, ...]
    sites: dict[str, Site]
    parameters: dict[str, Shape]
    axes: dict[str, tuple[Axis, ...]]

    @property
    def size(self) -> int:
        """Elements of all parameters and persistent buffers."""
        return sum(map(prod, self.parameters.values()))

    @property
    def prunable_parameters(self) -> int:
        return sum(matrix.size for matrix in self.matrices)

    def readers(self, site: str) -> tuple[Matrix, ...]:
        """The matrices that multiply the tensor arriving at `site`."""
        return tuple(matrix for matrix in self.matrices if matrix.input == site)


@dataclass(frozen=True)
class Anatomy:
    """A whole decoder.

    Attributes:
        family: the family file it was read with, or `inferred`.
        model_type: as in the config.
        blocks_path: module path of the list of blocks.
        base_prefix: attribute of the model that holds the base model; files may leave it out.
        blocks: in order of execution.
        outer: shape of every parameter and persistent buffer outside the blocks, aliases left out.
        embedding, norm, head: module paths (`norm` is empty where a model has none).
        tied: alias -> name in `outer`, for parameters that are one tensor in memory.
        spaces: size of every named dimension.
        keys: config key to rewrite when a space is resized, where there is one.
        files: names on disk of a parameter that is stored otherwise than in memory. Several names are
            concatenated along the rows; `*` stands for the slices of the first dimension.
        inferred: found by looking at the model rather than by a family file.
        outer_axes: of the parameters in `outer`, each dimension with its spaces, where the family file says.
    """

    family: str
    model_type: str
    blocks_path: str
    base_prefix: str
    blocks: tuple[Block, ...]
    outer: dict[str, Shape]
    embedding: str
    norm: str
    head: str
    tied: dict[str, str]
    spaces: dict[str, int]
    keys: dict[str, str]
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inferred: bool = False
    outer_axes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Elements of all parameters and persistent buffers; tied ones count once."""
        return self.block_parameters + sum(map(prod, self.outer.values()))

    @property
    def block_parameters(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def prunable_parameters(self) -> int:
        """Elements of the matrices inside blocks: the denominator of `sparsity`."""
        return sum(block.prunable_parameters for block in self.blocks)

    def summary(self) -> dict[str, Any]:
        """What a user wants to see at a glance, JSON-able; blocks that are alike are listed once."""
        return {
            "family": self.family,
            "model_type": self.model_type,
            "inferred": self.inferred,
            "blocks": len(self.blocks),
            "spaces": dict(self.spaces),
            "tied": dict(self.tied),
            "parameters": self.parameters,
            "parameters_in_blocks": self.block_parameters,
            "parameters_prunable": self.prunable_parameters,
            "block_kinds": self._kinds(),
        }

    def _kinds(self) -> list[dict[str, Any]]:
        alike: dict[int, list[Block]] = {}
        for block in self.blocks:
            alike.setdefault(id(block.matrices), []).append(block)
        return [
            {
                "blocks": [block.index for block in blocks],
                "matrices": [_row(m, blocks[0].matrices) for m in blocks[0].matrices if not m.expert],
            }
            for blocks in alike.values()
        ]


def _row(matrix: Matrix, matrices: tuple[Matrix, ...]) -> dict[str, Any]:
    """One line of the summary; the experts of one parameter share it."""
    name = matrix.name if matrix.expert is None else matrix.parameter
    count = 1 if matrix.expert is None else sum(other.parameter == matrix.parameter for other in matrices)
    rows, columns = matrix.shape
    return {"name": name, "rows": rows, "columns": columns, "count": count, "input": matrix.input}
