"""The parts of a block that add to the residual stream, and blocks without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

from secateur.anatomy.conditions import holds
from secateur.anatomy.config import values_of
from secateur.anatomy.family import load_family
from secateur.anatomy.model import Block
from secateur.anatomy.refusal import REMEDY
from secateur.core.errors import AnatomyError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

__all__ = ["Parts", "belongs_to", "part_sizes", "parts_of", "without"]

Parts = Mapping[str, Mapping[str, str]]
"""Part -> the modules that serve nothing else -> what stands in for their output (see `Family.parts`)."""


def parts_of(config: PretrainedConfig) -> Parts:
    """The parts of the blocks of a model.

    Raises:
        AnatomyError: a family whose file does not tell, or blocks that do more than add them up.
    """
    kind = getattr(config, "base_model_type", config.model_type)
    family = load_family(kind)
    if family is None or not family.parts:
        raise AnatomyError(
            f"it is not known which modules of {kind!r} are attention and which feed-forward",
            "parts in a family file",
            f"remove whole blocks, or write one: {REMEDY}",
        )
    if family.parts_when and not holds(family.parts_when, values_of(config)):
        raise AnatomyError(
            f"blocks of this {kind!r} do more than add their parts to what enters",
            family.parts_when,
            "remove whole blocks",
        )
    return family.parts


def belongs_to(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter (by its name inside the block) lies in one of these modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def part_sizes(block: Block, parts: Parts) -> dict[str, int]:
    """Parameters of each part that the block has."""
    shapes = block.parameters.items()
    sizes = {
        part: sum(prod(shape) for name, shape in shapes if belongs_to(name, modules))
        for part, modules in parts.items()
    }
    return {part: size for part, size in sizes.items() if size}


@contextmanager
def without(block: nn.Module, modules: Mapping[str, str], index: int) -> Iterator[None]:
    """The block without these modules, as it will be loaded; inside they are put aside."""
    from secateur.loading.modeling_secateur import StandIn

    aside = {name: block.get_submodule(name) for name in modules}
    try:
        for name, gives in modules.items():
            block.set_submodule(name, StandIn(gives, index))
        yield
    finally:
        for name, module in aside.items():
            block.set_submodule(name, module)
