"""Decoders whose blocks differ: the stock model class of a family, each block built at its own size, and
without the attention or feed-forward part that was removed from it.

This file needs transformers alone. secateur registers it when it is imported, and writes a copy beside every
checkpoint with blocks of unequal sizes, for `trust_remote_code=True` where secateur is not installed.

The config is that of the family, with `per_layer_config` for the sizes of single blocks and what they `skip`,
`block_parts` for the modules that a skipped part consists of, and `block_biases` for matrices that have a
bias which the family's class would not give them. With `residual_shortcuts` the hidden size of blocks is
smaller than that of the model, and each half of a block has a basis of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

MODEL_TYPE = "secateur"
SIZES = "per_layer_config"
SKIP = "skip"


class BlockConfig:
    """The config of the model as one block sees it: its own sizes first, everything else from the model."""

    def __init__(self, config: Any, own: Mapping[str, Any]) -> None:
        self.__dict__.update(own)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


class SecateurConfig:
    """Entry point of `AutoConfig`: gives a config of the family that `base_model_type` names."""

    model_type = MODEL_TYPE
    _auto_class: str | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return classes(config_dict["base_model_type"])[0].from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
        from transformers import PreTrainedConfig

        config_dict, kwargs = PreTrainedConfig.get_config_dict(path, **kwargs)
        return cls.from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        cls._auto_class = auto_class


class SecateurForCausalLM:
    """Entry point of `AutoModelForCausalLM`: gives a model of the family that the config names."""

    _auto_class: str | None = None

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        config = config if config is not None else SecateurConfig.from_pretrained(path)
        return classes(config.base_model_type)[1].from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return classes(config.base_model_type)[1]._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        cls._auto_class = auto_class


@functools.cache
def classes(family: str) -> tuple[type[Any], type[Any]]:
    """Config and model class of a family, known to the auto classes from now on."""
    base_config = CONFIG_MAPPING[family]
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    if isinstance(base_model, tuple):
        base_model = base_model[0]
    config_class = type(
        f"Secateur{base_config.__name__}", (_SizesInConfig, base_config), {"model_type": MODEL_TYPE}
    )
    model_class = type(
        f"Secateur{base_model.__name__}", (_BlocksOfOwnSize, base_model), {"config_class": config_class}
    )
    _keep_conversions(family, model_class.__name__)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


class _SizesInConfig:
    """Keeps the sizes of blocks as plain data, whatever the installed transformers makes of such a key."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        plain = dict(config_dict)
        plain["block_sizes"] = plain.pop(SIZES, {})
        return super().from_dict(plain, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**plain, SIZES: plain.pop("block_sizes", {})}


class _BlocksOfOwnSize:
    """Builds the stock model and replaces every block that has sizes of its own."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        blocks = _block_list(self, config.num_hidden_layers)
        for key, own in config.block_sizes.items():
            index = int(key)
            blocks[index] = type(blocks[index])(BlockConfig(config, own), layer_idx=index)
            for part in own.get(SKIP, ()):
                for name, gives in config.block_parts[part].items():
                    blocks[index].set_submodule(name, StandIn(gives, index))
        for name in getattr(config, "block_biases", ()):
            for block in blocks:
                if name in dict(block.named_modules()):
                    _give_bias(block, name)
        if getattr(config, "residual_shortcuts", False):
            _slice_residual(self, blocks, config)
        self.post_init()  # type: ignore[attr-defined]


class StandIn(nn.Module):
    """Takes the place of a module whose part of the block is removed: the residual stream passes.

    Args:
        gives: its `input`, `zeros`, or a `pair` of zeros and no attention weights.
        index: of the block.
    """

    def __init__(self, gives: str, index: int) -> None:
        super().__init__()
        self.gives, self.index = gives, index

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gives == "input":
            return hidden_states
        zeros = hidden_states.new_zeros(hidden_states.shape)
        if self.gives == "zeros":
            return zeros
        for given in (*args, *kwargs.values()):
            if isinstance(given, Cache):
                self._count_tokens(given, hidden_states)
        return zeros, None

    def _count_tokens(self, cache: Cache, hidden_states: Tensor) -> None:
        """A cache reads its length, and so the next position, off one of its layers: this one stores one
        number a token."""
        tokens = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
        cache.update(tokens, tokens, self.index)


def _block_list(model: Any, count: int) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} blocks")


def _give_bias(block: nn.Module, name: str) -> None:
    matrix: Any = block.get_submodule(name)
    if matrix.bias is None:
        matrix.bias = nn.Parameter(matrix.weight.new_zeros(matrix.weight.shape[0]))


class _PlainNorm(nn.Module):
    """Root mean square over the width that the residual stream had; the weights are in the next matrices."""

    def __init__(self, width: int, norm: Any) -> None:
        super().__init__()
        self.width, self.eps = width, float(norm.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(exact.square().sum(-1, keepdim=True) / self.width + self.eps)
        return (exact * scale).to(hidden.dtype)


class _ShortcutBlock:
    """A block each half of which reads the residual stream in one basis and writes it in the next."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        block: Any = self
        multiplier = getattr(block, "residual_multiplier", 1.0)
        added = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = nn.functional.linear(hidden_states, block.attention_shortcut) + added * multiplier
        added = block.mlp(block.post_attention_layernorm(hidden_states))
        leaving: Tensor = nn.functional.linear(hidden_states, block.mlp_shortcut) + added * multiplier
        return leaving


def _slice_residual(model: Any, blocks: nn.ModuleList, config: Any) -> None:
    """Make embedding, blocks and, where the last block writes fewer, norm and head of the sliced widths."""
    wide, written = config.hidden_size, config.hidden_size
    for index, block in enumerate(blocks):
        own = config.block_sizes[str(index)]
        width, written = own["hidden_size"], own.get("output_size", own["hidden_size"])
        _give_shortcuts(block, wide, width, written)
    old = model.get_input_embeddings()
    narrow = config.block_sizes["0"]["hidden_size"]
    model.set_input_embeddings(nn.Embedding(old.num_embeddings, narrow, old.padding_idx))
    if written != wide:
        model.model.norm = _PlainNorm(wide, model.model.norm)
        model.set_output_embeddings(nn.Linear(written, old.num_embeddings, bias=False))


def _give_shortcuts(block: Any, wide: int, width: int, written: int) -> None:
    stock = type(block)
    block.__class__ = type(f"Shortcut{stock.__name__}", (_ShortcutBlock, stock), {})
    for name in ("input_layernorm", "post_attention_layernorm"):
        setattr(block, name, _PlainNorm(wide, getattr(block, name)))
    block.attention_shortcut = nn.Parameter(torch.empty(width, width))
    block.mlp_shortcut = nn.Parameter(torch.empty(written, width))
    if written != width:
        last = block.mlp.down_proj
        block.mlp.down_proj = nn.Linear(last.in_features, written, bias=last.bias is not None)


def _keep_conversions(family: str, name: str) -> None:
    """Files of some families hold other names and shapes than the model; the family knows which."""
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:
        return
    found = get_checkpoint_conversion_mapping(family)
    if found:
        register_checkpoint_conversion_mapping(name, found, overwrite=True)
