"""Tiny random decoders of every family secateur knows, and of some it must find out about by itself.

Every parameter (norms, biases and router corrections too) is drawn from one seeded generator, so a mistake in
any of them shows, and the numbers do not depend on how a version of transformers initialises.
Every room of the tests is a package, so pytest finds this file: `from tiny_models import tiny_model`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 320

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SLIDING: dict[str, Any] = {
    **_LLAMA,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "sliding_window": 16,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "num_key_value_heads": 1, "sliding_window": 16},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **_SLIDING,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "granite": {**_LLAMA, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 8,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    "gpt_neox": {**_LLAMA, "num_key_value_heads": 8},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {**_MOE, "head_dim": 16},
    "olmoe": {**_LLAMA, "num_key_value_heads": 8, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_LLAMA,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
    "deepseek_v3": {
        **_LLAMA,
        "num_hidden_layers": 3,
        "num_key_value_heads": 8,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "stablelm": _LLAMA,
    "starcoder2": {**_LLAMA, "tie_word_embeddings": True},
    "phi": {**_LLAMA, "num_key_value_heads": 8},
    "cohere": {**_LLAMA, "tie_word_embeddings": True},
    "falcon": {
        **{name: _LLAMA[name] for name in _LLAMA if "key_value" not in name and name != "intermediate_size"},
        "multi_query": True,
        "new_decoder_architecture": False,
        "alibi": False,
    },
}

UNLISTED: tuple[str, ...] = ("stablelm", "starcoder2", "phi", "cohere", "falcon")
"""Decoders without a family file, for inference."""

FAMILIES: tuple[str, ...] = tuple(name for name in _CONFIGS if name not in UNLISTED)
"""Model types with a family file."""

_SENTENCES = (
    "Once upon a time there was a gardener who cut the old branches of the apple tree every winter.",
    "The tree was small, and the fruit was sweet; nobody knew how many leaves it had lost.",
    "She said: \"What you take away is as much a part of the garden as what you leave.\"",
    "In the spring 12 new shoots came up beside the wall, and 3 of them grew into branches.",
)  # fmt: skip


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Configuration of a decoder of `family` with a few thousand parameters; `changes` override its keys."""
    return AutoConfig.for_model(family, **{**_CONFIGS[family], **changes})


def tiny_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config_changes: Any
) -> PreTrainedModel:
    """A random decoder in eval mode, the same for the same seed."""
    config = tiny_config(family, **config_changes)
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _draw(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _draw(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Matrices become noise; vectors keep their meaning (ones, zeros) and get noise on top."""
    persistent = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in persistent]
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in buffers if b.is_floating_point())):
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise if tensor.dim() > 1 else tensor.float() + noise)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` entries; any text can be encoded. Token 0 is beginning, end and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def save_tiny(
    family: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **config_changes: Any,
) -> Path:
    """Write a checkpoint folder (weights, config, tokenizer) as `save_pretrained` does; returns `folder`."""
    model = tiny_model(family, dtype=dtype, seed=seed, **config_changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_dead(folder: Path, dead: torch.Tensor, **changes: Any) -> PreTrainedModel:
    """A Llama on disk that never writes the entries `dead`, (k,) int64, of its residual stream."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", folder, **changes)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, dead] = 0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[dead] = 0
            block.mlp.down_proj.weight[dead] = 0
    model.save_pretrained(folder)
    return model


def undo_mean(model: PreTrainedModel, width: int) -> None:
    """Norms divide by the dimensions that are left: make up for those that went, of `width`."""
    wider = width / model.config.hidden_size
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.weight.mul_(wider**0.5)
                module.variance_epsilon *= wider
