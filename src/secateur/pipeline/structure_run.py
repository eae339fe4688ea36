"""Whole units away: score all blocks, choose once, then cut and write block by block."""

from __future__ import annotations

from safetensors.torch import save
from torch import Tensor

from secateur.anatomy.resized import is_stock
from secateur.calibration.driver import OpenBlock
from secateur.checkpoint.safetensors_file import read_tensors, save_tensors
from secateur.checkpoint.safetensors_header import read_header
from secateur.core.errors import RecipeError
from secateur.pipeline.cutting import Choice, Cutter
from secateur.pipeline.matrices import generator_for, statistics_of
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.watching import BlockWatch
from secateur.structure.allocation import Scored, allocate
from secateur.structure.base import StructureMethod, UnitProblem
from secateur.structure.units import producers

__all__ = ["prune_structure"]

SCORES = "scores.safetensors"
UNEQUAL = "Blocks differ in size: load it after `import secateur`, or with trust_remote_code=True."


def prune_structure(run: Run, method: StructureMethod) -> Outcome:
    """Score, choose, cut. Scores are kept beside the result, to plan other ratios from."""
    blocks = run.opened.anatomy.blocks
    groups = [(block.index, units) for block in blocks for units in method.units(block)]
    if not groups:
        raise RecipeError(
            f"method {method.id!r} on {run.opened.anatomy.family!r}",
            "a model with channels or heads that one matrix collects",
            "prune single weights: wanda",
        )
    found = _scores(run, method)
    scored = [Scored(index, units, found[f"{index}.{units.kind}"]) for index, units in groups]
    sizes = [block.size for block in blocks]
    kept = allocate(scored, sizes, run.recipe.resolved_sparsity, method, found.get("turns"))
    choices = [
        Choice(group, found.get(f"{group.block}.{group.units.kind}.mean"), stays)
        for group, stays in zip(scored, kept, strict=True)
    ]
    cutter = Cutter(run, method, choices)
    layers, rows = cutter.cut()
    freed = sum(len(choice.removed) * choice.units.parameters for choice in choices)
    stock = is_stock({**run.opened.checkpoint.config, **cutter.config_updates})
    return Outcome(
        layers=layers,
        blocks=rows,
        sparsity=freed / sum(sizes),
        config_updates=cutter.config_updates,
        files={SCORES: save({name: tensor.contiguous() for name, tensor in found.items()})},
        warnings=[] if stock else [UNEQUAL],
    )


def _scores(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    """Scores (`3.ffn`) and mean inputs (`3.ffn.mean`), from one pass over the dense model or from the run
    that was interrupted."""
    path = run.scratch / SCORES
    if path.exists():
        return read_tensors(path, read_header(path).values())
    found: dict[str, Tensor] = {}
    driver, watch = run.driver(), BlockWatch() if method.spread == "sigmoid" else None
    blocks = driver.blocks(forward=bool(method.statistics or watch), outputs=watch is not None)
    with run.progress.task(f"scoring with {method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in blocks:
            found |= _score_block(run, method, opened)
            if watch:
                watch.next_block()
            opened.finish(watch)
            task.advance()
    if watch:
        found["turns"] = watch.states(run.group)["turns"]
    if run.writer:
        save_tensors(run.writer.workspace / SCORES, found)
    return found


def _score_block(run: Run, method: StructureMethod, opened: OpenBlock) -> dict[str, Tensor]:
    needs = method.statistics
    observed = opened.observe(needs, record_output=False) if needs else {}
    found: dict[str, Tensor] = {}
    for units in method.units(opened.block):
        name = f"{opened.index}.{units.kind}"
        inputs = statistics_of(units.writer, observed)
        weight = units.writer.view(opened.parameters).float()
        problem = UnitProblem(
            name,
            units,
            weight,
            inputs,
            generator_for(run.recipe.seed, name),
            producers(opened.block, opened.parameters, units),
        )
        found[name] = method.score(problem).float().cpu()
        if inputs.mean is not None:
            found[f"{name}.mean"] = (inputs.mean / max(inputs.tokens, 1)).cpu()
    return found
