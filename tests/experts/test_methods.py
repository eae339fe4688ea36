"""Methods for routed experts: closed forms, and what must hold for all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from calibration.shared import STORIES_TEXT, TALES_MOE, needs_shared
from experts.problems import make_problem, make_routing
from secateur.anatomy.mixture import mixture_of
from secateur.anatomy.model import Matrix
from secateur.calibration.driver import Driver
from secateur.calibration.source import FolderSource, MemorySource
from secateur.calibration.windows import Windows, load_windows
from secateur.checkpoint.reader import Checkpoint
from secateur.core.errors import RecipeError
from secateur.core.method import METHODS, methods_of
from secateur.experts.base import ExpertMethod, ExpertProblem, Survivors, expert_problem
from secateur.experts.frequency_experts import FrequencyExperts
from secateur.experts.merge_experts import MergeExperts
from secateur.experts.reap import Reap
from secateur.experts.recon_experts import ReconExperts
from secateur.experts.stun import Stun

MINE = [name for name in methods_of("experts") if issubclass(METHODS.get(name), ExpertMethod)]
VARIANTS: list[ExpertMethod] = [
    *(METHODS.get(name)() for name in MINE),
    FrequencyExperts(weighting="gates"),
    Stun(similarity="mixed", linkage="stun", representative="frequency"),
    Stun(similarity="coactivation", linkage="average", representative="output", router="mean"),
    Stun(similarity="cosine", mean_if_clusters=0, dead="cluster"),
    MergeExperts(linkage="complete", router="representative"),
    Stun(representative="recon"),
    ReconExperts(search="each"),
    ReconExperts(search="exhaustive"),
]
SCORED = [method for method in VARIANTS if method.id != "random-experts"]


def name_of(method: ExpertMethod) -> str:
    return "-".join([method.id, *(str(value) for value in method.model_dump(exclude_defaults=True).values())])


def survivors(method: ExpertMethod, problem: ExpertProblem, count: int) -> Survivors:
    """What is left when so many of the highest scores stay; of equal ones the lowest index goes first."""
    order = method.score(problem).flip(0).argsort(descending=True, stable=True)
    return method.regroup(problem, (problem.count - 1 - order[:count]).sort().values)


def test_neighbours_are_taken_without_a_copy() -> None:
    problem = make_problem()
    for rows in (
        torch.arange(8),
        torch.arange(2, 5),
        torch.tensor([6]),
        torch.tensor([3, 2]),
        torch.tensor([0, 2]),
    ):
        part = problem.part(rows)
        for name, stacked in problem.weights.items():
            assert part.weights[name].equal(stacked[rows])
            shared = part.weights[name].untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
            assert shared == (rows.tolist() not in ([3, 2], [0, 2]))


@pytest.mark.parametrize("visited", [8, 5, 1], ids=lambda seen: f"{seen} visited")
@pytest.mark.parametrize("method", VARIANTS, ids=name_of)
def test_every_count_is_met_exactly(method: ExpertMethod, visited: int) -> None:
    problem = make_problem(visited=max(visited, 2))
    for count in range(1, 9):
        left = survivors(method, problem, count)
        assert left.kept.dtype == torch.int64
        assert left.kept.tolist() == sorted(set(left.kept.tolist()))
        assert len(left.kept) == count
        for mix in (left.mix, left.router_mix):
            if mix is not None:
                assert mix.dtype == torch.float32
                assert mix.shape == (count, 8)
                torch.testing.assert_close(mix.sum(1), torch.ones(count))
        if left.clusters:
            assert all(one in part for one, part in zip(left.kept.tolist(), left.clusters, strict=True))
            assert len({one for part in left.clusters for one in part}) == sum(map(len, left.clusters))
    assert (left.mix, left.router_mix, left.clusters) == (None, None, ())  # all of them: as they were


@pytest.mark.parametrize("method", SCORED, ids=name_of)
def test_the_order_of_the_experts_does_not_matter(method: ExpertMethod) -> None:
    problem = make_problem()
    problem.observed.coactivation += problem.router @ problem.router.T / 100  # no ties
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    for count in range(1, 8):
        ours, moved = survivors(method, problem, count), survivors(method, problem.part(order), count)
        assert sorted(order[moved.kept].tolist()) == ours.kept.tolist()
        parts = {tuple(sorted(order[list(part)].tolist())) for part in moved.clusters}
        assert parts == set(ours.clusters)
        for mine, other in ((ours.mix, moved.mix), (ours.router_mix, moved.router_mix)):
            assert (mine is None) == (other is None)
            if mine is not None:
                back = torch.zeros_like(mine)
                back[:, order] = other[order[moved.kept].argsort()]
                torch.testing.assert_close(back, mine)


@pytest.mark.parametrize("method", VARIANTS, ids=name_of)
def test_scores_repeat_and_no_problem_is_changed(method: ExpertMethod) -> None:
    first, second, untouched = make_problem(), make_problem(), make_problem()
    assert torch.equal(method.score(first), method.score(second))
    method.regroup(first, torch.arange(3))
    assert all(torch.equal(stack, untouched.weights[name]) for name, stack in first.weights.items())
    assert torch.equal(first.observed.coactivation, untouched.observed.coactivation)


def test_frequency_is_the_share_of_tokens_or_of_weights() -> None:
    routing = make_routing(torch.tensor([[0, 1], [1, 2], [1, 0], [1, 2]]), 4)
    problem = replace(make_problem(4), routing=replace(routing, gates=torch.tensor([2.0, 1, 1, 0])))
    assert FrequencyExperts().score(problem).tolist() == [0.5, 1, 0.5, 0]
    assert FrequencyExperts(weighting="gates").score(problem).tolist() == [0.5, 0.25, 0.25, 0]
    assert survivors(FrequencyExperts(), problem, 2).kept.tolist() == [1, 2]  # of equal ones the first goes


def test_reap_is_a_mean_over_visits() -> None:
    routing = make_routing(torch.tensor([[0, 1], [1, 2], [1, 0], [1, 2]]), 4)
    problem = replace(make_problem(4), routing=replace(routing, norms=torch.tensor([3.0, 4.0, 5.0, 0.0])))
    assert Reap().score(problem).tolist() == [1.5, 1.0, 2.5, 0.0]
    with pytest.raises(ValueError, match="not observed"):
        Reap().score(replace(problem, routing=replace(routing, norms=None)))


def planted(seed: int = 0, noise: float = 1e-3) -> tuple[ExpertProblem, list[tuple[int, ...]]]:
    """Eight experts, each there twice with a little noise, shuffled; and which belong together."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(16, generator=generator) % 8
    problem = make_problem(seed=seed).part(order)
    add = lambda x: x + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    problem.router = add(problem.router)
    problem.weights = {name: add(stack) for name, stack in problem.weights.items()}
    problem.observed.means = add(problem.observed.means)
    return problem, sorted(tuple((order == one).nonzero().squeeze(1).tolist()) for one in range(8))


