"""What is observed of routed experts is what a token by token, expert by expert loop over the model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibration.shared import STORIES_TEXT, TALES_MOE, needs_shared
from secateur.anatomy.mixture import mixture_of
from secateur.calibration import routing
from secateur.calibration.driver import Driver
from secateur.calibration.source import FolderSource, MemorySource
from secateur.calibration.windows import Windows, load_windows
from secateur.checkpoint.reader import Checkpoint
from secateur.core.statistics import ROUTED, RoutingStatistics

FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss")
N, K, D = 6, 3, 64

Score = Callable[[Tensor], Tensor]


def many_experts(family: str, **changes: object) -> PreTrainedModel:
    """A tiny model with six experts, of which a token visits three."""
    key = {"deepseek_v3": "n_routed_experts", "mixtral": "num_local_experts", "gpt_oss": "num_local_experts"}
    return tiny_model(family, **{key.get(family, "num_experts"): N, "num_experts_per_tok": K, **changes})


def windows_of(count: int = 5, length: int = 12, padding: bool = False) -> Windows:
    ids = torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))
    windows = Windows.of(ids)
    if padding:
        mask = torch.arange(length) < torch.arange(length, length - count, -1)[:, None]
        windows = Windows.of(ids, mask)
    return windows


def observe(model: PreTrainedModel, windows: Windows, batch_size: int = 2) -> list[RoutingStatistics | None]:
    found = []
    for block in Driver(MemorySource(model), windows, batch_size=batch_size).blocks():
        found.append(block.observe_routing(ROUTED))
        block.finish()
    return found


def calls_of(model: PreTrainedModel, module: nn.Module, windows: Windows) -> list[Tensor]:
    """What the last call of a module got, real tokens alone, from the whole model's own forward."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.extend(args))
    with torch.no_grad():
        model(windows.ids, attention_mask=windows.mask, use_cache=False)
    handle.remove()
    real = torch.ones_like(windows.ids).bool() if windows.mask is None else windows.mask.bool()
    return [tensor.flatten(0, -2)[real.flatten()] for tensor in seen]


