"""From a family file and the outline of a model to its anatomy, every parameter verified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.anatomy.family import Family, MatrixEntry, listed
from secateur.anatomy.model import Anatomy, Axis, Block, Matrix, Shape, Site
from secateur.anatomy.outline import Outline
from secateur.anatomy.refusal import REMEDY
from secateur.anatomy.sizes import Sizes
from secateur.anatomy.template import Template
from secateur.core.errors import AnatomyError

__all__ = ["assemble"]


def assemble(
    family: Family, sizes: Sizes, outline: Outline, block_sizes: Mapping[int, Sizes] | None = None
) -> Anatomy:
    """The anatomy of the model of this outline.

    Args:
        block_sizes: of blocks that differ from `sizes`.

    Raises:
        AnatomyError: a parameter of a block that the family file does not declare, or declares otherwise.
    """
    resolver = _Resolver(family, sizes, outline, block_sizes or {})
    has_norm = any(name.startswith(family.norm + ".") for name in outline.outer)
    return Anatomy(
        family=sizes.model_type,
        model_type=sizes.model_type,
        blocks_path=family.blocks,
        base_prefix=outline.base_prefix,
        blocks=tuple(map(resolver.block, range(len(outline.shapes)))),
        outer=outline.outer,
        embedding=outline.embedding,
        norm=family.norm if has_norm else "",
        head=outline.head,
        tied=outline.tied,
        spaces=sizes.spaces,
        keys=_keys(family.spaces),
        files={name: tuple(stored) for name, stored in family.files.items()},
        outer_axes=_outer_axes(family, sizes, outline),
    )


class _Resolver:
    def __init__(
        self, family: Family, sizes: Sizes, outline: Outline, block_sizes: Mapping[int, Sizes]
    ) -> None:
        self.family, self.sizes, self.outline, self.block_sizes = family, sizes, outline, block_sizes
        self.templates: dict[frozenset[tuple[str, Shape]], Template] = {}

    def block(self, index: int) -> Block:
        shapes, transposed = self.outline.shapes[index], self.outline.transposed[index]
        declared = self.family.matrices.items()
        entries = {path: entry for path, entry in declared if entry.parameter(path) in shapes}
        alike = frozenset(shapes.items())
        if alike not in self.templates:
            own = self.block_sizes.get(index, self.sizes)
            self.templates[alike] = _Blueprint(self.family, own).template(entries, shapes)
        for path, entry in entries.items():
            _check_layout(path, entry, transposed)
        return self.templates[alike].block(self.family.blocks, index)


@dataclass(frozen=True)
class _Blueprint:
    """What the family file says about a block of these sizes."""

    family: Family
    sizes: Sizes

    def template(self, entries: Mapping[str, MatrixEntry], shapes: dict[str, Shape]) -> Template:
        axes = self._axes(shapes)
        self._verify(shapes, axes)
        sites: dict[str, Site] = {}
        for path, entry in entries.items():
            sites.setdefault(entry.input or path, Site(entry.input or path, _module(path, entry), entry.kind))
        matrices = (matrix for path, entry in entries.items() for matrix in self._matrices(path, entry))
        return Template(tuple(matrices), sites, axes, shapes)

    def _axes(self, shapes: Iterable[str]) -> dict[str, tuple[Axis, ...]]:
        """What the family file says about the parameters that are there, in the order of the model."""
        declared = self.family.parameters
        return {name: self.sizes.axes(declared[name]) for name in shapes if name in declared}

    def _matrices(self, path: str, entry: MatrixEntry) -> list[Matrix]:
        parameter = entry.parameter(path)
        rows, columns = self.sizes.axis(entry.rows), self.sizes.axis(entry.columns)
        transposed, site = entry.transposed, entry.input or path
        if entry.experts is None:
            return [Matrix(path, parameter, None, transposed, rows, columns, site)]
        return [
            Matrix(f"{path}.{expert}", parameter, expert, transposed, rows, columns, site)
            for expert in range(self.sizes.axis(entry.experts).size)
        ]

    def _verify(self, shapes: Mapping[str, Shape], axes: Mapping[str, tuple[Axis, ...]]) -> None:
        kind = self.sizes.model_type
        unknown = [name for name in shapes if name not in axes]
        if unknown:
            raise AnatomyError(
                f"a block of {kind!r} has {', '.join(unknown)}",
                "only parameters that its family file declares",
                f"this version of transformers is not known; {REMEDY}",
            )
        for name, declared in axes.items():
            expected = tuple(axis.size for axis in declared)
            if shapes[name] != expected:
                raise AnatomyError(
                    f"{name} of {kind!r} has shape {shapes[name]}",
                    f"{expected} from its family file",
                    REMEDY,
                )


def _outer_axes(family: Family, sizes: Sizes, outline: Outline) -> dict[str, tuple[Axis, ...]]:
    """What the family file says about parameters outside the blocks, where it says it of this very shape."""
    found: dict[str, tuple[Axis, ...]] = {}
    for name in outline.outer.keys() & family.outer.keys():
        axes = sizes.axes(listed(family.outer[name]))
        if tuple(axis.size for axis in axes) == outline.outer[name]:
            found[name] = axes
    return found


def _module(path: str, entry: MatrixEntry) -> str:
    return path.rpartition(".")[0] if entry.experts else path


def _check_layout(path: str, entry: MatrixEntry, transposed: Mapping[str, bool]) -> None:
    """A square matrix does not show by its shape which way it lies; its module does."""
    seen = transposed.get(_module(path, entry))
    if seen is not None and seen != entry.transposed:
        raise AnatomyError(
            f"{path} is stored as {'(in, out)' if seen else '(out, in)'}",
            f"{entry.layout} from its family file",
            REMEDY,
        )


def _keys(expressions: Mapping[str, str | list[str]]) -> dict[str, str]:
    """The config key behind each space that is one key, rather than computed from others."""
    plain = ((name, _first_key(listed(alternatives))) for name, alternatives in expressions.items())
    return {name: key for name, key in plain if key is not None}


def _first_key(alternatives: Iterable[str]) -> str | None:
    return next((text for text in alternatives if text.isidentifier()), None)