@pytest.mark.parametrize(
    "method",
    [
        *(Stun(linkage=linkage) for linkage in ("complete", "average", "stun")),
        Stun(similarity="cosine"),
        Stun(similarity="outputs"),
        MergeExperts(),
    ],
    ids=name_of,
)
def test_planted_pairs_are_found(method: ExpertMethod) -> None:
    problem, pairs = planted()
    left = survivors(method, problem, 8)
    assert sorted(left.clusters) == pairs
    assert method.score(problem).sort().values[7] < method.score(problem).sort().values[8] / 10


@pytest.mark.parametrize("method", [Stun(mean_if_clusters=8), MergeExperts()], ids=name_of)
def test_identical_experts_merge_to_themselves(method: ExpertMethod) -> None:
    problem, _ = planted(noise=0)
    left = survivors(method, problem, 8)
    for stack in (problem.router, *problem.weights.values()):
        flat = stack.flatten(1)
        torch.testing.assert_close(left.mix @ flat, flat[left.kept])


def three_in_a_row() -> ExpertProblem:
    """Experts at 0, 1, 2, 10 and 11 on a line, by weights and by the router."""
    problem = make_problem(5)
    places = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0])
    problem.router = places[:, None].expand(5, 4).contiguous()
    problem.weights = {name: places[:, None, None] + torch.zeros(5, 3, 2) for name in ("a", "b")}
    counts = torch.tensor([9.0, 1.0, 5.0, 3.0, 4.0]).double()
    problem.routing = replace(problem.observed, counts=counts, means=places[:, None].double() ** 2)
    return problem


def test_which_member_stays() -> None:
    problem, keep = three_in_a_row(), torch.arange(2)
    options = {"centroid": [1, 4], "frequency": [0, 4], "output": [1, 4]}  # 3 and 4 are equally far: visits
    for representative, kept in options.items():
        method = Stun(representative=representative, mean_if_clusters=0)
        left = method.regroup(problem, keep)
        assert left.kept.tolist() == kept
        assert left.clusters == ((0, 1, 2), (3, 4))
        assert left.mix is None
        assert left.router_mix is None
    assert Stun(mean_if_clusters=0, dead="cluster").regroup(
        replace(problem, routing=None), keep
    ).kept.tolist() == [1, 3]  # no visits are known: the first


