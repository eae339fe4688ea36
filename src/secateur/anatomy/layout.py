"""Names and shapes on disk against names and shapes in memory: a bijection, one block at a time.

Three things differ between a checkpoint and the loaded model: the prefix of the base model may be left out,
some families rename, and experts lie on disk as one 2-D tensor an expert and projection but in memory as one
3-D parameter. Which of these hold is read off the tensor names of the very checkpoint, so what is written has
the form of what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from secateur.anatomy.model import Anatomy, Axis, Block, Matrix, Shape
from secateur.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FileLayout", "Piece"]

EXPERT = "*"


@dataclass(frozen=True)
class Piece:
    """A tensor on disk and where it lies in a parameter: which expert, which rows (`None`: all of them)."""

    name: str
    shape: Shape
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` that this piece is."""
        part = parameter if self.expert is None else parameter[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class _Stored:
    """How one parameter is stored."""

    shape: Shape
    pieces: tuple[Piece, ...]

    def assemble(self, tensors: Mapping[str, Tensor]) -> Tensor:
        first = tensors[self.pieces[0].name]
        if self._whole:
            return first
        parameter = first.new_empty(self.shape)
        for piece in self.pieces:
            tensor = tensors[piece.name]
            if tensor.dtype != first.dtype:
                raise CheckpointError(
                    f"{piece.name} is {tensor.dtype} and {self.pieces[0].name} is {first.dtype}",
                    "one dtype for tensors that become one parameter",
                    "convert the checkpoint to one dtype first",
                )
            piece.of(parameter).copy_(tensor)
        return parameter

    def disassemble(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((piece.name, piece.of(parameter)) for piece in self.pieces)

    @property
    def _whole(self) -> bool:
        return len(self.pieces) == 1 and self.pieces[0].shape == self.shape


class FileLayout:
    """The layout of one checkpoint.

    Attributes:
        untouched: tensors of no parameter (rotary tables, prediction layers that are not loaded, ...),
            to be carried over as they are.

    Args:
        anatomy: of the model.
        tensors: shape of every tensor on disk, None for those yet to be written.

    Raises:
        CheckpointError: a parameter without a tensor, or of another shape than its tensor.
    """

    def __init__(self, anatomy: Anatomy, tensors: Mapping[str, Shape | None]) -> None:
        self._anatomy, self._tensors = anatomy, tensors
        self._blocks = [self._block(block) for block in anatomy.blocks]
        self._outer = self._outer_parameters()
        used = {name for index in range(len(self._blocks)) for name in self.block_names(index)}
        used.update(self.outer_names())
        self.untouched = [name for name in tensors if name not in used]

    def block_names(self, index: int, only: Collection[str] | None = None) -> list[str]:
        """Names on disk of what block `index`, or `only` these parameters of it, are made of."""
        return _names(self._chosen(index, only))

    def names_of(self, index: int, parameter: str) -> list[str]:
        """Names on disk of one parameter of block `index`."""
        return _names({parameter: self._blocks[index][parameter]})

    def block_shapes(self) -> list[dict[str, Shape]]:
        """For every block, by name on disk, the shape of what is stored."""
        return [_shapes(block) for block in self._blocks]

    def outer_shapes(self) -> dict[str, Shape]:
        """The same of what stands outside the blocks."""
        return _shapes(self._outer)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self._blocks)

    def outer_names(self) -> list[str]:
        """Names on disk of embedding, head, norms and whatever else stands outside the blocks."""
        return _names(self._outer)

    def head_names(self) -> list[str]:
        """Those of `outer_names()` that only the head reads: none where it is tied to the embedding."""
        anatomy = self._anatomy
        shared = anatomy.tied.keys() | anatomy.tied.values()
        own = [name for name in self._outer if name.startswith(f"{anatomy.head}.") and name not in shared]
        return _names({name: self._outer[name] for name in own})

    def assemble(
        self, index: int, tensors: Mapping[str, Tensor], only: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Tensors of `block_names(index, only)` -> its parameters and buffers by name inside the block.

        Whole tensors are handed on without a copy. Raises `CheckpointError` when parts of one parameter
        differ in dtype.
        """
        return {name: stored.assemble(tensors) for name, stored in self._chosen(index, only).items()}

    def pieces(self, index: int, parameter: str) -> tuple[Piece, ...]:
        """What one parameter of block `index` is stored as."""
        return self._blocks[index][parameter].pieces

    def pieces_of(self, index: int, matrix: Matrix) -> list[Piece]:
        """What one matrix is stored as; of an expert, tensors of its own alone."""
        return [piece for piece in self.pieces(index, matrix.parameter) if piece.expert == matrix.expert]

    def files_of(self, index: int, parameter: str) -> list[str]:
        """Names on disk of one parameter of block `index`."""
        return [piece.name for piece in self._blocks[index][parameter].pieces]

    def assemble_one(self, index: int, parameter: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """`assemble` for one parameter, from the tensors of `files_of`."""
        return self._blocks[index][parameter].assemble(tensors)

    def outer_files(self) -> dict[str, list[str]]:
        """Names on disk of every parameter outside the blocks; of tied ones those that the files have."""
        return {name: _names({name: stored}) for name, stored in self._outer.items()}

    def disassemble(self, index: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The exact inverse of `assemble`; the tensors are views of the parameters."""
        block = self._blocks[index].items()
        return dict(piece for name, stored in block for piece in stored.disassemble(parameters[name]))

    def assemble_outer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of `outer_names()`, or of some of them, -> full names in the model.

        A tied parameter is there under all its names, as one tensor, unless the files hold two that differ:
        then, as in `from_pretrained`, they are two parameters.
        """
        present = {name: form for name, form in self._outer.items() if form.pieces[0].name in tensors}
        found = {name: stored.assemble(tensors) for name, stored in present.items()}
        for source in dict.fromkeys(self._anatomy.tied.values()):
            names = self._tied_names(source)
            shared = next((found[name] for name in names if name in found), None)
            if shared is None:
                continue
            found |= {name: shared for name in names if name not in found or _same(found[name], shared)}
        return found

    def _chosen(self, index: int, only: Collection[str] | None) -> dict[str, _Stored]:
        block = self._blocks[index]
        return block if only is None else {name: form for name, form in block.items() if name in only}

    def disassemble_outer(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `assemble_outer`; the tensors are views of the parameters."""
        outer = self._outer.items()
        return dict(piece for name, stored in outer for piece in stored.disassemble(parameters[name]))

    def _tied_names(self, source: str) -> list[str]:
        return [source, *(alias for alias, known in self._anatomy.tied.items() if known == source)]

    def _block(self, block: Block) -> dict[str, _Stored]:
        return {
            name: self._require(f"{block.prefix}.{name}", partial(self._forms, block, name))
            for name in block.parameters
        }

    def _outer_parameters(self) -> dict[str, _Stored]:
        """Of tied names those that the files have, at least one."""
        stored: dict[str, _Stored] = {}
        for name, shape in self._anatomy.outer.items():
            names = self._tied_names(name)
            found = {known: self._find(self._outer_forms(known, shape)) for known in names}
            present = {known: self._check(known, form) for known, form in found.items() if form is not None}
            stored.update(present or {name: self._require(name, partial(self._outer_forms, name, shape))})
        return stored

    def _forms(self, block: Block, name: str) -> Iterator[_Stored]:
        """Ways in which a parameter of a block may be stored, the likeliest first."""
        shape = block.parameters[name]
        for prefix in self._prefixes(block.prefix + "."):
            yield _Stored(shape, (Piece(prefix + name, shape),))
            if name in self._anatomy.files:
                yield _Stored(shape, tuple(self._pieces(block, name, prefix)))

    def _outer_forms(self, name: str, shape: Shape) -> Iterator[_Stored]:
        for candidate in (name, *self._anatomy.files.get(name, ())):
            for variant in self._prefixes(candidate):
                yield _Stored(shape, (Piece(variant, shape),))

    def _pieces(self, block: Block, name: str, prefix: str) -> Iterator[Piece]:
        """The parts of a parameter: for each expert the row segments in order, one a name."""
        shape = block.parameters[name]
        patterns = [prefix + pattern for pattern in self._anatomy.files[name]]
        experts: Iterable[int | None] = range(shape[0]) if EXPERT in patterns[0] else (None,)
        plane = shape if experts == (None,) else shape[1:]
        parts = _parts(block.axes[name][len(shape) - len(plane)], len(patterns))
        for expert in experts:
            for pattern, rows in zip(patterns, parts, strict=True):
                size = plane if rows is None else (rows[1] - rows[0], *plane[1:])
                yield Piece(pattern.replace(EXPERT, str(expert)), size, expert, rows)

    def _prefixes(self, name: str) -> list[str]:
        """A full name, and the same without the prefix of the base model."""
        base = self._anatomy.base_prefix + "."
        return [name, name.removeprefix(base)] if base != "." and name.startswith(base) else [name]

    def _find(self, forms: Iterable[_Stored]) -> _Stored | None:
        return next((form for form in forms if not self._missing(form)), None)

    def _missing(self, form: _Stored) -> list[str]:
        return [piece.name for piece in form.pieces if piece.name not in self._tensors]

    def _require(self, parameter: str, forms: Callable[[], Iterable[_Stored]]) -> _Stored:
        found = self._find(forms())
        if found is None:
            likeliest = min(forms(), key=lambda form: len(self._missing(form)) / len(form.pieces))
            raise CheckpointError(
                f"the files have no tensor {self._missing(likeliest)[0]}",
                f"one for {parameter}",
                "the checkpoint is incomplete, or not one of this config",
            )
        return self._check(parameter, found)

    def _check(self, parameter: str, stored: _Stored) -> _Stored:
        for piece in stored.pieces:
            seen = self._tensors[piece.name]
            if seen is not None and tuple(seen) != piece.shape:
                raise CheckpointError(
                    f"{piece.name} has shape {tuple(seen)} on disk",
                    f"{piece.shape} for {parameter}",
                    "the config does not belong to these files",
                )
        return stored


def _parts(rows: Axis, count: int) -> list[tuple[int, int] | None]:
    """Where `count` tensors lie along the rows: one is all of them, several are the segments."""
    if count == 1:
        return [None]
    stops = list(accumulate(segment.size for segment in rows.segments))
    return list(zip([0, *stops], stops, strict=False))


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.equal(other))


def _names(parameters: Mapping[str, _Stored]) -> list[str]:
    return [piece.name for stored in parameters.values() for piece in stored.pieces]


def _shapes(parameters: Mapping[str, _Stored]) -> dict[str, Shape]:
    return {piece.name: piece.shape for stored in parameters.values() for piece in stored.pieces}
