"""Whole experts away: watch the routers of the dense model once, choose, then merge, cut and write block by
block."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.cut import cut_block, space_parameters
from secateur.anatomy.layout import FileLayout
from secateur.anatomy.mixture import Mixture, mixture_of
from secateur.anatomy.model import Block as AnatomyBlock
from secateur.anatomy.router import RouterRules, router_rules
from secateur.calibration.driver import OpenBlock
from secateur.core.errors import InputError, RecipeError
from secateur.core.goal import Goal
from secateur.core.statistics import ROUTED, RoutingStatistics
from secateur.experts.allocation import allocate
from secateur.experts.base import ExpertMethod, ExpertProblem, Survivors, expert_problem
from secateur.pipeline.matrices import generator_for
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.result import Result, element_bytes
from secateur.pipeline.plans.sizes import FileSizes
from secateur.pipeline.state import SCORES, UNEQUAL, Outcome, Run
from secateur.pipeline.ways.unit_scores import NO_SCORES, origin_of, read_scores, scores_file
from secateur.pipeline.ways.unvisited import unvisited
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer

__all__ = ["check_experts", "expert_sizes", "experts_observe", "prune_experts"]

KEPT = "experts.json"
ROUTING = ("counts", "coactivation", "probabilities", "gates", "norms", "means", "losses")
PLANNED = frozenset({"spread", "min_keep"})
"""Options that say what is made of scores."""


def check_experts(opened: Opened, method: ExpertMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: a model without experts, more than can go, or a share that whole experts do not make.
        AnatomyError: a family that cannot have blocks of the sizes.
        InputError: scores of another model or method.
    """
    _ = _planned(opened, method, recipe).config_updates
    groups = _rules(opened, method).groups
    method.check([mixture.count // groups for mixture in _mixtures(opened).values()])
    if recipe.scores is not None:
        _given(opened, method, Path(recipe.scores))


def expert_sizes(opened: Opened, method: ExpertMethod, recipe: Recipe) -> FileSizes:
    """What the run will write."""
    result = _planned(opened, method, recipe)
    counts = {mixture.count for mixture in _mixtures(opened).values()}
    exact = method.spread == "uniform" or len(counts) == 1
    return FileSizes(_requested(opened, recipe, result), result.parameters, result.nbytes, exact)


def _planned(opened: Opened, method: ExpertMethod, recipe: Recipe) -> Result:
    """As if all experts were alike. Raises as `check_experts`."""
    alike = {f"{index}.experts": torch.zeros(own.count) for index, own in _mixtures(opened).items()}
    return _result(opened, _kept(opened, method, recipe, alike))


def _kept(
    opened: Opened, method: ExpertMethod, recipe: Recipe, found: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Of each block with experts those that stay, by their scores."""
    mixtures, goal = _mixtures(opened), _goal(opened, method, recipe)
    rules, sparsity = _rules(opened, method), 0.0 if goal else recipe.resolved_sparsity
    scores = [found[f"{index}.experts"] for index in mixtures]
    return dict(zip(mixtures, allocate(scores, rules, sparsity, method, goal=goal), strict=True))


def _goal(opened: Opened, method: ExpertMethod, recipe: Recipe) -> Goal | None:
    """The budget of the recipe as a limit on the whole model."""
    target = recipe.target
    if target is None:
        return None
    if target.kind == "decode":
        raise RecipeError(
            f"budget {recipe.budget} with method {method.id!r}: a token visits as many experts as before and "
            "takes as long",
            "a size",
            "give --budget bytes=... or parameters=...",
        )
    checkpoint, in_bytes = opened.checkpoint, target.kind == "bytes"
    dense = checkpoint.dense_nbytes if in_bytes else checkpoint.parameters
    mixtures = _mixtures(opened)
    counts = [mixture.count for mixture in mixtures.values()]
    each = [_one(opened, index, mixture, in_bytes=in_bytes) for index, mixture in mixtures.items()]
    goal = Goal.linear(target.kind, target.of(dense), dense, counts, each)
    goal.require_below(dense, recipe.budget)
    return goal


def _one(opened: Opened, index: int, mixture: Mixture, *, in_bytes: bool = False) -> int:
    """Parameters, or bytes in the files, of one expert with its row of the router."""
    weights = element_bytes(opened, index) if in_bytes else None
    return space_parameters(opened.anatomy.blocks[index], {mixture.space: 1}, weights)


def _requested(opened: Opened, recipe: Recipe, result: Result) -> float:
    """The fraction of the experts that was asked for; of a budget the one that it came to."""
    return _gone(opened, result) if recipe.budget else recipe.resolved_sparsity


def _gone(opened: Opened, result: Result) -> float:
    """Fraction of the experts."""
    before, after = _counts(opened, result)
    return 1 - after / before


def _counts(opened: Opened, result: Result) -> tuple[int, int]:
    """Experts before and after."""
    mixtures = _mixtures(opened)
    left = sum(result.sizes[index][mixture.space] for index, mixture in mixtures.items())
    return sum(mixture.count for mixture in mixtures.values()), left


def experts_observe(method: ExpertMethod, recipe: Recipe) -> bool:
    """Whether the run looks at calibration text."""
    return recipe.scores is None and bool(method.statistics & ROUTED)


def prune_experts(run: Run, method: ExpertMethod) -> Outcome:
    """Score, choose, merge, cut. Scores are kept beside the result, to plan other ratios from."""
    opened, recipe = run.opened, run.recipe
    if recipe.scores is not None:
        found = _given(opened, method, Path(recipe.scores))
    else:
        found = run.remembered(lambda: _watched(run, method))
    kept = _kept(opened, method, recipe, found)
    result = _result(opened, kept)
    writer = _Writer(run, method, found, _rules(opened, method), result)
    records = writer.write(kept)
    return Outcome(
        layers=[Layer.model_validate(record["layer"]) for record in records if record["layer"]],
        blocks=[Block.model_validate(record["block"]) for record in records],
        sparsity=_gone(opened, result),
        requested=_requested(opened, recipe, result),
        config_updates=result.config_updates,
        dropped=writer.dropped(),
        files={SCORES: scores_file(found, _origin(opened, method)), KEPT: _kept_file(method, records)},
        warnings=[*([] if result.stock else [UNEQUAL]), *unvisited(_visits(opened, found), "first to go.")],
        structure=_facts(opened, method, recipe, result),
    )


def _facts(opened: Opened, method: ExpertMethod, recipe: Recipe, result: Result) -> dict[str, Any]:
    before, after = _counts(opened, result)
    goal = _goal(opened, method, recipe)
    counts = [mixture.count for mixture in _mixtures(opened).values()]
    planned = {"parameters": result.parameters, "bytes": result.nbytes}
    return {
        "units_before": {"experts": before},
        "units_after": {"experts": after},
        "stock": result.stock,
        "budget": goal.facts(planned[goal.unit], counts) if goal else None,
        **planned,
    }


def _kept_file(method: ExpertMethod, records: Sequence[Mapping[str, Any]]) -> str:
    """The content of `experts.json`."""
    blocks = {record["block"]["block"]: record["experts"] for record in records if record["experts"]}
    return json.dumps({"version": 1, "method": method.id, "blocks": blocks}) + "\n"


def _mixtures(opened: Opened) -> dict[int, Mixture]:
    found = ((block.index, mixture_of(block)) for block in opened.anatomy.blocks)
    return {index: mixture for index, mixture in found if mixture is not None}


def _rules(opened: Opened, method: ExpertMethod) -> RouterRules:
    rules = router_rules(opened.anatomy, opened.config)
    if rules is None or not _mixtures(opened):
        raise RecipeError(
            f"method {method.id!r} on {opened.anatomy.family!r}",
            "a mixture of experts whose family file names its router",
            "prune channels and heads: flap, or single weights: wanda",
        )
    return rules


def _result(opened: Opened, kept: Mapping[int, Tensor]) -> Result:
    mixtures = _mixtures(opened)
    spaces = [
        {mixtures[block.index].space: kept[block.index]} if block.index in kept else {}
        for block in opened.anatomy.blocks
    ]
    sizes = [{space: len(at) for space, at in own.items()} for own in spaces]
    return Result(opened, [], spaces, sizes, [])


def _origin(opened: Opened, method: ExpertMethod) -> dict[str, str]:
    return origin_of(opened, method, exclude=PLANNED | method.regrouping)


def _given(opened: Opened, method: ExpertMethod, path: Path) -> dict[str, Tensor]:
    found = read_scores(path, _origin(opened, method))
    for index in _mixtures(opened):
        if f"{index}.experts" not in found:
            raise InputError(f"{path} has no {index}.experts", "scores of a run on this model", NO_SCORES)
    return found


def _watched(run: Run, method: ExpertMethod) -> dict[str, Tensor]:
    """Scores (`3.experts`) and what was seen of the routers (`3.experts.counts`), from one pass over the
    dense model."""
    found: dict[str, Tensor] = {}
    rules = _rules(run.opened, method)
    observes = experts_observe(method, run.recipe)
    with run.progress.task(f"scoring with {method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in run.driver().blocks(forward=observes, outputs=False):
            if mixture_of(opened.block) is not None:
                found |= _watched_block(run, method, rules, opened, observes)
            opened.finish()
            task.advance()
    return found


def _watched_block(
    run: Run, method: ExpertMethod, rules: RouterRules, opened: OpenBlock, observes: bool
) -> dict[str, Tensor]:
    name = f"{opened.index}.experts"
    routing = opened.observe_routing(method.statistics) if observes else None
    problem = _problem(run, rules, opened.block, opened.parameters, routing)
    return {name: _scores(method, problem, rules).double().cpu(), **_as_tensors(name, routing)}


def _problem(
    run: Run,
    rules: RouterRules,
    block: AnatomyBlock,
    parameters: Mapping[str, Tensor],
    routing: RoutingStatistics | None,
) -> ExpertProblem:
    generator = generator_for(run.recipe.seed, f"{block.index}.experts")
    found = expert_problem(block, parameters, top_k=rules.top_k, generator=generator, routing=routing)
    assert found is not None
    return found


def _as_tensors(name: str, routing: RoutingStatistics | None) -> dict[str, Tensor]:
    if routing is None:
        return {}
    parts = {key: getattr(routing, key) for key in ROUTING}
    tokens = {f"{name}.tokens": torch.tensor(routing.tokens)}
    return tokens | {f"{name}.{key}": part for key, part in parts.items() if part is not None}


def _as_routing(name: str, found: Mapping[str, Tensor]) -> RoutingStatistics | None:
    if f"{name}.tokens" not in found:
        return None
    parts: dict[str, Any] = {key: found.get(f"{name}.{key}") for key in ROUTING}
    return RoutingStatistics(int(found[f"{name}.tokens"]), ratios=torch.empty(0, 1), **parts)


def _places(count: int, rules: RouterRules) -> list[Tensor]:
    """The experts of each group of the router."""
    return list(torch.arange(count).view(rules.groups, -1))


def _scores(method: ExpertMethod, problem: ExpertProblem, rules: RouterRules) -> Tensor:
    return torch.cat([method.score(problem.part(rows)) for rows in _places(problem.count, rules)])


def _survivors(method: ExpertMethod, problem: ExpertProblem, kept: Tensor, rules: RouterRules) -> Survivors:
    """What a method makes of the experts of every group of the router, together."""
    places = _places(problem.count, rules)
    parts = [
        method.regroup(problem.part(rows), kept[torch.isin(kept, rows)] - int(rows[0])) for rows in places
    ]
    starts = [int(rows[0]) for rows in places]
    mixes = [_diagonal([part.mix for part in parts], parts, places)]
    mixes.append(_diagonal([part.router_mix for part in parts], parts, places))
    pairs = list(zip(starts, parts, strict=True))
    return Survivors(
        kept=torch.cat([part.kept + start for start, part in pairs]),
        mix=mixes[0],
        router_mix=mixes[1],
        clusters=tuple(
            tuple(member + start for member in cluster) for start, part in pairs for cluster in part.clusters
        ),
    )


def _diagonal(
    mixes: Sequence[Tensor | None], parts: Sequence[Survivors], places: Sequence[Tensor]
) -> Tensor | None:
    if all(mix is None for mix in mixes):
        return None
    whole = torch.zeros(sum(len(part.kept) for part in parts), sum(map(len, places)))
    row = 0
    for mix, part, rows in zip(mixes, parts, places, strict=True):
        whole[row : row + len(part.kept), rows] = torch.eye(len(rows))[part.kept] if mix is None else mix
        row += len(part.kept)
    return whole


@dataclass(frozen=True)
class _Writer:
    """Writes blocks with fewer experts."""

    run: Run
    method: ExpertMethod
    found: Mapping[str, Tensor]
    rules: RouterRules
    result: Result

    def write(self, kept: Mapping[int, Tensor]) -> list[dict[str, Any]]:
        """All blocks that are not there yet; a record each."""
        opened, done = self.run.opened, self.run.finished()
        layout = self._layout()
        with self.run.progress.task("cutting", len(opened.anatomy.blocks)) as task:
            for block in opened.anatomy.blocks:
                if block.index not in done:
                    done[block.index] = self._write(block.index, layout, kept.get(block.index))
                task.advance()
        return [done[index] for index in sorted(done)]

    def _write(self, index: int, layout: FileLayout, kept: Tensor | None) -> dict[str, Any]:
        """Cut one block and keep it; its record."""
        opened, started = self.run.opened, time.perf_counter()
        names = opened.layout.block_names(index)
        whole = opened.layout.assemble(index, opened.checkpoint.read(names))
        smaller, done_to = self._cut(index, whole, kept)
        row = Block(block=index, seconds=round(time.perf_counter() - started, 4))
        record = {**done_to, "block": row.model_dump(mode="json")}
        self.run.keep(index, layout.disassemble(index, smaller), record)
        return record

    def dropped(self) -> frozenset[str]:
        """Names on disk that are gone."""
        layout, blocks = self._layout(), self.run.opened.anatomy.blocks
        names = {name for block in blocks for name in self.run.opened.layout.block_names(block.index)}
        return frozenset(names - {name for block in blocks for name in layout.block_names(block.index)})

    def _layout(self) -> FileLayout:
        return FileLayout(self.result.anatomy, dict.fromkeys(self.run.opened.checkpoint.tensors))

    def _cut(
        self, index: int, whole: dict[str, Tensor], kept: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The block without what goes, and the record of its experts."""
        block = self.run.opened.anatomy.blocks[index]
        mixture = mixture_of(block)
        if kept is None or mixture is None:
            return whole, {"layer": None, "experts": None}
        name = f"{index}.experts"
        routing = _as_routing(name, self.found)
        problem = _problem(self.run, self.rules, block, whole, routing)
        survivors = _survivors(self.method, problem, kept, self.rules)
        stays = {mixture.space: survivors.kept}
        smaller = cut_block(block, whole, stays) | _mixed(mixture, survivors, whole, block.axes)
        stands = {"kept": survivors.kept.tolist()}
        if survivors.clusters:
            stands["clusters"] = [list(cluster) for cluster in survivors.clusters]
        layer = self._row(index, mixture, survivors).model_dump(mode="json")
        return smaller, {"layer": layer, "experts": stands}

    def _row(self, index: int, mixture: Mixture, survivors: Survivors) -> Layer:
        counts = self.found.get(f"{index}.experts.counts")
        notes: dict[str, float] = {}
        if counts is not None:
            notes["visits_kept"] = float(counts[survivors.kept].sum() / counts.sum().clamp_min(1))
        return Layer(
            block=index,
            matrix="experts",
            rows=mixture.count,
            columns=_one(self.run.opened, index, mixture),
            sparsity_requested=_requested(self.run.opened, self.run.recipe, self.result),
            sparsity=1 - len(survivors.kept) / mixture.count,
            notes=notes,
        )


def _mixed(
    mixture: Mixture, survivors: Survivors, whole: Mapping[str, Tensor], axes: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of experts and router that are made of those of several, summed in float32."""
    routers = {mixture.router, mixture.bias, mixture.correction}
    made = {}
    for name, tensor in whole.items():
        mix = survivors.router_mix if name in routers else survivors.mix
        first = axes[name][0].segments[0].space if axes[name] else None
        if mix is not None and first == mixture.space:
            flat = mix @ tensor.float().flatten(1) if tensor.dim() > 1 else mix @ tensor.float()
            made[name] = flat.view(len(mix), *tensor.shape[1:]).to(tensor.dtype)
    return made


def _visits(opened: Opened, found: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Tokens that visited each expert, by block, where that was seen."""
    names = {index: f"{index}.experts.counts" for index in _mixtures(opened)}
    return {index: found[name] for index, name in names.items() if name in found}