@pytest.mark.parametrize("seed", range(5))
def test_of_a_pair_the_more_visited_stays(seed: int) -> None:
    """Both are equally far from their mean, up to rounding."""
    problem, pairs = planted(seed, noise=0.1)
    counts = problem.observed.counts = (
        torch.randperm(16, generator=torch.Generator().manual_seed(seed)).double() + 1
    )
    left = Stun().regroup(problem, torch.arange(8))
    assert sorted(left.clusters) == pairs
    assert left.kept.tolist() == sorted(max(pair, key=lambda one: counts[one]) for pair in pairs)


def test_few_clusters_become_means() -> None:
    problem = three_in_a_row()
    left = Stun().regroup(problem, torch.arange(2))
    expected = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1.5, 1.5]]) / 3
    torch.testing.assert_close(left.mix, expected)
    torch.testing.assert_close(left.router_mix, expected)
    three = Stun(router="mean").regroup(problem, torch.arange(3))
    assert three.mix is None
    assert three.router_mix.shape == (3, 5)


def test_merging_weighs_by_visits() -> None:
    problem = three_in_a_row()
    left = MergeExperts().regroup(problem, torch.arange(2))
    assert left.kept.tolist() == [0, 4]
    torch.testing.assert_close(
        left.mix, torch.tensor([[9 / 15, 1 / 15, 5 / 15, 0, 0], [0, 0, 0, 3 / 7, 4 / 7]])
    )
    assert torch.equal(left.mix, left.router_mix)
    assert MergeExperts(router="representative").regroup(problem, torch.arange(2)).router_mix is None
    problem.observed.counts[3:] = 0
    unseen = MergeExperts().regroup(problem, torch.arange(2))
    torch.testing.assert_close(unseen.mix[1], torch.tensor([0, 0, 0, 0.5, 0.5]))


@pytest.mark.parametrize("similarity", ["coactivation", "router"])
def test_experts_without_a_token_go_first(similarity: str) -> None:
    method, problem = Stun(similarity=similarity), make_problem(visited=5)
    scores = method.score(problem)
    assert scores[5:].tolist() == [-torch.inf] * 3
    assert bool((scores[:5] > -torch.inf).all())
    assert survivors(method, problem, 5).kept.tolist() == [0, 1, 2, 3, 4]
    assert survivors(method, problem, 6).kept.tolist() == [0, 1, 2, 3, 4, 7]
    assert all(max(part) < 5 for part in survivors(method, problem, 3).clusters)


def test_where_nothing_was_visited_all_are_clustered() -> None:
    problem = make_problem()
    problem.routing = replace(problem.observed, counts=torch.zeros(8).double(), tokens=0)
    assert torch.equal(Stun().score(problem), Stun(dead="cluster").score(problem))


def test_experts_visited_together_are_alike_by_coactivation() -> None:
    routes = torch.tensor([[0, 2]] * 9 + [[1, 3]] * 8 + [[0, 1]] * 2 + [[2, 3]])
    problem = replace(make_problem(4), routing=make_routing(routes, 4))
    assert Stun(similarity="coactivation").regroup(problem, torch.arange(2)).clusters == ((0, 2), (1, 3))


def test_mixed_is_a_weighted_sum() -> None:
    problem = make_problem()
    one, two = (Stun(similarity=kind).distance(problem) for kind in ("router", "coactivation"))
    found = Stun(similarity="mixed", lambda1=0.5, lambda2=3).distance(problem)
    torch.testing.assert_close(found, 0.5 * one + 3 * two)


def test_methods_ask_for_what_their_options_need() -> None:
    assert Stun().statistics == {"routing"}
    assert Stun(dead="cluster").statistics == frozenset()
    assert Stun(dead="cluster", representative="frequency").statistics == {"routing"}
    assert Stun(similarity="outputs", dead="cluster").statistics == {"routing", "expert_means"}
    assert not torch.isnan(Stun(dead="cluster").score(replace(make_problem(), routing=None))).any()