def expert_output(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """One expert on one token, by the formula of its family."""
    first, second = experts.gate_up_proj[expert], experts.down_proj[expert]
    if not hasattr(experts, "limit"):
        gate, up = (first @ x).chunk(2)
        return second @ (experts.act_fn(gate) * up)
    both = x @ first + experts.gate_up_proj_bias[expert]
    gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
    hidden = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    return hidden @ second + experts.down_proj_bias[expert]


def brute_force(
    experts: nn.Module, x: Tensor, routes: Tensor, gates: Tensor, probabilities: Tensor
) -> RoutingStatistics:
    counts, chosen, weights, norms = (torch.zeros(N, dtype=torch.float64) for _ in range(4))
    together, losses = (torch.zeros(N, N, dtype=torch.float64) for _ in range(2))
    for t, row in enumerate(routes.tolist()):
        for slot, i in enumerate(row):
            counts[i] += 1
            chosen[i] += probabilities[t, i]
            weights[i] += gates[t, slot]
            norms[i] += gates[t, slot] * expert_output(experts, i, x[t]).norm()
            for other, j in enumerate(row):
                together[i, j] += i != j
                mine, others = (expert_output(experts, e, x[t]).double() for e in (i, j))
                losses[i, j] += gates[t, slot] * gates[t, other] * (mine @ others)
    means = torch.stack([sum(expert_output(experts, e, one).double() for one in x) for e in range(N)])
    ratios = torch.stack([row.sort(descending=True).values for row in gates])
    return RoutingStatistics(
        len(x),
        counts,
        together,
        chosen,
        weights,
        (ratios[:, 1:] / ratios[:, :1]).half(),
        norms,
        means,
        losses,
    )


def require_close(ours: RoutingStatistics, theirs: RoutingStatistics) -> None:
    assert ours.tokens == theirs.tokens
    assert torch.equal(ours.counts, theirs.counts)
    assert torch.equal(ours.coactivation, theirs.coactivation)
    for name in ("probabilities", "gates", "norms", "means", "losses"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(ours.ratios, theirs.ratios, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_double_loops(family: str, padding: bool) -> None:
    model, windows = many_experts(family), windows_of(padding=padding)
    found = observe(model, windows)
    driver = Driver(MemorySource(model), windows)
    for block, ours in zip(driver.source.anatomy.blocks, found, strict=True):
        mixture = mixture_of(block)
        if mixture is None:
            assert ours is None
            continue
        layer = model.get_submodule(block.prefix)
        x, routes, gates = calls_of(model, layer.get_submodule(mixture.module), windows)
        router = layer.get_submodule(mixture.router_module)
        logits = x @ router.weight.T + (router.bias if family == "gpt_oss" else 0)
        probabilities = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(1)
        with torch.no_grad():
            expected = brute_force(layer.mlp.experts, x, routes, gates, probabilities)
        require_close(ours, expected)
        assert ours.counts.sum() == K * ours.tokens
        assert torch.equal(ours.coactivation.sum(1), (K - 1) * ours.counts)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_losses_are_those_of_a_block_whose_experts_are_zero(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "TOKENS", 5)  # several pieces
    model, windows = many_experts(family), windows_of()
    losses = observe(model, windows)[0].losses
    layer = model.model.layers[0].mlp
    calls = calls_of(model, layer.experts, windows)
    with torch.no_grad():
        before = layer.experts(*calls)
        for gone in ([1], [0, 2], list(range(N))):
            changed = copy.deepcopy(layer.experts)
            for parameter in changed.parameters():
                parameter[gone] = 0
            moved = (changed(*calls) - before).double().square().sum()
            torch.testing.assert_close(losses[gone][:, gone].sum(), moved, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_do_not_matter(family: str) -> None:
    model, windows = many_experts(family), windows_of()
    for one, two in zip(observe(model, windows, 5), observe(model, windows, 2), strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            require_close(one, two)


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"norm_topk_prob": False}])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_probabilities_are_told_from_the_weights_with_or_without_renormalisation(
    family: str, changes: dict[str, bool]
) -> None:
    """Sums of probabilities stay what they are; the weights change."""
    found = observe(many_experts(family, **changes), windows_of())[-1]
    share = found.probabilities.sum() / found.tokens
    if changes["norm_topk_prob"]:
        assert found.gates.sum() / found.tokens == pytest.approx(2.5 if family == "deepseek_v3" else 1)
    elif family == "qwen3_moe":
        torch.testing.assert_close(found.gates, found.probabilities, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(found.gates, 2.5 * found.probabilities, rtol=1e-5, atol=1e-5)
    assert (share < 1) == (family == "qwen3_moe")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_kind_of_probability(dtype: torch.dtype) -> None:
    for family in ("mixtral", "deepseek_v3"):
        found = observe(many_experts(family).to(dtype), windows_of())[-1]
        assert (found.probabilities.sum() / found.tokens < 1) == (family == "mixtral")
        assert all(bool(torch.isfinite(t).all()) for t in (found.norms, found.means, found.ratios))


def test_only_what_is_needed_is_computed() -> None:
    blocks = Driver(MemorySource(many_experts("mixtral")), windows_of()).blocks()
    block = next(blocks)
    assert block.observe_routing({"second_moment"}) is None
    found = block.observe_routing({"routing"})
    assert found.norms is None
    assert found.means is None
    assert block.observe_routing({"expert_norms"}).norms is not None
    assert not block.module.mlp.experts._forward_pre_hooks


@pytest.mark.parametrize("count", [4, 8, 16])
def test_work_is_one_output_a_token_for_each_expert_looked_at(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those a token visits for the norms, all n once for the means: linear in n, whatever the subsets."""
    blocks = Driver(MemorySource(many_experts("mixtral", num_local_experts=count)), windows_of()).blocks()
    block, seen = next(blocks), []
    experts = type(block.module.mlp.experts)
    whole = experts.forward
    monkeypatch.setattr(
        experts,
        "forward",
        lambda self, x, routes, ones: seen.append(routes.numel()) or whole(self, x, routes, ones),
    )
    for needs, outputs in (({"routing"}, 0), ({"expert_norms"}, K), ({"expert_means"}, count)):
        seen.clear()
        block.observe_routing(needs)
        assert sum(seen) == outputs * 60


def test_a_dense_block_has_no_experts() -> None:
    assert observe(tiny_model("llama"), windows_of()) == [None, None]


def test_one_expert_a_token_has_neither_pairs_nor_ratios() -> None:
    found = observe(many_experts("mixtral", num_experts_per_tok=1), windows_of())[0]
    assert not found.coactivation.any()
    assert found.ratios.shape == (60, 0)


@needs_shared
def test_trained_experts_see_every_token() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TALES_MOE)
    windows = load_windows(str(STORIES_TEXT), tokenizer=tokenizer, samples=4, length=128)
    for block in Driver(FolderSource(Checkpoint.open(TALES_MOE)), windows).blocks():
        found = block.observe_routing(ROUTED)
        assert found.tokens == 512
        assert found.counts.sum() == 2 * found.tokens
        assert found.gates.sum() == pytest.approx(found.tokens, rel=1e-3)
        assert bool((found.probabilities <= found.gates + 1e-2).all())
        assert bool((found.ratios <= 1).all())
        block.finish()
