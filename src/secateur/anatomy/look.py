"""What can be read off a model by looking at it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.anatomy.model import Shape
from secateur.anatomy.outline import Outline
from secateur.anatomy.refusal import REMEDY
from secateur.core.errors import AnatomyError

__all__ = ["blocks_of", "look_at"]


def look_at(model: PreTrainedModel, blocks_path: str) -> Outline:
    """The outline of `model`, whose blocks are at `blocks_path`.

    Raises:
        AnatomyError: no list of blocks there, blocks that share parameters, no embedding or no head.
    """
    blocks = blocks_of(model, blocks_path)
    base = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    shapes, outer, tied = _split(model, blocks_path, len(blocks))
    return Outline(
        shapes=shapes,
        transposed=list(map(_transposed, blocks)),
        outer=outer,
        tied=tied,
        base_prefix=base,
        embedding=_path(model, model.get_input_embeddings(), "token embedding"),
        head=_path(model, model.get_output_embeddings(), "language model head"),
    )


def blocks_of(model: PreTrainedModel, path: str) -> list[nn.Module]:
    """The modules of the stack. Raises `AnatomyError` when there are not as many as the config says."""
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


def _transposed(block: nn.Module) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for path, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            found[path] = isinstance(module, Conv1D)
        elif hasattr(module, "is_transposed"):  # experts in 3-D parameters
            found[path] = bool(module.is_transposed)
    return found


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
