"""A model without weights: built from its config alone, whatever its size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from secateur.anatomy.refusal import REMEDY, one_line
from secateur.core.errors import AnatomyError

__all__ = ["build_meta", "build_skeleton", "check_decoder", "load_tensors", "unload_tensors"]


def check_decoder(config: PretrainedConfig) -> None:
    """Raise `AnatomyError` unless `config` is of a text-only decoder known to the installed transformers."""
    kind = config.model_type
    expected = "a text-only decoder (a causal language model)"
    if config.is_encoder_decoder:
        raise AnatomyError(f"{kind!r} is an encoder-decoder", expected, REMEDY)
    if config.get_text_config() is not config:
        raise AnatomyError(
            f"{kind!r} is a multi-modal model",
            expected,
            "save its text part as a checkpoint of its own and prune that",
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise AnatomyError(f"transformers knows no causal language model of type {kind!r}", expected, REMEDY)


class _NoInitialisation(TorchFunctionMode):
    """Leaves out `torch.nn.init`, which takes most of the time of building a model without values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_meta(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """The model in eval mode without a cache, every tensor on the meta device. `config` is not changed.

    Args:
        options: passed on to `from_config`, such as `attn_implementation`.

    Raises:
        AnatomyError: not a decoder, or transformers cannot build it from this config.
    """
    check_decoder(config)
    own = copy.deepcopy(config)
    try:
        with torch.device("meta"), _NoInitialisation():
            model = AutoModelForCausalLM.from_config(own, dtype=dtype, **options)
    except Exception as error:  # a model class may raise anything on a config it was not written for
        raise AnatomyError(
            f"transformers cannot build {config.model_type!r} from this config ({one_line(error)})",
            "a config that its model class accepts",
        ) from error
    model.config.use_cache = False
    return model.eval()


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model to fill block by block: what files hold (parameters, persistent buffers) is on the meta device,
    what the model computes for itself (rotary frequencies, embedding scales) is real, on the CPU.

    Costs no memory to speak of and leaves the random state alone. Raises `AnatomyError` as `build_meta` does.
    """
    model = build_meta(config, dtype)
    for parent, owner in _owners(model):
        names = owner._non_persistent_buffers_set
        if any(owner._buffers[name] is not None for name in names):
            _compute_buffers(parent, owner, names)
    return model


def _owners(model: PreTrainedModel) -> list[tuple[PreTrainedModel, nn.Module]]:
    """Every module with the innermost pre-trained model around it, whose `_init_weights` sets it up."""
    owners: list[tuple[PreTrainedModel, nn.Module]] = []

    def walk(parent: PreTrainedModel, module: nn.Module) -> None:
        parent = module if isinstance(module, PreTrainedModel) else parent
        owners.append((parent, module))
        for child in module.children():
            walk(parent, child)

    walk(model, model)
    return owners


def _compute_buffers(parent: PreTrainedModel, owner: nn.Module, names: Iterable[str]) -> None:
    """Fill the non-persistent buffers as `from_pretrained` does: through the model's own initialisation."""
    for name in names:
        buffer = owner._buffers[name]
        if buffer is not None:
            fill = float("nan") if buffer.is_floating_point() else 0
            owner._buffers[name] = torch.full_like(buffer, fill, device="cpu")
    with torch.no_grad():
        parent._init_weights(owner)
    for name in names:
        buffer = owner._buffers[name]
        if buffer is not None and bool(buffer.isnan().any()):
            raise AnatomyError(
                f"{type(owner).__name__}.{name} is neither in the files nor set by the model",
                "buffers that can be computed",
                REMEDY,
            )


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in place of the parameters and buffers of these names; nothing is copied.

    One tensor under two names stays one parameter (tied embeddings).
    """
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, leaf = _owner(module, name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = made.setdefault(
                id(tensor), nn.Parameter(tensor.detach(), requires_grad=False)
            )


def unload_tensors(module: nn.Module) -> None:
    """Send parameters and persistent buffers back to the meta device, freeing their memory."""
    empty: dict[int, Tensor] = {}
    tensors = module.state_dict(keep_vars=True)
    load_tensors(
        module,
        {name: empty.setdefault(id(tensor), tensor.detach().to("meta")) for name, tensor in tensors.items()},
    )


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
