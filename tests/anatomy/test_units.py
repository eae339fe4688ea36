"""Units of blocks: the table of structured-baselines, section 2.0."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import kept_spaces, units_of


def units(family: str, **changes: object) -> dict[str, object]:
    return {found.kind: found for found in units_of(resolve(tiny_model(family, **changes).config).blocks[0])}


def test_parameters_of_a_channel_and_of_a_group() -> None:
    config = tiny_model("llama").config
    found = {u.kind: u for u in units_of(resolve(config).blocks[0])}
    d, h = config.hidden_size, config.head_dim
    g = config.num_attention_heads // config.num_key_value_heads
    assert found["ffn"].parameters == 3 * d
    assert found["kv_groups"].parameters == (2 * g + 2) * h * d
    assert found["kv_groups"].count == config.num_key_value_heads
    assert found["kv_groups"].width == g * h
    assert found["kv_groups"].columns(torch.tensor([1])).tolist() == list(range(g * h, 2 * g * h))
    kept = kept_spaces(found["kv_groups"], torch.tensor([1]))
    assert kept["kv_heads"].tolist() == [1]
    assert kept["heads"].tolist() == list(range(g, 2 * g))


def test_biases_and_fused_matrices_count() -> None:
    d = tiny_model("gpt2").config.n_embd
    assert units("gpt2")["ffn"].parameters == 2 * d + 1  # type: ignore[attr-defined]
    assert set(units("phi3")) == {"ffn", "kv_groups"}
    assert "ffn" not in units("mixtral")
