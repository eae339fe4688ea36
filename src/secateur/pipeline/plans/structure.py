"""What a structured run will leave of a model: block by block where the scores are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.core.progress import SILENT
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.draft import Draft, draft
from secateur.pipeline.record import running_costs
from secateur.pipeline.ways.structure import decode_table, given_scores
from secateur.recipe import Recipe
from secateur.report.effect import effect
from secateur.structure.base import StructureMethod

__all__ = ["structure_outcome"]

UNKNOWN = {
    "transformers": "yes: as it is where its class has such blocks, else after `import secateur` or "
    "with trust_remote_code=True",
    "vllm": "where all blocks come out alike",
    "gguf": "where all blocks come out alike",
}
STOCK = {"transformers": "yes: same class, smaller sizes", "vllm": "yes", "gguf": "yes"}
OWN = {
    "transformers": "after `import secateur` or with trust_remote_code=True",
    "vllm": "no: it has no class for it",
    "gguf": "no: its converter has no class for it",
}


def structure_outcome(opened: Opened, method: StructureMethod, recipe: Recipe) -> dict[str, Any]:
    """Sizes of the result, and of each block where scores, a plan or equal shares say them.

    No weight is read. A decode budget is measured, which loads the model.

    Raises:
        InputError: whatever `prune` would refuse.
    """
    found = given_scores(opened, method, Path(recipe.scores)) if recipe.scores else None
    decode = decode_table(opened, method, recipe, SILENT, None)
    planned = draft(opened, method, recipe, found, decode)
    known = bool(recipe.scores or recipe.plan) or method.spread == "uniform"
    after, nbytes = planned.result.parameters, planned.result.nbytes
    return {
        "sparsity": planned.sparsity,
        "budget": recipe.budget,
        "parameters_prunable": opened.anatomy.block_parameters,
        "zeros_after": 0,
        "parameters_after": after,
        "bytes_after": nbytes,
        "exact": known,
        "faster": True,
        "effect": effect(
            recipe.pattern,
            planned.sparsity,
            removes=method.removes,
            bytes_before=opened.checkpoint.nbytes,
            bytes_after=nbytes,
        ),
        "loads_in": (STOCK if planned.result.stock else OWN) if known else UNKNOWN,
        **(_blocks(opened, planned) if known else {}),
    }


def _blocks(opened: Opened, planned: Draft) -> dict[str, Any]:
    facts = planned.facts()
    blocks: list[dict[str, Any]] = [{} for _ in opened.anatomy.blocks]
    for group, stays in zip(planned.scored, planned.kept, strict=True):
        blocks[group.block][group.units.kind] = [len(stays), group.units.count]
    costs = {"before": running_costs(opened), "after": running_costs(opened, planned.result.anatomy)}
    uniform = facts["uniform"]
    return {
        "structure": {
            **{f"{key}_{when}": value for when, own in costs.items() for key, value in own.items()},
            **{key: facts[key] for key in ("units_before", "units_after", "stock", "floors", "budget")},
            "uniform": None if uniform is None else {**uniform, "loads_in": _loads(uniform["stock"])},
        },
        "blocks": blocks,
    }


def _loads(stock: bool) -> dict[str, str]:
    return STOCK if stock else OWN
