"""Decoders whose blocks differ: the stock model class of a family, each block built at its own size, and
without the attention or feed-forward part that was removed from it.

This file needs transformers alone. secateur registers it when it is imported, and writes a copy beside every
checkpoint with blocks of unequal sizes, for `trust_remote_code=True` where secateur is not installed.

The config is that of the family, with `per_layer_config` for the sizes of single blocks and what they `skip`,
`block_parts` for the modules that a skipped part consists of, and `block_biases` for matrices that have a
bias which the family's class would not give them. With `own_heads` the class takes the width of a head from
hidden size and number of heads, and blocks with fewer heads keep those as wide as they were (`head_size`).
With `residual_shortcuts` the residual stream is narrower than the hidden size, and what each half of a block
reads and writes has a basis of its own.
"""

from __future__ import annotations

import functools
import inspect
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
    _keep_conversions((base_model.__name__, family), model_class.__name__)
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
            blocks[index] = _own_block(type(blocks[index]), config, own, index)
            for part in own.get(SKIP, ()):
                for name, gives in config.block_parts[part].items():
                    blocks[index].set_submodule(name, StandIn(gives, index))
        for name in getattr(config, "block_biases", ()):
            for block in blocks:
                if name in dict(block.named_modules()):
                    _give_bias(block, name)
        if getattr(config, "residual_shortcuts", None):
            _slice_residual(self, blocks, config)
        self.post_init()  # type: ignore[attr-defined]


def _own_block(kind: Any, config: Any, own: Mapping[str, Any], index: int) -> Any:
    """A block of its own sizes; with heads of its own, its attention is that of a model which is as wide as
    they are together, between matrices that read and write the hidden size."""
    told: Mapping[str, Any] = getattr(config, "own_heads", None) or {"count": ()}
    heads = [own[key] for key in told["count"] if key in own]
    shared = {key: size for key, size in own.items() if key not in told["count"]}
    block = kind(BlockConfig(config, shared), layer_idx=index)
    if heads:
        width = dict.fromkeys(told["hidden"], heads[0] * config.head_size)
        attention = type(block.get_submodule(told["attention"]))
        block.set_submodule(
            told["attention"], attention(BlockConfig(config, {**own, **width}), layer_idx=index)
        )
        for name in told["readers"]:
            _resize(block.get_submodule(name), inputs=config.hidden_size)
        for name in told["writers"]:
            _resize(block.get_submodule(name), outputs=config.hidden_size)
    return block


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
    """Root mean square over the width that the residual stream had; weights, biases and the mean that a norm
    may subtract are in the matrices around it."""

    def __init__(self, width: int, norm: Any) -> None:
        super().__init__()
        self.width = width
        self.eps = float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(exact.square().sum(-1, keepdim=True) / self.width + self.eps)
        return (exact * scale).to(hidden.dtype)


class _ShortcutBlock:
    """A block each step of which reads the residual stream in one basis and writes it in the next."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        block: Any = self
        kwargs.update(zip(block.arguments, args, strict=False))
        hidden_states = hidden_states[..., : block.width]
        multiplier = getattr(block, "residual_multiplier", 1.0)
        attention = block.told["steps"][0][0][1]
        for step, shortcut in zip(block.told["steps"], block.told["shortcuts"], strict=True):
            leaving = nn.functional.linear(hidden_states, getattr(block, shortcut))
            for branch in step:
                added = hidden_states
                for name in branch:
                    module = getattr(block, name)
                    added = module(added, **kwargs) if name == attention else module(added)
                    added = added[0] if isinstance(added, tuple) else added
                leaving = leaving + added * multiplier
            hidden_states = leaving
        return hidden_states


def _slice_residual(model: Any, blocks: nn.ModuleList, config: Any) -> None:
    """Make embeddings, blocks and, where the last block writes fewer, norm and head of the sliced widths."""
    told, wide = config.residual_shortcuts, config.hidden_size
    sizes = [config.block_sizes[str(index)] for index in range(len(blocks))]
    for block, own in zip(blocks, sizes, strict=True):
        _slice_block(block, told, wide, own["stream_size"], own.get("output_size", own["stream_size"]))
    written = sizes[-1].get("output_size", sizes[-1]["stream_size"])
    for name in told["embeddings"]:
        embedding = model.get_submodule(name)
        rows, embedding.embedding_dim = embedding.weight.shape[0], sizes[0]["stream_size"]
        embedding.weight = nn.Parameter(embedding.weight.new_empty(rows, embedding.embedding_dim))
        embedding.register_forward_hook(functools.partial(_pad, written))
    if written != wide:
        model.set_submodule(told["norm"], _PlainNorm(wide, model.get_submodule(told["norm"])))
        rows = model.get_output_embeddings().weight.shape[0]
        model.set_output_embeddings(nn.Linear(written, rows, bias=told["head_bias"]))


def _slice_block(block: Any, told: Mapping[str, Any], wide: int, width: int, written: int) -> None:
    stock, names = type(block), list(inspect.signature(block.forward).parameters)
    block.__class__ = type(f"Shortcut{stock.__name__}", (_ShortcutBlock, stock), {})
    block.told, block.arguments, block.width = told, names[1:], width
    for step, shortcut, writers in zip(told["steps"], told["shortcuts"], told["writers"], strict=True):
        size = written if shortcut == told["shortcuts"][-1] else width
        setattr(block, shortcut, nn.Parameter(torch.empty(size, width)))
        for norm, *_ in step:
            setattr(block, norm, _PlainNorm(wide, getattr(block, norm)))
        for name in writers:
            _resize(block.get_submodule(name), outputs=size)
    for name in told["readers"]:
        _resize(block.get_submodule(name), inputs=width)


def _pad(width: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Some models take the width that enters the blocks for that which leaves them (gpt2): make them equal;
    the first block reads no more than its own."""
    return nn.functional.pad(output, (0, width - output.shape[-1]))


def _resize(matrix: Any, inputs: int = 0, outputs: int = 0) -> None:
    """Give a Linear, or a Conv1D, which lies the other way, as many inputs or outputs."""
    lies, keys = matrix.weight.shape, ("out_features", "in_features")
    if not isinstance(matrix, nn.Linear):
        lies, keys = lies[::-1], ("nf", "nx")
    shape = (outputs or lies[0], inputs or lies[1])
    for key, size in zip(keys, shape, strict=True):
        setattr(matrix, key, size)
    matrix.weight = nn.Parameter(
        matrix.weight.new_empty(shape if isinstance(matrix, nn.Linear) else shape[::-1])
    )
    if matrix.bias is not None:
        matrix.bias = nn.Parameter(matrix.bias.new_empty(shape[0]))


def _keep_conversions(known: tuple[str, ...], name: str) -> None:
    """Files of some families hold other names and shapes than the model; its class or family knows which."""
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:
        return
    found = next(filter(None, map(get_checkpoint_conversion_mapping, known)), None)
    if found:
        register_checkpoint_conversion_mapping(name, found, overwrite=True)