def as_seen(matrices: tuple[Matrix, ...], parameters: dict[str, Tensor], parameter: str) -> Tensor:
    return torch.stack([m.view(parameters) for m in matrices if m.parameter == parameter])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_a_problem_is_read_off_the_axes(family: str) -> None:
    model = tiny_model(family)
    for block in Driver(MemorySource(model), Windows.none()).blocks(forward=False):
        problem = expert_problem(block.block, block.parameters, top_k=2, generator=torch.Generator())
        block.finish()
        layer = model.get_submodule(block.block.prefix)
        if not hasattr(layer.mlp, "experts"):
            assert problem is None
            continue
        router = layer.mlp.router if family == "gpt_oss" else layer.mlp.gate
        assert torch.equal(problem.router, router.weight)
        added = {"gpt_oss": "bias", "deepseek_v3": "e_score_correction_bias"}.get(family)
        assert (problem.bias is None) == (added is None)
        assert added is None or torch.equal(problem.bias, getattr(router, added))
        assert len(problem.weights) == 2
        for name, stack in problem.weights.items():
            assert torch.equal(stack, as_seen(block.block.matrices, block.parameters, name))
            assert stack.data_ptr() == block.parameters[name].data_ptr()
        assert mixture_of(block.block).module == "mlp.experts"


@needs_shared
def test_methods_see_every_token_of_a_trained_model() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TALES_MOE)
    windows = load_windows(str(STORIES_TEXT), tokenizer=tokenizer, samples=4, length=128)
    methods = [method for method in VARIANTS if method.id != "random-experts"]
    needs = frozenset[str]().union(*(method.statistics for method in methods))
    for block in Driver(FolderSource(Checkpoint.open(TALES_MOE)), windows).blocks():
        problem = expert_problem(
            block.block,
            block.parameters,
            top_k=2,
            generator=torch.Generator(),
            routing=block.observe_routing(needs),
        )
        assert FrequencyExperts().score(problem).sum() == pytest.approx(2)
        assert FrequencyExperts(weighting="gates").score(problem).sum() == pytest.approx(1, rel=1e-3)
        assert bool((Reap().score(problem)[problem.observed.counts > 0] > 0).all())
        for method in methods:
            assert len(survivors(method, problem, 6).kept) == 6
        block.finish()


def lost(problem: ExpertProblem, kept: Tensor) -> float:
    """Squared change of the output of a block without the others, relative."""
    losses = problem.observed.losses
    assert losses is not None
    gone = [one for one in range(problem.count) if one not in kept.tolist()]
    return float(losses[gone][:, gone].sum() / losses.sum())


def test_the_best_set_is_never_beaten_and_a_search_beats_chance() -> None:
    by = {search: ReconExperts(search=search) for search in ("exhaustive", "greedy", "each")}
    greedy_loses = 0
    for seed in range(5):
        problem = make_problem(seed=seed)
        for count in range(1, 8):
            loss = {
                name: lost(problem, survivors(method, problem, count).kept) for name, method in by.items()
            }
            every = [lost(problem, torch.tensor(kept)) for kept in combinations(range(8), count)]
            assert loss["exhaustive"] == pytest.approx(min(every), abs=1e-12)
            assert loss["exhaustive"] <= min(loss.values()) + 1e-12
            assert loss["greedy"] <= sorted(every)[len(every) // 2]
            greedy_loses += loss["greedy"] > loss["exhaustive"] + 1e-9
    assert greedy_loses, "or the searches are the same"


def test_heights_of_sets_are_what_one_more_costs() -> None:
    problem = make_problem()
    method = ReconExperts(search="exhaustive")
    heights = method.score(problem).sort().values
    totals = [lost(problem, survivors(method, problem, count).kept) for count in range(8, 0, -1)]
    steps = torch.tensor(totals, dtype=torch.float64).diff()
    torch.testing.assert_close(heights[:7], steps.cummax(0).values)


def test_of_a_cluster_the_member_stays_without_which_most_is_lost() -> None:
    problem = make_problem()
    left = survivors(Stun(representative="recon", mean_if_clusters=0), problem, 4)
    losses = problem.observed.losses
    assert losses is not None
    for stays, members in zip(left.kept.tolist(), left.clusters, strict=True):
        without = [
            float(losses[rest][:, rest].sum())
            for rest in ([other for other in members if other != one] for one in members)
        ]
        assert members[without.index(min(without))] == stays


def test_too_many_experts_for_all_sets_are_refused_before_a_run() -> None:
    ReconExperts(search="exhaustive").check([16])
    ReconExperts().check([128])
    with pytest.raises(RecipeError, match="search=greedy"):
        ReconExperts(search="exhaustive").check([8, 17])
