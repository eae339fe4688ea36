"""A forward on the meta device: which tensor each matrix read. Costs neither weights nor arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from secateur.anatomy.refusal import no_family, one_line
from secateur.anatomy.skeleton import build_meta

__all__ = ["Trace", "trace"]

TOKENS = 8


@dataclass
class Trace:
    """What was seen.

    Attributes:
        inputs: module path -> the identity of its input, once for every time it ran. Equal identities are
            one tensor with one content, in whatever shape.
        last_norm: path of the last norm outside the blocks, empty without one.
    """

    inputs: dict[str, list[object]] = field(default_factory=dict)
    last_norm: str = ""


def trace(config: PretrainedConfig, blocks_path: str) -> Trace:
    """Run a model of `config` without weights and watch every `nn.Linear` and `Conv1D` in the blocks.

    Raises:
        AnatomyError: the model needs values to run (routing in Python, for example).
    """
    model = build_meta(config, torch.bfloat16, attn_implementation="eager")
    ran, alive = Trace(), list[Tensor]()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and path.startswith(blocks_path + "."):
            module.register_forward_pre_hook(_watch(ran.inputs.setdefault(path, []), alive))
        elif "norm" in type(module).__name__.lower() and not path.startswith(blocks_path + "."):
            module.register_forward_pre_hook(_remember(ran, path))
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # a forward may raise anything
        raise no_family(
            config, f"it does not run without weights ({one_line(error)})", "a forward that needs no values"
        ) from error
    return ran


def _watch(inputs: list[object], alive: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        tensor = args[0]
        alive.append(tensor)  # or its storage could be handed to a later tensor
        storage = tensor.untyped_storage()
        inputs.append((storage._cdata, tensor.storage_offset(), tensor.numel(), tensor._version))

    return hook


def _remember(ran: Trace, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        ran.last_norm = path

    return hook
