"""Whole blocks away: watch the dense model once, choose, and write those that stay under new numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from secateur.anatomy.sliced import require_unsliced
from secateur.core.errors import AnatomyError, RecipeError
from secateur.core.statistics import BACKWARD
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.sizes import FileSizes, sizes_of
from secateur.pipeline.state import SCORES, Outcome, Run
from secateur.pipeline.ways.remaining import Remaining
from secateur.pipeline.ways.unit_gradients import block_gradients, windows_of, without_blocks
from secateur.pipeline.ways.watching import BlockWatch
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer
from secateur.structure.base import BlockStates, DepthMethod

__all__ = ["check_depth", "depth_sizes", "prune_depth"]

NOTED = ("influence", "importance")
"""Of what was found of a block, one number each."""


def check_depth(opened: Opened, method: DepthMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: scores, or a share that is no block or all.
        AnatomyError: a sliced model, or several steps on a family that is not known.
    """
    if recipe.scores is not None:
        raise RecipeError(
            f"scores with method {method.id!r}",
            "a method that scores heads and channels",
            "leave --scores out",
        )
    require_unsliced(opened.checkpoint.config)
    if method.looks > 1 and opened.anatomy.inferred:
        raise AnatomyError(
            f"{method.looks} steps on {opened.anatomy.family!r} blocks, whose writers are not known",
            "a family with a family file",
            "leave -O steps= out",
        )
    _count(len(opened.anatomy.blocks), recipe.resolved_sparsity)


def depth_sizes(opened: Opened, method: DepthMethod, recipe: Recipe) -> FileSizes:
    """What the run will write if the last blocks go: the same as without any others that are as large."""
    blocks = opened.anatomy.blocks
    count = _count(len(blocks), recipe.resolved_sparsity)
    remaining = Remaining.of(opened, range(len(blocks) - count), {}, {})
    removed = sum(block.size for block in blocks[-count:]) / opened.anatomy.block_parameters
    alike = all(block.parameters == blocks[0].parameters for block in blocks)
    return sizes_of(opened, remaining.layout(opened), removed, exact=alike)


def prune_depth(run: Run, method: DepthMethod) -> Outcome:
    """Write the blocks that stay.

    Raises:
        RecipeError: a sparsity that comes to no block or to all.
    """
    blocks = run.opened.anatomy.blocks
    count = _count(len(blocks), run.recipe.resolved_sparsity)
    found, gone = _chosen(run, method, count)
    kept = [block.index for block in blocks if block.index not in gone]
    remaining = Remaining.of(run.opened, kept, {}, {})
    dropped = remaining.write(run)
    removed = sum(blocks[index].size for index in gone)
    return Outcome(
        layers=[_row(run, index, index in gone, found) for index in range(len(blocks))],
        blocks=[Block(block=index) for index in range(len(blocks))],
        sparsity=removed / sum(block.size for block in blocks),
        config_updates=remaining.config_updates,
        dropped=dropped,
        files={SCORES: save(found)},
    )


def _count(blocks: int, sparsity: float) -> int:
    count = round(sparsity * blocks)
    if not 0 < count < blocks:
        raise RecipeError(
            f"sparsity {sparsity:g} of {blocks} blocks",
            f"a fraction from {1 / blocks:.3f} (one block) to {1 - 1 / blocks:.3f}",
            "change --sparsity, or remove channels: flap",
        )
    return count


def _states(run: Run) -> dict[str, Tensor]:
    """Influence of the blocks and angles between depths, from one pass over the dense model."""
    watch = BlockWatch()
    driver = run.driver()
    with run.progress.task("watching the dense model", len(run.opened.anatomy.blocks)) as task:
        for opened in driver.blocks():
            watch.next_block()
            opened.finish(watch)
            task.advance()
    return watch.states(run.group)


def _chosen(run: Run, method: DepthMethod, count: int) -> tuple[dict[str, Tensor], list[int]]:
    """What was found of the blocks, and those that go, sorted."""
    if method.statistics & BACKWARD:
        return _felt_least(run, method, count)
    found = run.remembered(lambda: _states(run))
    return found, method.choose(BlockStates(**found), count)


def _felt_least(run: Run, method: DepthMethod, count: int) -> tuple[dict[str, Tensor], list[int]]:
    """The `importance` of every block, of one that goes as it was then, and the blocks that go."""
    gone: list[int] = []
    importance = torch.zeros(len(run.opened.anatomy.blocks), dtype=torch.float64)
    for number in range(method.looks):

        def find(number: int = number, gone: tuple[int, ...] = tuple(gone)) -> dict[str, Tensor]:
            windows = windows_of(run, number, method.windows_a_look)
            driver = run.driver(without_blocks(run.opened, gone), windows)
            felt = block_gradients(driver, method, run.scratch, run.progress)
            return {str(term): values for term, values in felt.items()}

        felt = method.rank(run.remembered(find, f"round-{number}.safetensors"))  # type: ignore[arg-type]
        left = torch.tensor([index for index in range(len(importance)) if index not in gone])
        importance[left] = felt[left]
        more = round(count * (number + 1) / method.looks) - len(gone)
        gone += left[felt[left].argsort(stable=True)[:more]].tolist()
    return {"importance": importance}, sorted(gone)


def _row(run: Run, index: int, gone: bool, found: Mapping[str, Tensor]) -> Layer:
    block = run.opened.anatomy.blocks[index]
    return Layer(
        block=index,
        matrix="block",
        rows=1,
        columns=block.size,
        sparsity_requested=run.recipe.resolved_sparsity,
        sparsity=float(gone),
        notes={name: float(found[name][index]) for name in NOTED if name in found},
    )
