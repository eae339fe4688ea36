"""The switch on a loaded model: what it must not change, what it must, and what it counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import secateur
from secateur.anatomy.mixture import mixture_of
from secateur.anatomy.resolve import resolve
from secateur.core.errors import InputError
from secateur.experts.online import OnlineBlock, OnlinePlan

FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss")
IDS = torch.randint(1, VOCAB, (3, 50), generator=torch.Generator().manual_seed(0))


def plan_of(model: PreTrainedModel, ratio: float) -> OnlinePlan:
    blocks = [block.index for block in resolve(model.config).blocks if mixture_of(block)]
    return OnlinePlan(blocks=tuple(OnlineBlock(block=block, medians=(ratio,)) for block in blocks))


def everywhere(plan: OnlinePlan) -> list[int]:
    return [block.block for block in plan.blocks]


def logits(model: PreTrainedModel, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ratio", "protect"), [(0.0, 0.02), (0.7, 1.0), (2.0, 1.0)])
def test_nothing_changes_where_nothing_is_dropped(family: str, ratio: float, protect: float) -> None:
    model = tiny_model(family)
    dense, plan = logits(model), plan_of(model, ratio)
    with secateur.prune_online(model, plan, protect=protect, blocks=everywhere(plan)) as pruner:
        assert logits(model).equal(dense)
        assert pruner.saved == 0.0


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("mixtral", {"num_experts_per_tok": 3}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen2_moe", {}),
        ("gpt_oss", {}),
    ],
)
def test_a_ratio_above_one_is_the_model_with_one_expert(
    family: str, changes: dict[str, Any], implementation: str
) -> None:
    model = tiny_model(family, **changes)
    model.set_experts_implementation(implementation)
    alone = tiny_model(family, **{**changes, "num_experts_per_tok": 1})
    alone.set_experts_implementation(implementation)
    plan = plan_of(model, 1.5)
    with secateur.prune_online(model, plan, protect=0, blocks=everywhere(plan)) as pruner:
        torch.testing.assert_close(logits(model), logits(alone), rtol=1e-5, atol=1e-6)
        experts = model.config.num_experts_per_tok
        assert pruner.saved == pytest.approx(1 - 1 / experts)
        assert {tuple(count.tolist()) for count in pruner.counts.values()} == {
            (IDS.numel() * experts, IDS.numel() * (experts - 1))
        }


def test_dropped_experts_are_not_dispatched() -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    seen: list[Tensor] = []
    plan = plan_of(model, 1.5)
    with secateur.prune_online(model, plan, protect=0, blocks=[1]):
        handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        logits(model)
        handle.remove()
    assert (seen[0] == 4).sum() == IDS.numel(), "behind the last of four experts"


def test_it_is_switched_off_without_a_trace() -> None:
    model = tiny_model("mixtral")
    dense, before = logits(model), copy.deepcopy(model.config.to_dict())
    plan = plan_of(model, 0.9)
    pruner = secateur.prune_online(model, plan, blocks=[0, 1])
    assert not logits(model).equal(dense)
    with pytest.raises(InputError, match="in use"):
        secateur.prune_online(model, plan, blocks=[0])
    pruner.detach()
    assert logits(model).equal(dense)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not model.model.layers[0].mlp.experts._is_expert_parallel
    pruner.attach(model)
    assert not logits(model).equal(dense)
    pruner.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_what_tokens_receive_is_the_attention_of_the_model(family: str, attention: str) -> None:
    model = tiny_model(family)
    if attention == "sdpa" and family == "gpt_oss":
        pytest.skip("its attention has no sdpa")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(IDS, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(attention)
    plan = plan_of(model, 0.0)
    pruner = secateur.prune_online(model, plan, protect=0.5, blocks=everywhere(plan))
    found: dict[int, Tensor] = {}
    inner = pruner._dropped

    def dropped(block: int, rows: Tensor, gates: Tensor) -> Tensor:
        found[block] = pruner._received[block]
        return inner(block, rows, gates)

    pruner._dropped = dropped  # type: ignore[method-assign]
    logits(model)
    pruner.detach()
    windows = model.config.layer_types if family == "gpt_oss" else ["full_attention"] * len(maps)
    for block, received in found.items():
        reach = 16 if windows[block] == "sliding_attention" else IDS.shape[1]
        looking = torch.tensor([min(IDS.shape[1] - place, reach) for place in range(IDS.shape[1])])
        expected = maps[block].mean(1).sum(1) / looking
        torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-6)
    assert found.keys() == set(everywhere(plan))


def test_padding_counts_nowhere_and_changes_nothing() -> None:
    model = tiny_model("mixtral", dtype=torch.float64)
    model.set_experts_implementation("eager")  # the others have no float64
    plan = plan_of(model, 0.8)
    ids = IDS[:1, :20]
    padded = torch.cat([torch.zeros(1, 13, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(33) >= 13).long()[None]
    with secateur.prune_online(model, plan, protect=0.2, blocks=[0, 1]) as pruner:
        alone = logits(model, ids)
        counts = {block: count.clone() for block, count in pruner.counts.items()}
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        beside = logits(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(beside[:, 13:], alone)
    for block, count in pruner.counts.items():
        assert count.equal(2 * counts[block])


def test_single_tokens_are_decided_by_the_threshold_alone() -> None:
    model = tiny_model("mixtral")
    plan = plan_of(model, 1.5)
    with secateur.prune_online(model, plan, protect=1.0, blocks=[0, 1]) as pruner:
        with torch.no_grad():
            first = model(IDS[:, :10], use_cache=True)
            assert pruner.saved == 0.0
            model(IDS[:, 10:11], past_key_values=first.past_key_values, use_cache=True)
        assert {tuple(count.tolist()) for count in pruner.counts.values()} == {(66, 3)}
        model.generate(IDS[:, :10], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert pruner.saved > 0


def test_half_of_the_second_experts_go_at_the_median() -> None:
    model = tiny_model("mixtral")
    ratios: list[Tensor] = []
    experts = model.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: ratios.append(args[2].sort(1).values))
    logits(model)
    handle.remove()
    median = float((ratios[0][:, 0] / ratios[0][:, 1]).median())
    with secateur.prune_online(model, plan_of(model, median), protect=0, blocks=[1]) as pruner:
        logits(model)
        assert pruner.saved == pytest.approx(0.25, abs=0.01)
        unprotected = pruner.saved
    with secateur.prune_online(model, plan_of(model, median), protect=0.2, blocks=[1]) as pruner:
        logits(model)
        assert unprotected - 0.1 < pruner.saved < unprotected


def test_what_cannot_be_switched_is_refused() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(InputError, match="no routed experts"):
        secateur.prune_online(tiny_model("llama"), plan_of(model, 0.5), blocks=[0])
    with pytest.raises(InputError, match="says nothing"):
        secateur.prune_online(model, plan_of(model, 0.5), blocks=[7])
    with pytest.raises(InputError, match="protect"):
        secateur.prune_online(model, plan_of(model, 0.5), blocks=[0], protect=2)
    with pytest.raises(InputError, match="first two"):
        secateur.prune_online(model, plan_of(model, 0.5))
    with pytest.raises(InputError, match="strength"):
        secateur.prune_online(model, plan_of(model, 0.5), blocks=[0], strength=-1)
    blocks = (OnlineBlock(block=9, medians=(0.5,)),)
    with pytest.raises(InputError, match="block 9"):
        secateur.prune_online(model, OnlinePlan(blocks=blocks))
