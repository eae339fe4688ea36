"""From a config to an `Anatomy`: a family file evaluated against it, then verified against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.anatomy.axes import evaluate, parse_axis
from secateur.anatomy.family import Family, MatrixEntry, load_family
from secateur.anatomy.infer import infer
from secateur.anatomy.model import Anatomy, Axis, Block, Matrix, Shape, Site
from secateur.anatomy.outline import Outline, outline
from secateur.anatomy.refusal import REMEDY
from secateur.anatomy.skeleton import build_meta, build_skeleton, check_decoder
from secateur.anatomy.template import Template
from secateur.core.errors import AnatomyError

__all__ = ["build_skeleton", "resolve"]


def resolve(config: PretrainedConfig, skeleton: PreTrainedModel | None = None) -> Anatomy:
    """The anatomy of the decoder that `config` describes; no weight is read.

    Args:
        config: of a text-only decoder.
        skeleton: a model of this config, real or on the meta device, where the caller has one already.

    Raises:
        AnatomyError: not a decoder, or a parameter whose role is not known for certain.
    """
    check_decoder(config)
    model = skeleton if skeleton is not None else build_meta(config)
    family = load_family(config.model_type)
    if family is None:
        return infer(config, model)
    return _Resolver(family, config, outline(model, family.blocks)).anatomy(family.norm)


class _Resolver:
    def __init__(self, family: Family, config: PretrainedConfig, model: Outline) -> None:
        self.family, self.config, self.model = family, config, model
        self.spaces = _sizes(config, family.spaces)
        self.sizes = _sizes(config, family.sizes)
        self.templates: dict[frozenset[tuple[str, Shape]], Template] = {}

    def anatomy(self, norm: str) -> Anatomy:
        model = self.model
        return Anatomy(
            family=self.config.model_type,
            model_type=self.config.model_type,
            blocks_path=self.family.blocks,
            base_prefix=model.base_prefix,
            blocks=tuple(self._block(index) for index in range(len(model.blocks))),
            outer=model.outer,
            embedding=model.embedding,
            norm=norm if any(name.startswith(norm + ".") for name in model.outer) else "",
            head=model.head,
            tied=model.tied,
            spaces=self.spaces,
            keys=_keys(self.family.spaces),
            files={name: tuple(stored) for name, stored in self.family.files.items()},
        )

    def _block(self, index: int) -> Block:
        module, shapes = self.model.blocks[index], self.model.shapes[index]
        declared = self.family.matrices.items()
        entries = {path: entry for path, entry in declared if _parameter(path, entry) in shapes}
        alike = frozenset(shapes.items())
        if alike not in self.templates:
            self.templates[alike] = self._template(entries, shapes)
        for path, entry in entries.items():
            _check_layout(module, path, entry)
        return self.templates[alike].block(self.family.blocks, index)

    def _template(self, entries: Mapping[str, MatrixEntry], shapes: dict[str, Shape]) -> Template:
        axes = self._axes(entries, shapes)
        self._verify(shapes, axes)
        sites: dict[str, Site] = {}
        for path, entry in entries.items():
            sites.setdefault(entry.input or path, _site(path, entry))
        matrices = (matrix for path, entry in entries.items() for matrix in self._matrices(path, entry))
        return Template(tuple(matrices), sites, axes, shapes)

    def _axes(
        self, entries: Mapping[str, MatrixEntry], shapes: Mapping[str, Shape]
    ) -> dict[str, tuple[Axis, ...]]:
        """What the family file says about the parameters that are there, in the order of the model."""
        axes: dict[str, tuple[Axis, ...]] = {}
        for path, entry in entries.items():
            axes[_parameter(path, entry)] = self._matrix_axes(entry)
            axes[f"{path}.bias"] = (self._axis(entry.rows),)
        for name, expressions in self.family.vectors.items():
            if name in shapes:
                axes[name] = tuple(map(self._axis, _listed(expressions)))
        return {name: axes[name] for name in shapes if name in axes}

    def _axis(self, expression: str) -> Axis:
        try:
            return parse_axis(expression, self.spaces, self.sizes)
        except AnatomyError as error:
            raise AnatomyError(
                f"{error} (family file of {self.config.model_type!r})",
                "",
                "check the config for missing keys",
            ) from error

    def _matrices(self, path: str, entry: MatrixEntry) -> list[Matrix]:
        parameter = _parameter(path, entry)
        rows, columns = self._axis(entry.rows), self._axis(entry.columns)
        transposed, site = entry.transposed, entry.input or path
        if entry.experts is None:
            return [Matrix(path, parameter, None, transposed, rows, columns, site)]
        return [
            Matrix(f"{path}.{expert}", parameter, expert, transposed, rows, columns, site)
            for expert in range(self._axis(entry.experts).size)
        ]

    def _matrix_axes(self, entry: MatrixEntry) -> tuple[Axis, ...]:
        """In the order of the dimensions in memory."""
        plane = [self._axis(entry.rows), self._axis(entry.columns)]
        if entry.transposed:
            plane.reverse()
        return (self._axis(entry.experts), *plane) if entry.experts else tuple(plane)

    def _verify(self, shapes: Mapping[str, Shape], axes: Mapping[str, tuple[Axis, ...]]) -> None:
        kind = self.config.model_type
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


def _parameter(path: str, entry: MatrixEntry) -> str:
    return path if entry.experts else f"{path}.weight"


def _site(path: str, entry: MatrixEntry) -> Site:
    module = path.rpartition(".")[0] if entry.experts else path
    return Site(entry.input or path, module, entry.kind)


def _check_layout(block: nn.Module, path: str, entry: MatrixEntry) -> None:
    """A square matrix does not show by its shape which way it lies; its module does."""
    if entry.experts:
        experts = block.get_submodule(path.rpartition(".")[0])
        transposed = getattr(experts, "is_transposed", None)
    else:
        transposed = isinstance(block.get_submodule(path), Conv1D)
    if transposed is not None and transposed != entry.transposed:
        raise AnatomyError(
            f"{path} is stored as {'(in, out)' if transposed else '(out, in)'}",
            f"{entry.layout} from its family file",
            REMEDY,
        )


def _sizes(config: PretrainedConfig, expressions: Mapping[str, str | list[str]]) -> dict[str, int]:
    """Those sizes that the config gives; others are missed only when a parameter needs them."""

    def lookup(key: str) -> int | None:
        value = getattr(config, key, None)
        return value if isinstance(value, int) else None

    found: dict[str, int] = {}
    for name, alternatives in expressions.items():
        values = (evaluate(expression, lookup) for expression in _listed(alternatives))
        value = next((value for value in values if value is not None), None)
        if value is not None:
            found[name] = value
    return found


def _keys(expressions: Mapping[str, str | list[str]]) -> dict[str, str]:
    """The config key behind each space that is one key, rather than computed from others."""
    plain = ((name, _first_key(_listed(alternatives))) for name, alternatives in expressions.items())
    return {name: key for name, key in plain if key is not None}


def _first_key(alternatives: Iterable[str]) -> str | None:
    return next((text for text in alternatives if text.isidentifier()), None)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
