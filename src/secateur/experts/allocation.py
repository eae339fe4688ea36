"""How many experts stay where: as many in every block, or the last of one ranking of the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.anatomy.router import RouterRules
from secateur.core.errors import RecipeError
from secateur.core.goal import Goal, fewest
from secateur.experts.base import ExpertMethod

__all__ = ["allocate"]

TOLERANCE = 0.02


def allocate(
    scores: Sequence[Tensor],
    rules: RouterRules,
    sparsity: float,
    method: ExpertMethod,
    *,
    goal: Goal | None = None,
) -> list[Tensor]:
    """Choose what stays: exactly the number of experts that comes nearest to the sparsity, or as many as a
    limit allows.

    Args:
        scores: (n,) of each block with experts; the smallest go, ties by position.
        rules: every block keeps at least what its router needs, and as many in each of its groups.
        sparsity: fraction of all these experts that goes.
        goal: a limit that is met instead of the sparsity, and never exceeded.

    Returns:
        For each block the experts that stay, sorted int64.

    Raises:
        RecipeError: more than can go, or no number of experts near it.
    """
    ranked = [_ranked(own, rules.groups) for own in scores]
    floor = max(rules.least, method.min_keep)
    most = [max(0, (len(own) - floor) // rules.groups) for own in scores]

    def left(steps: Sequence[int]) -> list[int]:
        return [len(own) - taken * rules.groups for own, taken in zip(scores, steps, strict=True)]

    def spend(share: float) -> list[int]:
        if method.spread == "global":
            return _global(ranked, most, round(share * sum(map(len, scores)) / rules.groups), method)
        return [round(share * len(own) / rules.groups) for own in scores]

    if goal is None:
        steps = spend(sparsity)
        _check_share(scores, rules, sparsity, method, steps, most)
    else:
        kept = f"what is no expert, and the {floor} experts that every block keeps"
        goal.require_reachable(left(most), kept, "raise --budget")
        whole = sum(map(len, scores)) if method.spread == "global" else max(map(len, scores))

        def within(count: int) -> list[int]:
            return [min(pair) for pair in zip(spend(count * rules.groups / whole), most, strict=True)]

        steps = within(fewest(lambda count: goal.met(left(within(count))), whole // rules.groups))
    gone = [members[:taken].flatten() for (_, members), taken in zip(ranked, steps, strict=True)]
    return [_others(len(own), lost) for own, lost in zip(scores, gone, strict=True)]


def _check_share(
    scores: Sequence[Tensor],
    rules: RouterRules,
    sparsity: float,
    method: ExpertMethod,
    steps: Sequence[int],
    most: Sequence[int],
) -> None:
    """Refuse a share that is out of reach, or that whole experts do not make."""
    total = sum(map(len, scores))
    reached = sum(steps) * rules.groups / total
    if any(taken > room for taken, room in zip(steps, most, strict=True)) or (
        reached < sparsity - TOLERANCE and sum(steps) == sum(most)
    ):
        raise RecipeError(
            f"sparsity {sparsity:g} of the experts",
            f"at most {sum(most) * rules.groups / total:.3f}: a token visits {rules.top_k}, and every block "
            f"keeps {max(rules.least, method.min_keep)}",
            "lower --sparsity",
        )
    if abs(reached - sparsity) > TOLERANCE:
        raise RecipeError(
            f"sparsity {sparsity:g} of the experts",
            f"a share that whole experts make: {_near(scores, rules, sparsity)}",
            "choose one of these, or spread the budget over the model: -O spread=global",
        )


def _ranked(scores: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What goes first: the mean score of the lowest expert of every group, of the second lowest, ..., (m,)
    float64 ascending, and who they are, (m, groups)."""
    each, order = scores.double().view(groups, -1).sort(dim=1, stable=True)
    members = order + torch.arange(groups)[:, None] * order.shape[1]
    means = each.mean(0)
    return means.masked_fill(means.isnan(), torch.inf), members.T


def _global(
    ranked: Sequence[tuple[Tensor, Tensor]], most: Sequence[int], count: int, method: ExpertMethod
) -> list[int]:
    """How many go of each block when the lowest `count` of all go."""
    candidates = [_comparable(values, method)[:room] for (values, _), room in zip(ranked, most, strict=True)]
    owner = torch.cat([torch.full((len(own),), number) for number, own in enumerate(candidates)])
    lowest = owner[torch.cat(candidates).argsort(stable=True)[:count]]
    return torch.bincount(lowest, minlength=len(ranked)).tolist()


def _comparable(values: Tensor, method: ExpertMethod) -> Tensor:
    """As they compete with those of other blocks."""
    if method.comparable or len(values) < 2:
        return values
    finite = values[values.isfinite()]
    spread = finite.std() if len(finite) > 1 else values.new_zeros(())
    return (values - finite.mean()) / spread if float(spread) > 0 else torch.nan_to_num(values * 0)


def _near(scores: Sequence[Tensor], rules: RouterRules, sparsity: float) -> str:
    count = min(map(len, scores)) // rules.groups
    below = int(sparsity * count)
    return ", ".join(f"{step / count:.3f}" for step in (below, below + 1) if 0 < step < count)


def _others(count: int, gone: Tensor) -> Tensor:
    stays = torch.ones(count, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().squeeze(1)
