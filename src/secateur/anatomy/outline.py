"""What can be read off a model by looking at it: names, shapes, tied parameters, embedding and head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from secateur.anatomy.model import Shape
from secateur.anatomy.refusal import REMEDY
from secateur.core.errors import AnatomyError

__all__ = ["Outline", "outline"]


@dataclass(frozen=True)
class Outline:
    """A model seen from outside.

    Attributes:
        blocks: the modules of the stack.
        shapes: of each block, parameters and persistent buffers by name inside the block.
        outer: the same outside the blocks, without aliases.
        tied: alias -> name in `outer`.
        base_prefix, embedding, head: module paths; the prefix is empty without a base model inside.
    """

    blocks: list[nn.Module]
    shapes: list[dict[str, Shape]]
    outer: dict[str, Shape]
    tied: dict[str, str]
    base_prefix: str
    embedding: str
    head: str


def outline(model: PreTrainedModel, blocks_path: str) -> Outline:
    """Look at `model`, whose blocks are at `blocks_path`.

    Raises:
        AnatomyError: no list of blocks there, blocks that share parameters, no embedding or no head.
    """
    blocks = _blocks(model, blocks_path)
    base = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    shapes, outer, tied = _split(model, blocks_path, len(blocks))
    return Outline(
        blocks=blocks,
        shapes=shapes,
        outer=outer,
        tied=tied,
        base_prefix=base,
        embedding=_path(model, model.get_input_embeddings(), "token embedding"),
        head=_path(model, model.get_output_embeddings(), "language model head"),
    )


def _blocks(model: PreTrainedModel, path: str) -> list[nn.Module]:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    expected: int = model.config.num_hidden_layers
    if not isinstance(found, nn.ModuleList) or len(found) != expected:
        raise AnatomyError(
            f"{type(model).__name__} has no list of blocks at {path!r}",
            f"{expected} blocks",
            f"this version of transformers is not known; {REMEDY}",
        )
    return list(found)


def _split(
    model: PreTrainedModel, blocks_path: str, count: int
) -> tuple[list[dict[str, Shape]], dict[str, Shape], dict[str, str]]:
    """Shapes of the blocks, shapes outside them, and aliases outside them."""
    shapes: list[dict[str, Shape]] = [{} for _ in range(count)]
    outer: dict[str, Shape] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    prefix = blocks_path + "."
    for name, tensor in model.state_dict(keep_vars=True).items():
        known = first.setdefault(id(tensor), name)
        inside = name.startswith(prefix)
        if known != name and (inside or known.startswith(prefix)):
            raise AnatomyError(f"{name} is the same parameter as {known}", "blocks that share no parameters")
        if known != name:
            tied[name] = known
        elif inside:
            index, _, inner = name.removeprefix(prefix).partition(".")
            shapes[int(index)][inner] = tuple(tensor.shape)
        else:
            outer[name] = tuple(tensor.shape)
    return shapes, outer, tied


def _path(model: PreTrainedModel, module: nn.Module | None, what: str) -> str:
    for path, candidate in model.named_modules():
        if candidate is module:
            return str(path)
    raise AnatomyError(
        f"{type(model).__name__} has no {what}", "a causal language model with one embedding and one head"
    )
