"""From a config to an `Anatomy`: a family file evaluated against it, then verified against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.anatomy.axes import evaluate, parse_axis
from secateur.anatomy.family import Family, MatrixEntry, load_family
from secateur.anatomy.infer import infer
from secateur.anatomy.model import Anatomy, Axis, Block, Matrix, Shape, Site
from secateur.anatomy.outline import Outline, outline
from secateur.anatomy.skeleton import build_meta, build_skeleton, check_decoder
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


@dataclass(frozen=True)
class _Template:
    """What blocks with the same parameters have in common."""

    matrices: tuple[Matrix, ...]
    sites: dict[str, Site]
    axes: dict[str, tuple[Axis, ...]]


class _Resolver:
    def __init__(self, family: Family, config: PretrainedConfig, model: Outline) -> None:
        self.family, self.config, self.model = family, config, model
        self.spaces = _sizes(config, family.spaces)
        self.sizes = _sizes(config, family.sizes)
        self.templates: dict[frozenset[tuple[str, Shape]], _Template] = {}

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
        shapes = self.model.shapes[index]
        signature = frozenset(shapes.items())
        template = self.templates.get(signature)
        if template is None:
            template = self.templates[signature] = self._template(self.model.blocks[index], shapes)
        prefix = f"{self.family.blocks}.{index}"
        return Block(index, prefix, template.matrices, template.sites, shapes, template.axes)

    def _template(self, block: nn.Module, shapes: Mapping[str, Shape]) -> _Template:
        axes: dict[str, tuple[Axis, ...]] = {}
        matrices: list[Matrix] = []
        sites: dict[str, Site] = {}
        for path, entry in self.family.matrices.items():
            parameter = path if entry.experts else f"{path}.weight"
            if parameter not in shapes:
                continue
            made = self._matrices(path, parameter, entry)
            _check_layout(block, path, entry)
            matrices += made
            axes[parameter] = self._matrix_axes(entry)
            axes[f"{path}.bias"] = (made[0].rows,)
            sites.setdefault(made[0].input, _site(path, entry))
        for name, expressions in self.family.vectors.items():
            if name in shapes:
                axes[name] = tuple(map(self._axis, _listed(expressions)))
        axes = {name: axes[name] for name in shapes if name in axes}
        self._verify(shapes, axes)
        return _Template(tuple(matrices), sites, axes)

    def _axis(self, expression: str) -> Axis:
        try:
            return parse_axis(expression, self.spaces, self.sizes)
        except AnatomyError as error:
            raise AnatomyError(
                f"{error} (family file of {self.config.model_type!r})",
                "",
                "check the config for missing keys",
            ) from error

    def _matrices(self, path: str, parameter: str, entry: MatrixEntry) -> list[Matrix]:
        rows, columns = self._axis(entry.rows), self._axis(entry.columns)
        transposed, site = entry.transposed, entry.input or path
        if entry.experts is None:
            return [Matrix(path, parameter, None, transposed, rows, columns, site)]
        experts = self._axis(entry.experts).size
        return [
            Matrix(f"{path}.{expert}", parameter, expert, transposed, rows, columns, site)
            for expert in range(experts)
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
                "this version of transformers is not known; see the docs, 'add a model family'",
            )
        for name, declared in axes.items():
            expected = tuple(axis.size for axis in declared)
            if shapes[name] != expected:
                raise AnatomyError(
                    f"{name} of {kind!r} has shape {shapes[name]}",
                    f"{expected} from its family file",
                    "see the docs, 'add a model family'",
                )


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
            "see the docs, 'add a model family'",
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
