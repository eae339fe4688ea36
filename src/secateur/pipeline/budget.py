"""How the sparsity asked for is spread: over blocks by an allocation, or over matrices by one global cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.anatomy.model import Anatomy
from secateur.calibration.driver import Driver, OpenBlock
from secateur.calibration.gradients import GradientStore
from secateur.core.errors import RecipeError
from secateur.core.pattern import Pattern
from secateur.core.progress import Progress
from secateur.core.selection import global_counts
from secateur.pipeline.matrices import Budget, generator_for, statistics_of
from secateur.recipe import Recipe
from secateur.weights.allocation import ALLOCATIONS
from secateur.weights.base import Problem, WeightMethod, weight_method

__all__ = ["check_pattern_fits", "method_of", "plan_budget", "uniform_budget"]


def method_of(recipe: Recipe) -> WeightMethod:
    """The method of the recipe with its options. Raises `RecipeError`."""
    return weight_method(recipe.method, recipe.options)


def check_pattern_fits(anatomy: Anatomy, method: WeightMethod, pattern: Pattern) -> None:
    """Refuse, before anything is read, an N:M that does not divide or a global cut without scores."""
    if pattern.kind == "n:m":
        for block in anatomy.blocks:
            for matrix in block.matrices:
                if matrix.shape[1] % pattern.of:
                    raise RecipeError(
                        f"{block.index}.{matrix.name} has {matrix.shape[1]} inputs",
                        f"a multiple of {pattern.of} for pattern {pattern}",
                        "choose an M that divides it, or --pattern unstructured",
                    )
    if pattern.kind == "global" and type(method).score is WeightMethod.score:
        raise RecipeError(
            f"pattern global with method {method.id!r}, which has no score of single weights",
            "a scoring method",
            "use wanda, or --allocation owl",
        )


def uniform_budget(anatomy: Anatomy, pattern: Pattern, sparsity: float) -> Budget:
    return Budget(pattern, (sparsity,) * len(anatomy.blocks), {})


def plan_budget(
    recipe: Recipe,
    method: WeightMethod,
    driver: Driver,
    gradients: GradientStore | None,
    scratch: Path,
    progress: Progress,
) -> Budget:
    """Spend the sparsity. Uniform is free; other allocations and the global cut see the dense model once."""
    anatomy = driver.source.anatomy
    asked = recipe.parsed_pattern
    pattern = asked.resolve(method.default_pattern)
    sparsity = recipe.resolved_sparsity
    if asked.kind == "global":
        counts = _global_matrix_sparsities(
            method, driver, gradients, sparsity, recipe.seed, scratch, progress
        )
        return Budget(Pattern("matrix"), (sparsity,) * len(anatomy.blocks), counts)
    allocation = ALLOCATIONS.get(recipe.allocation).from_options(recipe.allocation_options)
    allocation.check_pattern(pattern)
    if allocation.needs_pass == "none":
        return uniform_budget(anatomy, pattern, sparsity)
    forward = allocation.needs_pass == "activations"
    measured: list[dict[str, Any]] = []
    for opened in _dense_pass(driver, progress, f"{recipe.allocation}: measuring the dense model", forward):
        observed = opened.observe(allocation.statistics, record_output=False) if forward else {}
        matrices = [
            (matrix.name, matrix.view(opened.parameters).float(), statistics_of(matrix, observed))
            for matrix in opened.block.matrices
        ]
        measured.append(allocation.measure(opened.index, matrices))
        opened.finish()
    sizes = [sum(m.shape[0] * m.shape[1] for m in block.matrices) for block in anatomy.blocks]
    return Budget(pattern, tuple(allocation.sparsities(measured, sizes, sparsity)), {})


def _dense_pass(driver: Driver, progress: Progress, title: str, forward: bool) -> Iterator[OpenBlock]:
    with progress.task(title, len(driver.source.anatomy.blocks)) as task:
        for opened in driver.blocks(forward=forward):
            yield opened
            task.advance()


def _global_matrix_sparsities(
    method: WeightMethod,
    driver: Driver,
    gradients: GradientStore | None,
    sparsity: float,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> dict[str, float]:
    """Score the dense model once, scores to disk a block a file, then one exact cut over all of them."""
    scratch.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    sizes: dict[str, int] = {}
    for opened in _dense_pass(driver, progress, "scoring the dense model", bool(method.statistics)):
        observed = (
            opened.observe(method.statistics - {"gradient"}, record_output=False) if method.statistics else {}
        )
        found = gradients.load(opened.index) if gradients else {}
        scores: dict[str, Tensor] = {}
        for matrix in opened.block.matrices:
            name = f"{opened.index}.{matrix.name}"
            weight = matrix.view(opened.parameters).detach().float().contiguous()
            problem = Problem(
                name,
                weight,
                statistics_of(matrix, observed),
                Pattern("matrix"),
                sparsity,
                gradient=found.get(matrix.name),
                generator=generator_for(seed, name),
            )
            scores[name] = method.score(problem).cpu().contiguous()
            sizes[name] = weight.numel()
        files.append(scratch / f"scores-{opened.index:05d}.safetensors")
        save_file(scores, files[-1])
        opened.finish()

    def passes() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            yield from load_file(file).items()

    counts = global_counts(passes, sparsity)
    for file in files:
        file.unlink()
    return {name: count / sizes[name] for name, count in counts.items()}


def budget_as_json(budget: Budget) -> dict[str, Any]:
    """For the journal: a resumed run spends the very same budget."""
    return {"pattern": str(budget.pattern), "blocks": list(budget.blocks), "matrices": dict(budget.matrices)}


def budget_from_json(values: dict[str, Any]) -> Budget:
    return Budget(Pattern.parse(values["pattern"]), tuple(values["blocks"]), values["matrices"])
