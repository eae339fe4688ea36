"""LLM-Pruner's scores: dead units, the right credit for heads, invariances, and a trained model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.calibration.windows import Windows
from secateur.checkpoint.locate import locate
from secateur.core.errors import RecipeError
from secateur.structure.llm_pruner import LlmPruner

from .taylor_terms import gradients_of, groups_of, scores_of, silence, windows_of

ORDERS = ["first", "second", "mixed", "vector"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("aggregation", ["sum", "mean", "max", "prod", "root"])
def test_a_dead_unit_scores_nothing_and_nothing_else_does(order: str, aggregation: str) -> None:
    model = tiny_model("llama")
    silence(model, 1, 17)
    method = LlmPruner.from_options({"order": order, "aggregation": aggregation})
    scores = scores_of(model, method)
    assert (scores["1.ffn"] == 0).nonzero().flatten().tolist() == [17]
    assert all(bool((values > 0).all()) for name, values in scores.items() if name != "1.ffn")


def test_aggregations_are_over_the_matrices_of_a_unit() -> None:
    model = tiny_model("llama")
    members = gradients_of(model, LlmPruner()).units["0.ffn"]["taylor_first"]
    mlp = model.model.layers[0].mlp
    windows = windows_of(model)
    logits = model(windows.ids, labels=windows.ids, use_cache=False)
    logits.loss.backward()
    names = (mlp.gate_proj, mlp.up_proj)
    made = [(part.weight * part.weight.grad).abs().sum(1).double() for part in names]
    made.append((mlp.down_proj.weight * mlp.down_proj.weight.grad).abs().sum(0).double())
    expected = torch.stack(made)
    torch.testing.assert_close(members, expected, rtol=1e-4, atol=1e-9)
    for name, values in {
        "sum": expected.sum(0),
        "mean": expected.mean(0),
        "max": expected.max(0).values,
        "prod": expected.prod(0) ** (1 / 3),
        "root": expected[0],
    }.items():
        found = LlmPruner.from_options({"aggregation": name}).rank({"taylor_first": members})
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-12)


def test_the_root_of_attention_is_the_key_and_the_writer_comes_last() -> None:
    model = tiny_model("qwen2")
    members = gradients_of(model, LlmPruner()).units["0.kv_groups"]["taylor_first"]
    windows = windows_of(model)
    model(windows.ids, labels=windows.ids, use_cache=False).loss.backward()
    attention = model.model.layers[0].self_attn

    def along_rows(part: torch.nn.Linear) -> Tensor:
        rows = (part.weight * part.weight.grad).abs().sum(1) + (part.bias * part.bias.grad).abs()
        return rows.double().view(2, -1).sum(1)

    columns = (attention.o_proj.weight * attention.o_proj.weight.grad).abs().sum(0).double()
    expected = [
        along_rows(attention.k_proj),
        along_rows(attention.v_proj),
        along_rows(attention.q_proj),
        columns.view(2, -1).sum(1),
    ]
    torch.testing.assert_close(members, torch.stack(expected), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("head", range(8))
def test_a_query_head_protects_the_group_it_reads(head: int) -> None:
    """Eight query heads on two key-value heads: 0 to 3 read the first. Published code credits head % 2."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight *= 0.1
        model.model.layers[0].self_attn.o_proj.weight[:, head * 8 : (head + 1) * 8] *= 100
    for order in ORDERS:
        scores = scores_of(model, LlmPruner.from_options({"order": order}))["0.kv_groups"]
        assert int(scores.argmax()) == head // 4, order


@pytest.mark.parametrize("order", ORDERS)
def test_scales_that_cancel_do_not_matter_to_the_loss(order: str) -> None:
    model, method = tiny_model("llama"), LlmPruner.from_options({"order": order})
    before = scores_of(model, method)["1.ffn"]
    mlp = model.model.layers[1].mlp
    norms = mlp.down_proj.weight.detach().norm(dim=0)
    with torch.no_grad():
        mlp.up_proj.weight[5] *= 64.0
        mlp.down_proj.weight[:, 5] /= 64.0
    torch.testing.assert_close(scores_of(model, method)["1.ffn"], before, rtol=1e-4, atol=0)
    assert not torch.allclose(mlp.down_proj.weight.detach().norm(dim=0), norms)  # as magnitude would see it


def test_importance_for_each_parameter_changes_what_kinds_mean_to_each_other() -> None:
    model = tiny_model("llama")
    found = gradients_of(model, LlmPruner()).units
    for block, units in groups_of(model):
        terms = found[f"{block}.{units.kind}"]
        problem = type("Problem", (), {"taylor": terms, "units": units})
        plain = LlmPruner.from_options({"per_parameter": False}).score(problem)  # type: ignore[arg-type]
        shared = LlmPruner().score(problem)  # type: ignore[arg-type]
        torch.testing.assert_close(shared * units.parameters, plain)


def test_single_sequences_do_not_cancel_out() -> None:
    model = tiny_model("llama")
    together = scores_of(model, LlmPruner())["0.ffn"]
    alone = scores_of(model, LlmPruner.from_options({"per_sample": True}))["0.ffn"]
    assert bool((alone > together).all())
    with pytest.raises(RecipeError, match="per_sample"):
        LlmPruner.from_options({"order": "second", "per_sample": True})


def test_open_blocks_scale_with_the_depth() -> None:
    assert [LlmPruner().open_blocks(count) for count in (2, 6, 32, 80)] == [
        range(2),
        range(1, 6),
        range(4, 30),
        range(10, 75),
    ]


def losses_without(model: PreTrainedModel, block: int, units: list[int]) -> Tensor:
    """By how much the loss grows when one channel writes nothing."""
    windows = windows_of_text(model)
    down = model.model.layers[block].mlp.down_proj.weight.detach()

    @torch.no_grad()
    def loss() -> float:
        return float(model(windows, labels=windows, use_cache=False).loss)

    dense, grown = loss(), []
    for unit in units:
        column = down[:, unit].clone()
        down[:, unit] = 0
        grown.append(loss() - dense)
        down[:, unit] = column
    return torch.tensor(grown)


def windows_of_text(model: PreTrainedModel) -> Tensor:
    """What the model itself says, greedily enough to be its kind of text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = torch.randint(5, model.config.vocab_size, (8, 1))
        return model.generate(start, max_new_tokens=47, min_new_tokens=47, do_sample=True)  # type: ignore[no-any-return]


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def test_scores_rank_like_the_true_loss_on_a_trained_model() -> None:
    """Every eighth channel of two blocks is taken out for real."""
    model = AutoModelForCausalLM.from_pretrained(locate("seedling"), dtype=torch.float32).eval()
    windows = Windows.of(windows_of_text(model))
    units = list(range(0, 384, 8))
    truth = torch.cat([losses_without(model, block, units) for block in (1, 4)])
    found = {}
    for order in ORDERS:
        scores = scores_of(model, LlmPruner.from_options({"order": order}), windows)
        found[order] = spearman(torch.cat([scores[f"{block}.ffn"][units] for block in (1, 4)]), truth.abs())
    noise = torch.rand(len(truth), generator=torch.Generator().manual_seed(0))
    assert abs(spearman(noise, truth.abs())) < 0.25
    assert found["first"] > 0.25, found
    assert found["second"] > 0.25, found
