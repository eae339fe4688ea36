"""Every family file against the models of its family, and against what such a model does when it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_config, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.anatomy.family import Family, MatrixEntry, known_families, load_family
from secateur.anatomy.resolve import resolve
from secateur.anatomy.trace import trace

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}],
    "qwen3": [{"attention_bias": True}, {"tie_word_embeddings": False}],
    "gpt2": [{"n_inner": 80}, {"tie_word_embeddings": False}],
    "opt": [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 32}, {"enable_bias": False}],
    "gpt_neox": [{"attention_bias": False}, {"use_parallel_residual": False}],
    "qwen2_moe": [{"mlp_only_layers": [0]}],
    "qwen3_moe": [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}],
    "deepseek_v3": [{"q_lora_rank": None}, {"first_k_dense_replace": 0}, {"attention_bias": True}],
}
CASES: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES] + [
    (f, changes) for f, some in VARIANTS.items() for changes in some
]


def family_file(name: str) -> Family:
    family = load_family(name)
    assert family is not None
    return family


def test_every_file_has_a_tiny_model() -> None:
    assert set(known_families()) == set(FAMILIES)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_every_parameter_is_counted(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    anatomy = resolve(model.config, model)
    distinct = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    assert anatomy.parameters == sum(distinct.values())
    prunable = sum(m.rows.size * m.columns.size for block in anatomy.blocks for m in block.matrices)
    assert anatomy.prunable_parameters == prunable <= anatomy.block_parameters < anatomy.parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_files_declare_nothing_that_no_model_has(family: str) -> None:
    declared = family_file(family)
    names = {path if entry.experts else f"{path}.weight" for path, entry in declared.matrices.items()}
    names |= set(declared.vectors)
    for changes in ({}, *VARIANTS.get(family, [])):
        for block in resolve(tiny_config(family, **changes)).blocks:
            names -= set(block.parameters)
    assert not names


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_matrices_of_one_site_read_one_tensor(family: str, changes: dict[str, Any]) -> None:
    """The family file says which matrices share an input; a forward of the model shows it."""
    config = tiny_config(family, **changes)
    anatomy = resolve(config)
    ran = trace(config, anatomy.blocks_path)
    for block in anatomy.blocks:
        plain = [matrix for matrix in block.matrices if matrix.expert is None]
        seen: dict[object, set[str]] = {}
        for matrix in plain:
            (read,) = ran.inputs[f"{block.prefix}.{matrix.name}"]
            seen.setdefault(read, set()).add(matrix.name)
        declared: dict[str, set[str]] = {}
        for matrix in plain:
            declared.setdefault(matrix.input, set()).add(matrix.name)
        assert sorted(map(sorted, seen.values())) == sorted(map(sorted, declared.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_gates_are_left_out(family: str) -> None:
    """No linear module of a block is forgotten: those that are not prunable are declared as such."""
    model = tiny_model(family)
    anatomy = resolve(model.config, model)
    for block in anatomy.blocks:
        modules = model.get_submodule(block.prefix).named_modules()
        linear = {name for name, module in modules if isinstance(module, (nn.Linear, Conv1D))}
        assert linear - {matrix.name for matrix in block.matrices} <= {"mlp.shared_expert_gate"}


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_places_in_the_block(family: str) -> None:
    model = tiny_model(family)
    for block in resolve(model.config, model).blocks:
        module = model.get_submodule(block.prefix)
        assert {matrix.input for matrix in block.matrices} == set(block.sites)
        for name, site in block.sites.items():
            readers = block.readers(name)
            assert {matrix.columns.size for matrix in readers} == {readers[0].columns.size}
            assert (site.kind == "input") == (readers[0].expert is None)
            assert site.name == name
            module.get_submodule(site.module)


@pytest.mark.parametrize("family", FAMILIES)
def test_views_are_what_the_modules_multiply_with(family: str) -> None:
    """y = x W^T + b for every plain matrix, and writing zeros into the view leaves only b."""
    model = tiny_model(family)
    for block in resolve(model.config, model).blocks:
        module = model.get_submodule(block.prefix)
        parameters = dict(module.named_parameters())
        for matrix in (matrix for matrix in block.matrices if matrix.expert is None):
            view, run = matrix.view(parameters), module.get_submodule(matrix.name)
            x = noise(3, matrix.columns.size)
            bias = torch.zeros(matrix.rows.size) if run.bias is None else run.bias.detach()
            assert tuple(view.shape) == matrix.shape
            torch.testing.assert_close(run(x).detach(), x @ view.T + bias)
            view.zero_()
            assert torch.equal(run(x).detach(), bias.expand(3, -1))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_views_of_experts(family: str) -> None:
    """Column j of the first product reads input j, row i of the second makes output i, of one expert only."""
    model = tiny_model(family)
    block = resolve(model.config, model).blocks[-1]
    module = model.get_submodule(block.prefix)
    parameters = dict(module.named_parameters())
    experts = module.get_submodule(block.sites["experts_input"].module)
    x = noise(3, model.config.hidden_size)
    moved = x.clone()
    moved[:, 0] += 1
    others = [run_expert(experts, expert, x) for expert in (0, 1, 3)]
    for matrix in (matrix for matrix in block.matrices if matrix.expert == 2):
        view = matrix.view(parameters)
        assert tuple(view.shape) == matrix.shape
        kept = view.clone()
        assert not torch.equal(run_expert(experts, 2, x), run_expert(experts, 2, moved))
        if matrix.input == "experts_input":
            view[:, 0] = 0
            assert torch.equal(run_expert(experts, 2, x), run_expert(experts, 2, moved))
        else:
            view[0] = 0
            outputs = run_expert(experts, 2, x)
            assert torch.equal(outputs[:, 0], outputs[:1, 0].expand(3))
            assert not torch.equal(outputs[:, 1], outputs[:1, 1].expand(3))
        view.copy_(kept)
    for expert, output in zip((0, 1, 3), others, strict=True):
        assert torch.equal(run_expert(experts, expert, x), output)


def run_expert(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """One expert of a fused experts module as a function of its input."""
    output: Tensor = experts(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))
    return output


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("family", "path", "axes"),
    [
        ("phi3", "self_attn.qkv_proj", [("heads", 8, 8), ("kv_heads", 2, 8), ("kv_heads", 2, 8)]),
        ("gpt_neox", "attention.query_key_value", [("heads", 8, 24)]),
        ("gpt_oss", "mlp.experts.gate_up_proj.3", [("moe_ffn", 96, 2)]),
        ("mixtral", "mlp.experts.gate_up_proj.0", [("ffn", 96, 1), ("ffn", 96, 1)]),
        ("deepseek_v3", "self_attn.kv_a_proj_with_mqa", [("kv_rank", 16, 1), (None, 8, 1)]),
        ("deepseek_v3", "self_attn.kv_b_proj", [("heads", 8, 20)]),
    ],
)
def test_rows_of_fused_matrices(family: str, path: str, axes: list[tuple[str | None, int, int]]) -> None:
    block = resolve(tiny_config(family)).blocks[-1]
    (matrix,) = (matrix for matrix in block.matrices if matrix.name == path)
    assert [(s.space, s.count, s.unit) for s in matrix.rows.segments] == axes


def test_layers_of_different_kinds() -> None:
    anatomy = resolve(tiny_config("deepseek_v3"))
    dense, sparse = anatomy.blocks[0], anatomy.blocks[1]
    assert "mlp.gate_proj" in {matrix.name for matrix in dense.matrices}
    assert "mlp.experts.gate_up_proj.3" in {matrix.name for matrix in sparse.matrices}
    assert sparse.matrices is anatomy.blocks[2].matrices
    assert sparse.sites["shared_experts"].kind == "input"
    kinds = anatomy.summary()["block_kinds"]
    assert [kind["blocks"] for kind in kinds] == [[0], [1, 2]]
    assert {row["name"]: row["count"] for row in kinds[1]["matrices"]}["mlp.experts.down_proj"] == 4


def test_spaces_and_the_keys_that_resize_them() -> None:
    anatomy = resolve(tiny_config("qwen3_moe"))
    assert anatomy.spaces == {
        "hidden": 64, "ffn": 96, "heads": 8, "kv_heads": 2, "head_dim": 16, "vocab": 320, "layers": 2,
        "experts": 4, "moe_ffn": 48,
    }  # fmt: skip
    assert anatomy.keys["experts"] == "num_experts"
    gpt2 = resolve(tiny_config("gpt2"))
    assert (gpt2.spaces["ffn"], gpt2.keys["ffn"]) == (256, "n_inner")
    assert "head_dim" not in resolve(tiny_config("olmo2")).keys


def test_expert_entries_must_say_which_product_they_are() -> None:
    with pytest.raises(ValueError, match="experts_hidden"):
        MatrixEntry(rows="ffn", columns="hidden", experts="experts", input="mlp")
    with pytest.raises(ValueError, match="experts_hidden"):
        MatrixEntry(rows="ffn", columns="hidden", input="experts_input")


def test_unknown_model_type_has_no_file() -> None:
    assert load_family("stablelm") is None
