"""Models without weights, filled and emptied again."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, UNLISTED, tiny_config, tiny_model
from torch import nn

from secateur.anatomy.resolve import resolve
from secateur.anatomy.skeleton import build_skeleton, load_tensors, unload_tensors


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ("llama", "gemma3_text", "gpt2", "falcon", "deepseek_v3")]
    + [("gemma2", torch.bfloat16)],  # scales its embedding by a buffer that is rounded to this dtype
)
def test_a_filled_skeleton_is_the_model(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    skeleton = build_skeleton(model.config, dtype)
    load_tensors(skeleton, model.state_dict(keep_vars=True))
    ids = torch.arange(5, 21).view(2, 8)
    with torch.no_grad():
        assert torch.equal(skeleton(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_what_files_hold_is_on_meta_and_the_rest_is_real(family: str) -> None:
    state = torch.get_rng_state()
    skeleton = build_skeleton(tiny_config(family), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    stored = skeleton.state_dict(keep_vars=True)
    assert {tensor.device.type for tensor in stored.values()} == {"meta"}
    computed = {name: b for name, b in skeleton.named_buffers() if name not in stored}
    assert all(buffer.device.type == "cpu" and buffer.isfinite().all() for buffer in computed.values())
    assert not skeleton.training
    assert skeleton.config.use_cache is False


def test_one_tensor_under_two_names_stays_one_parameter() -> None:
    model = tiny_model("qwen3", tie_word_embeddings=True)
    skeleton = build_skeleton(model.config, torch.float32)
    weight = model.lm_head.weight.detach()
    load_tensors(skeleton, {"lm_head.weight": weight, "model.embed_tokens.weight": weight})
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    assert skeleton.lm_head.weight.data_ptr() == weight.data_ptr()
    unload_tensors(skeleton)
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    assert skeleton.lm_head.weight.device.type == "meta"


def test_unloading_a_block_keeps_what_it_computes() -> None:
    model = tiny_model("deepseek_v3")
    block = model.get_submodule(resolve(model.config, model).blocks[1].prefix)
    block.register_buffer("scale", torch.ones(1), persistent=False)
    unload_tensors(block)
    assert {tensor.device.type for tensor in block.state_dict().values()} == {"meta"}
    assert "mlp.gate.e_score_correction_bias" in block.state_dict()
    assert block.scale.device.type == "cpu"
    assert all(isinstance(parameter, nn.Parameter) for parameter in block.parameters())
