"""Whole blocks away: watch the dense model once, choose, and write those that stay under new numbers."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save
from torch import Tensor

from secateur.anatomy.layout import FileLayout
from secateur.anatomy.resolve import resolve_config
from secateur.anatomy.sliced import FLAG
from secateur.core.errors import AnatomyError, RecipeError
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import SCORES, Outcome, Run
from secateur.pipeline.watching import BlockWatch
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer
from secateur.structure.base import BlockStates, DepthMethod

__all__ = ["check_depth", "prune_depth"]


def check_depth(opened: Opened, method: DepthMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done. Raises `RecipeError`."""
    if recipe.scores is not None:
        raise RecipeError(
            f"scores with method {method.id!r}",
            "a method that scores heads and channels",
            "leave --scores out",
        )
    if opened.checkpoint.config.get(FLAG):
        raise AnatomyError(
            "blocks of a sliced model, each of which hands on to the next in a basis of its own",
            "a model that was not sliced",
            "remove blocks first and slice then",
        )
    _count(len(opened.anatomy.blocks), recipe.resolved_sparsity)


def prune_depth(run: Run, method: DepthMethod) -> Outcome:
    """Write the blocks that stay.

    Raises:
        RecipeError: a sparsity that comes to no block or to all.
    """
    blocks, checkpoint = run.opened.anatomy.blocks, run.opened.checkpoint
    count = _count(len(blocks), run.recipe.resolved_sparsity)
    found = run.remembered(lambda: _states(run))
    gone = method.choose(BlockStates(**found), count)
    kept = [block.index for block in blocks if block.index not in gone]
    updates = _shorter(checkpoint.config, len(blocks), kept)
    layout = FileLayout(_checked(run, updates, kept), dict.fromkeys(checkpoint.tensors))
    done = run.finished()
    for new, old in enumerate(kept):
        if new not in done:
            whole = run.opened.layout.assemble(old, checkpoint.read(run.opened.layout.block_names(old)))
            run.keep(new, layout.disassemble(new, whole), {})
    names = {name for block in blocks for name in run.opened.layout.block_names(block.index)}
    stay = {name for new in range(len(kept)) for name in layout.block_names(new)}
    removed = sum(blocks[index].size for index in gone)
    return Outcome(
        layers=[
            _row(run, index, index in gone, influence)
            for index, influence in enumerate(found["influence"].tolist())
        ],
        blocks=[Block(block=index) for index in range(len(blocks))],
        sparsity=removed / sum(block.size for block in blocks),
        config_updates=updates,
        dropped=frozenset(names - stay),
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


def _shorter(config: dict[str, Any], count: int, kept: list[int]) -> dict[str, Any]:
    """Keys that change: the number of blocks, and every list with an entry a block."""
    key = next((name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config), None)
    if key is None:
        raise AnatomyError("a config that does not say how many blocks there are", "num_hidden_layers")
    updates: dict[str, Any] = {key: len(kept)}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and not name.endswith("token_id"):
            updates[name] = [value[index] for index in kept]
    if "per_layer_config" in config:
        own = config["per_layer_config"]
        updates["per_layer_config"] = {
            str(new): own[str(old)] for new, old in enumerate(kept) if str(old) in own
        }
    return updates


def _checked(run: Run, updates: dict[str, Any], kept: list[int]) -> Any:
    """The anatomy of the shorter model, whose blocks must be those that stay."""
    anatomy, blocks = resolve_config({**run.opened.checkpoint.config, **updates}), run.opened.anatomy.blocks
    if [block.parameters for block in anatomy.blocks] != [blocks[index].parameters for index in kept]:
        raise AnatomyError(
            f"blocks of {run.opened.anatomy.family!r} change with their place",
            "blocks that are built alike wherever they stand",
            "remove channels instead: flap",
        )
    return anatomy


def _row(run: Run, index: int, gone: bool, influence: float) -> Layer:
    block = run.opened.anatomy.blocks[index]
    return Layer(
        block=index,
        matrix="block",
        rows=1,
        columns=block.size,
        sparsity_requested=run.recipe.resolved_sparsity,
        sparsity=float(gone),
        notes={"influence": influence},
    )
