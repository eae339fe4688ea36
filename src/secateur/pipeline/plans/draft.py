"""From scores and a budget to the units that stay, with the nearest plan in which all blocks are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.resized import fixed_heads, is_stock
from secateur.anatomy.units import Units, norm_over
from secateur.core.errors import AnatomyError, InputError, RecipeError
from secateur.core.goal import Goal
from secateur.core.plan import Plan
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.decode_costs import DecodeTable
from secateur.pipeline.plans.result import Group, Result, new_biases, unit_bytes
from secateur.recipe import Recipe
from secateur.structure.allocation import Scored, allocate
from secateur.structure.base import StructureMethod, UnitMethod
from secateur.structure.groups import floor_of
from secateur.structure.knapsack import loss_curves
from secateur.structure.nearest import Widths, nearest_uniform

__all__ = ["Draft", "draft", "goal_of", "groups_of"]


@dataclass(frozen=True)
class Draft:
    """A plan with everything that follows from it before a weight is read.

    Attributes:
        scored: all units with their scores (zeros where a plan was given).
        kept: for each group the units that stay.
        sparsity: fraction of the parameters in blocks that was asked for.
        goal: the limit that was to be met.
        equal: the nearest plan with all blocks alike, where this one's differ and scores are known.
    """

    opened: Opened
    method: UnitMethod
    scored: Sequence[Scored]
    kept: Sequence[Tensor]
    sparsity: float
    goal: Goal | None
    equal: Sequence[Tensor] | None

    @cached_property
    def result(self) -> Result:
        return self._result(self.kept)

    @property
    def freed(self) -> int:
        """Parameters of the units that go."""
        return _freed(self.scored, self.kept)

    def stored(self, recipe: Recipe, calibration_sha256: str) -> Plan:
        """The plan as a file; one that was given keeps the calibration it was made from."""
        if recipe.plan is not None:
            calibration_sha256 = Plan.load(recipe.plan).calibration_sha256
        blocks: list[dict[str, list[int]]] = [{} for _ in self.opened.anatomy.blocks]
        for group, stays in zip(self.scored, self.kept, strict=True):
            blocks[group.block][group.units.kind] = stays.tolist()
        return Plan(
            model=self.opened.checkpoint.fingerprint(),
            method=self.method.id,
            options=self.method.model_dump(mode="json"),
            sparsity=self.sparsity,
            budget=recipe.budget,
            calibration_sha256=calibration_sha256,
            counts=self.counts(),
            blocks=blocks,
        )

    def counts(self) -> dict[str, Any]:
        """Sizes of the result."""
        return {
            "parameters": self.result.parameters,
            "bytes": self.result.nbytes,
            "units_before": _units(self.scored, [range(group.units.count) for group in self.scored]),
            "units_after": _units(self.scored, self.kept),
        }

    def facts(self) -> dict[str, Any]:
        """For a report: counts, floors that were reached, the budget, and the nearest uniform plan."""
        return {
            **self.counts(),
            "stock": self.result.stock,
            "floors": self.floors(),
            "budget": self._budget(),
            "uniform": self._uniform(),
        }

    def notes(self) -> list[str]:
        """What became of options, for the user."""
        asked = isinstance(self.method, StructureMethod) and self.method.uniform
        if not asked or not _must_keep_heads(self.opened):
            return []
        family = self.opened.anatomy.family
        if not any(map(_is_heads, self.scored)):
            return []
        return [f"All heads stay: the stock class of {family} has none of this width but as many as fill it."]

    def floors(self) -> list[str]:
        """Groups that keep no more than they must."""
        return [
            f"{group.block}.{group.units.kind}"
            for group, stays in zip(self.scored, self.kept, strict=True)
            if len(stays) <= floor_of(group.units, self.method) < group.units.count
        ]

    def score_lost(self, kept: Sequence[Tensor]) -> float:
        """Loss of a plan in terms of the scores (see `StructureMethod.losses`)."""
        assert isinstance(self.method, StructureMethod)  # others have no plan that is nearest
        curves = loss_curves(self.scored, self.method)
        return sum(
            float(curve[group.units.count - len(stays)])
            for curve, group, stays in zip(curves, self.scored, kept, strict=True)
        )

    def _budget(self) -> dict[str, Any] | None:
        if self.goal is None:
            return None
        exact = {"parameters": self.result.parameters, "bytes": self.result.nbytes}  # biases may be narrower
        planned = exact.get(self.goal.unit, self.goal.cost([len(stays) for stays in self.kept]))
        return self.goal.facts(planned, [group.units.count for group in self.scored])

    def _uniform(self) -> dict[str, Any] | None:
        if self.equal is None:
            return None
        result, here, there = (
            self._result(self.equal),
            self.score_lost(self.kept),
            self.score_lost(self.equal),
        )
        return {
            "units_a_block": {
                group.units.kind: len(stays) for group, stays in zip(self.scored, self.equal, strict=True)
            },
            "parameters": result.parameters,
            "bytes": result.nbytes,
            "stock": result.stock,
            "score_lost": there,
            "score_lost_unequal": here,
            "extra_loss": (there - here) / here if here > 0 else 0.0,
        }

    def _result(self, kept: Sequence[Tensor]) -> Result:
        groups = [(group.block, group.units) for group in self.scored]
        return Result.of(self.opened, groups, kept, new_biases(self.opened, groups, self.method))


def groups_of(opened: Opened, method: UnitMethod) -> list[Group]:
    """All units of the model that compete.

    Raises:
        RecipeError: there are none.
        AnatomyError: units that cannot go because one norm goes over all of them.
    """
    blocks = opened.anatomy.blocks
    competing = method.open_blocks(len(blocks))
    if not competing:
        raise RecipeError(
            f"protect_first={method.protect_first:g} and protect_last={method.protect_last:g}",
            f"shares that leave some of the {len(blocks)} blocks",
            "lower them",
        )
    groups = [(index, units) for index in competing for units in method.units(blocks[index])]
    if not groups:
        raise RecipeError(
            f"method {method.id!r} on {opened.anatomy.family!r}",
            "a model with channels or heads that one matrix collects",
            "prune single weights: wanda",
        )
    for index, units in groups:
        if norm := norm_over(blocks[index], units):
            raise AnatomyError(
                f"heads of {opened.anatomy.family!r}, whose {norm} belongs to one norm over all: those "
                "that stay would not be what they were",
                "heads that are normalised one by one, or not at all",
                "remove feed-forward channels only: -O targets=ffn",
            )
    return groups


def draft(
    opened: Opened,
    method: StructureMethod,
    recipe: Recipe,
    found: Mapping[str, Tensor] | None = None,
    decode: DecodeTable | None = None,
) -> Draft:
    """Choose what stays.

    Args:
        found: scores by name; without them all units are alike, which is enough to check a request.
        decode: measured, for a budget in milliseconds.

    Raises:
        RecipeError: a share or budget that cannot be met.
        InputError: a plan of another model.
    """
    scored = _scored(opened, method, found)
    if recipe.plan is not None:
        plan = Plan.load(recipe.plan)
        return Draft(
            opened, method, scored, _planned(opened, scored, plan, recipe.plan), plan.sparsity, None, None
        )
    blocks = opened.anatomy.blocks
    sizes, goal = [block.size for block in blocks], goal_of(opened, method, recipe, decode)
    sparsity = 0.0 if goal else recipe.resolved_sparsity
    turns = found.get(method.change) if found else None
    angles = torch.zeros(len(blocks)) if turns is None else turns
    kept = allocate(scored, sizes, sparsity, method, angles, goal=goal)
    even = method.spread == "uniform" and is_stock(opened.checkpoint.config)
    even = (even or _alike(opened, scored, kept)) and not _lacks_heads(opened, scored, kept)
    equal = None if even else _equal(opened, method, scored, kept, goal)
    if method.uniform and not even:
        if equal is None or _lacks_heads(opened, scored, equal):
            must = f" with all heads of {opened.anatomy.family}" if fixed_heads(opened.anatomy) else ""
            raise RecipeError(
                "-O uniform=true",
                f"a plan with equal blocks{must} that is as small",
                "ask for less, or leave it out",
            )
        kept, equal = equal, None
    reached = _freed(scored, kept) / sum(sizes)
    return Draft(opened, method, scored, kept, reached if goal else sparsity, goal, equal)


def goal_of(
    opened: Opened, method: StructureMethod, recipe: Recipe, decode: DecodeTable | None
) -> Goal | None:
    """The budget of the recipe as a limit on the whole model, embeddings and added biases included."""
    target = recipe.target
    if target is None:
        return None
    groups = groups_of(opened, method)
    if target.kind == "decode":
        if decode is None:
            raise ValueError("a decode budget needs measured costs")
        goal = decode.goal(groups, target.of(decode.milliseconds))
        dense = decode.milliseconds
    else:
        goal, dense = _linear_goal(opened, method, groups, target.kind, target.of)
    goal.require_below(dense, recipe.budget)
    return goal


def _linear_goal(
    opened: Opened, method: StructureMethod, groups: Sequence[Group], kind: str, limit_of: Any
) -> tuple[Goal, float]:
    checkpoint, biases = opened.checkpoint, new_biases(opened, groups, method)
    in_bytes = kind == "bytes"
    dense = checkpoint.dense_nbytes if in_bytes else checkpoint.parameters
    each = [unit_bytes(opened, group) if in_bytes else group[1].parameters for group in groups]
    whole = Result.of(opened, groups, [torch.arange(units.count) for _, units in groups], biases)
    most = whole.nbytes if in_bytes else whole.parameters  # with biases, the widest they can be
    counts = [units.count for _, units in groups]
    return Goal.linear(kind, limit_of(dense), most, counts, each), float(dense)


def _scored(opened: Opened, method: StructureMethod, found: Mapping[str, Tensor] | None) -> list[Scored]:
    return [
        Scored(index, units, found[f"{index}.{units.kind}"] if found else torch.zeros(units.count))
        for index, units in groups_of(opened, method)
    ]


def _freed(scored: Sequence[Scored], kept: Sequence[Tensor]) -> int:
    return sum(
        (group.units.count - len(stays)) * group.units.parameters
        for group, stays in zip(scored, kept, strict=True)
    )


def _units(scored: Sequence[Scored], kept: Sequence[Sequence[int] | Tensor]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for group, stays in zip(scored, kept, strict=True):
        totals[group.units.kind] = totals.get(group.units.kind, 0) + len(stays)
    return totals


def _alike(opened: Opened, scored: Sequence[Scored], kept: Sequence[Tensor]) -> bool:
    """Whether groups of one kind (and size, where a stock class has several) keep equally many."""
    stock = is_stock(opened.checkpoint.config)
    widths: dict[tuple[str, int], set[int]] = {}
    for group, stays in zip(scored, kept, strict=True):
        size = group.units.count if stock else 0
        widths.setdefault((group.units.kind, size), set()).add(len(stays))
    return all(len(found) == 1 for found in widths.values())


def _is_heads(group: Scored) -> bool:
    return "heads" in group.units.spaces


def _must_keep_heads(opened: Opened) -> bool:
    """Whether a stock model stays one only with all its heads."""
    return is_stock(opened.checkpoint.config) and fixed_heads(opened.anatomy)


def _lacks_heads(opened: Opened, scored: Sequence[Scored], kept: Sequence[Tensor]) -> bool:
    """Whether a stock model loses heads that its class must have."""
    if not _must_keep_heads(opened):
        return False
    pairs = zip(scored, kept, strict=True)
    return any(_is_heads(group) and len(stays) < group.units.count for group, stays in pairs)


def _equal(
    opened: Opened,
    method: StructureMethod,
    scored: Sequence[Scored],
    kept: Sequence[Tensor],
    goal: Goal | None,
) -> list[Tensor] | None:
    """The nearest uniform plan of one whose blocks differ; a stock class has it where one can."""
    groups = [(group.block, group.units) for group in scored]

    def legal(widths: Widths) -> bool:
        stays = [torch.arange(widths[number]) for number in range(len(groups))]
        if _lacks_heads(opened, scored, stays):
            return False
        return Result.of(opened, groups, stays, []).stock

    return nearest_uniform(scored, kept, method, legal if is_stock(opened.checkpoint.config) else None, goal)


def _planned(opened: Opened, scored: Sequence[Scored], plan: Plan, path: str) -> list[Tensor]:
    """The units of a plan, checked against the model."""
    remedy = "make a plan for this model: secateur prune MODEL -o OUT"
    seen = opened.checkpoint.fingerprint()
    if plan.model != seen:
        raise InputError(f"{path} is a plan for model {plan.model}", f"model {seen}", remedy)
    kinds: list[dict[str, Units]] = [{} for _ in opened.anatomy.blocks]
    for group in scored:
        kinds[group.block][group.units.kind] = group.units
    if [sorted(block) for block in plan.blocks] != [sorted(own) for own in kinds]:
        raise InputError(f"{path} names other kinds of units", "those that the method's options give", remedy)
    for index, block in enumerate(plan.blocks):
        for kind, stays in block.items():
            if (
                stays != sorted(set(stays))
                or not stays
                or not 0 <= stays[0] <= stays[-1] < kinds[index][kind].count
            ):
                raise InputError(
                    f"{path}: {index}.{kind} keeps what is not there, nothing, or something twice",
                    f"rising numbers below {kinds[index][kind].count}",
                    remedy,
                )
    return [torch.tensor(plan.blocks[group.block][group.units.kind]) for group in scored]
