"""Family files: `families/<model_type>.yaml`, read, merged with the file they extend, and checked."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib import resources
from typing import Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from secateur.anatomy.model import SiteKind
from secateur.core.errors import AnatomyError

__all__ = ["Family", "MatrixEntry", "known_families", "listed", "load_family"]

_FOLDER = resources.files("secateur.anatomy") / "families"
_SECTIONS = (
    *("spaces", "sizes", "matrices", "vectors", "parts", "files", "norms", "outer", "when", "aliases"),
    "defaults",
)
_NULL_IS_A_VALUE = "defaults"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class MatrixEntry(_Entry):
    """A prunable matrix, or with `experts` one of each expert.

    Attributes:
        rows, columns: axis expressions of the output and the input.
        input: site shared by the matrices that read one tensor; a site of its own when left out.
            Expert matrices read `experts_input` (first product) or `experts_hidden` (second).
        experts: axis expression of the first dimension of a 3-D parameter.
        layout: `in_out` where the tensor is stored transposed.
    """

    rows: str
    columns: str
    input: str | None = None
    experts: str | None = None
    layout: Literal["out_in", "in_out"] = "out_in"

    @model_validator(mode="after")
    def _check_input(self) -> MatrixEntry:
        kinds = [kind for kind in get_args(SiteKind) if kind != "input"]
        if (self.experts is not None) != (self.input in kinds):
            raise ValueError(f"matrices of experts, and no others, read {' or '.join(kinds)}")
        return self

    @property
    def transposed(self) -> bool:
        return self.layout == "in_out"

    def parameter(self, path: str) -> str:
        """The parameter of a matrix at `path`, or of all its experts."""
        return path if self.experts else f"{path}.weight"

    @property
    def kind(self) -> SiteKind:
        """How the input can be observed."""
        return cast(SiteKind, self.input) if self.experts else "input"


class ExpertsEntry(_Entry):
    """Config keys of routed experts: how many a token visits, and where they stand in groups, how many groups
    there are and how many of them a token visits."""

    visited: str
    groups: str | None = None
    visited_groups: str | None = None


class Family(_Entry):
    """One family file. See docs: "add a model family".

    Attributes:
        blocks: path of the list of blocks.
        norm: path of the norm before the head.
        spaces: dimensions that can be resized -> size expression over config keys, or several to try in turn.
        sizes: other numbers that shapes are made of.
        matrices: by module path inside the block. Their biases need no mention.
        vectors: all other parameters and persistent buffers of a block, with one axis expression a dimension.
        parts: sub-blocks that add to the residual stream, `self_attn` and `mlp` -> the modules that serve
            nothing else, each with what stands in for its output when the part is removed: its `input`,
            `zeros`, or a `pair` of zeros and nothing.
        parts_when: condition without which the parts of a block cannot be removed.
        files: parameters that are stored under other names than in memory.
        norms: of a block that adds attention(norm(x)) and then feed_forward(norm(x)) to x and does nothing
            else: the two norms in this order, each with the module that reads it, or with several that are
            called one after the other. Only such models can be sliced.
        square_attention: the module whose class takes the width of a head from the hidden size and the number
            of heads, so that heads are together as wide as the model; empty where the config states it.
        experts: keys of the router, where there are experts.
        norms_when: condition without which they cannot.
        centred: norms subtract the mean.
        parallel_when: condition under which both norms read what enters the block.

    The rest is needed only to say from `config.json` alone, without the model, what the model is made of:

    Attributes:
        embedding, head: module paths.
        outer: all parameters outside the blocks, as `vectors`, by full name.
        when: patterns of parameter names -> the condition under which such a parameter is there (`index` is
            the place of the block; `*` stands for one part of a name, or some of it). Biases of matrices
            are there only where a pattern names them, all others unless one rules them out.
        aliases: config keys -> other names of them.
        defaults: of config keys that files may leave out, as in the configuration class.
        assumes: conditions without which the model must be asked.
        foreign: config keys whose presence makes another model of it.
    """

    blocks: str
    norm: str
    embedding: str = ""
    head: str = ""
    spaces: dict[str, str | list[str]]
    sizes: dict[str, str | list[str]] = {}
    matrices: dict[str, MatrixEntry]
    vectors: dict[str, str | list[str]]
    parts: dict[str, dict[str, Literal["input", "zeros", "pair"]]] = {}
    parts_when: str = ""
    files: dict[str, list[str]] = {}
    square_attention: str = ""
    experts: ExpertsEntry | None = None
    norms: dict[str, str | list[str]] = {}
    norms_when: str = ""
    centred: bool = False
    parallel_when: str = ""
    outer: dict[str, str | list[str]] = {}
    when: dict[str, str | bool] = {}
    aliases: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    assumes: list[str] = []
    foreign: list[str] = []

    @cached_property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Axis expressions of every parameter that a block may have, in the order of its dimensions."""
        found: dict[str, tuple[str, ...]] = {}
        for path, entry in self.matrices.items():
            plane = (entry.columns, entry.rows) if entry.transposed else (entry.rows, entry.columns)
            found[entry.parameter(path)] = (entry.experts, *plane) if entry.experts else plane
        found.update({name: (self.matrices[path].rows,) for name, path in self.biases.items()})
        return found | {name: tuple(listed(axes)) for name, axes in self.vectors.items()}

    @cached_property
    def biases(self) -> dict[str, str]:
        """The bias that each matrix outside the experts may have -> its matrix."""
        return {f"{path}.bias": path for path, entry in self.matrices.items() if not entry.experts}

    @cached_property
    def bias_switches(self) -> dict[str, str]:
        """Biases that are there if and only if one config key is true -> that key."""
        asked = {name: self.conditions(name) for name in self.biases}
        return {
            name: found[0]
            for name, found in asked.items()
            if len(found) == 1 and isinstance(found[0], str) and found[0].isidentifier()
        }

    def conditions(self, name: str) -> list[str | bool]:
        """What `when` says about a parameter."""
        return [condition for pattern, condition in self.when.items() if _matches(pattern, name)]


def known_families() -> tuple[str, ...]:
    """Model types with a family file."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


@cache
def load_family(model_type: str) -> Family | None:
    """The family file of a model type, `None` without one. Raises `AnatomyError` when it is malformed."""
    if model_type not in known_families():
        return None
    try:
        return Family.model_validate(_merged(model_type))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise AnatomyError(f"family file {model_type}.yaml, {place}", first["msg"].lower()) from error


def _merged(name: str) -> dict[str, Any]:
    """The file over the one it `extends`, entry by entry; an entry set to null is taken out."""
    content: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    parent = content.pop("extends", None)
    if parent is None:
        return content
    merged = {**_merged(parent), **{key: value for key, value in content.items() if key not in _SECTIONS}}
    for section in _SECTIONS:
        entries = {**merged.get(section, {}), **content.get(section, {})}
        kept = section == _NULL_IS_A_VALUE
        merged[section] = {key: value for key, value in entries.items() if kept or value is not None}
    return merged


def _matches(pattern: str, name: str) -> bool:
    """Part by part: `*` does not reach over a dot."""
    patterns, parts = pattern.split("."), name.split(".")
    return len(patterns) == len(parts) and all(map(fnmatchcase, parts, patterns))


def listed(value: str | list[str]) -> list[str]:
    """Family files write a list of one without its brackets."""
    return [value] if isinstance(value, str) else value
