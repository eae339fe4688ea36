"""One piece after the other away: search on the model as it then is, note the order, write what stays."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.anatomy.parts import Parts, part_sizes, parts_of
from secateur.anatomy.resized import is_stock
from secateur.anatomy.sliced import require_unsliced
from secateur.checkpoint.durable import write_bytes
from secateur.core.errors import AnatomyError, InputError, NumericsError, RecipeError
from secateur.core.progress import Task
from secateur.evaluation.quality import predicted_tokens
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import SCORES, UNEQUAL, Outcome, Run
from secateur.pipeline.ways.remaining import Remaining
from secateur.pipeline.ways.unit_scores import NO_SCORES, origin_of, read_scores, scores_file
from secateur.pipeline.ways.variants import Gone, Variants, more
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer
from secateur.structure.base import WHOLE, Piece, PieceMethod
from secateur.structure.order import chosen, reached

__all__ = ["check_pieces", "evaluations", "prune_pieces"]

ORDER = "order.json"
PERPLEXITIES = "perplexities"


@dataclass(frozen=True)
class Removal:
    """A piece, and the perplexity on the calibration windows once it is gone too."""

    piece: Piece
    perplexity: float


def check_pieces(opened: Opened, method: PieceMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: a share that no pieces come near.
        AnatomyError: a family whose parts are not known.
        InputError: an order of another model, or one that ends too early.
    """
    require_unsliced(opened.checkpoint.config)
    pieces = _pieces(opened, method)
    total, budget = opened.anatomy.block_parameters, _budget(opened, recipe)
    sizes = [piece.parameters for piece in pieces]
    least, most = min(sizes) / 2, sum(sizes) - max(sizes) + min(sizes) / 2
    if len(pieces) < 2 or not least <= budget <= most:
        raise RecipeError(
            f"sparsity {recipe.resolved_sparsity:g} of {len(pieces)} pieces",
            f"a fraction from {min(sizes) / total:.3f} (the smallest piece) to {most / total:.3f}",
            "change --sparsity, or remove channels: flap",
        )
    if recipe.scores is not None:
        _given(opened, method, recipe)


def prune_pieces(run: Run, method: PieceMethod) -> Outcome:
    """Search, unless an order is given, and write the blocks and parts that stay."""
    opened = run.opened
    pieces, budget = _pieces(opened, method), _budget(opened, run.recipe)
    removals = _given(opened, method, run.recipe) if run.recipe.scores else _Search(run, method, pieces).run()
    gone = chosen([removal.piece for removal in removals], pieces, budget)
    remaining = _remaining(opened, method, gone)
    before = opened.anatomy.block_parameters
    stock = is_stock({**opened.checkpoint.config, **remaining.config_updates})
    return Outcome(
        layers=_rows(run, removals, pieces, gone),
        blocks=[Block(block=block.index) for block in opened.anatomy.blocks],
        sparsity=1 - remaining.anatomy.block_parameters / before,
        config_updates=remaining.config_updates,
        dropped=remaining.write(run),
        files={
            SCORES: scores_file(_as_scores(removals), origin_of(opened, method)),
            ORDER: _as_json(removals),
        },
        warnings=[] if stock else [UNEQUAL],
    )


def evaluations(opened: Opened, method: PieceMethod, sparsity: float) -> int:
    """How many models a search looks at, about."""
    pieces = _pieces(opened, method)
    mean = sum(piece.parameters for piece in pieces) / len(pieces)
    rounds = min(max(1, round(sparsity * opened.anatomy.block_parameters / mean)), len(pieces) - 1)
    return sum(method.tries(len(pieces) - gone) for gone in range(rounds))


class _Search:
    """The rounds of a search; each is durable once it is over."""

    def __init__(self, run: Run, method: PieceMethod, pieces: Sequence[Piece]) -> None:
        self.run_, self.method, self.pieces = run, method, pieces
        self.variants = Variants(run.driver(), _parts(run.opened, method))
        self.tokens = predicted_tokens(run.data.calibration)
        self._last: dict[Piece, float] = {}

    def run(self) -> list[Removal]:
        """The removals, until no further one could be chosen for the budget."""
        found = _kept(self.run_, self.pieces)
        turns = self._turns()
        budget, sparsity = _budget(self.run_.opened, self.run_.recipe), self.run_.recipe.resolved_sparsity
        batches = len(self.variants.held.batches)
        total = batches * evaluations(self.run_.opened, self.method, sparsity)
        with self.run_.progress.task(f"searching with {self.method.id}", total) as task:
            while not reached([removal.piece for removal in found], self.pieces, budget):
                gone: dict[int, frozenset[str]] = {}
                for removal in found:
                    gone = more(gone, removal.piece)
                left = [piece for piece in self.pieces if piece not in {removal.piece for removal in found}]
                piece, loss = self.method.pick(left, turns, partial(self._losses, gone, task))
                found.append(Removal(piece, self._perplexity(loss)))
                task.advance(0, note=f"{len(found)} gone, perplexity {found[-1].perplexity:.2f}")
                if self.run_.writer:
                    write_bytes(self.run_.writer.workspace / ORDER, _as_json(found).encode())
        return found

    def _losses(self, gone: Gone, task: Task, pieces: Sequence[Piece]) -> list[float]:
        """Summed losses over all processes; the runner-up of the last round goes first, as a bound."""
        known = {piece: loss for piece, loss in self._last.items() if piece in pieces and loss < torch.inf}
        first = [min(known, key=lambda piece: known[piece])] if known and self._bounds(len(pieces)) else []
        totals = dict(zip(first, self._sums(gone, first, torch.inf, task), strict=True))
        others = [piece for piece in pieces if piece not in totals]
        bound = min(totals.values(), default=torch.inf)
        totals |= dict(zip(others, self._sums(gone, others, bound, task), strict=True))
        self._last = totals
        return [totals[piece] for piece in pieces]

    def _sums(self, gone: Gone, pieces: Sequence[Piece], bound: float, task: Task) -> list[float]:
        if not pieces:
            return []
        found = torch.tensor(self.variants.losses(gone, pieces, bound, task.advance), dtype=torch.float64)
        if self.run_.group:
            self.run_.group.all_reduce(found)
        return found.tolist()

    def _bounds(self, pieces: int) -> bool:
        """Whether a bound saves more than another pass costs; the same answer in every process."""
        worth = len(self.variants.groups(pieces)) > 1
        return self.run_.group.broadcast(worth) if self.run_.group else worth

    def _turns(self) -> dict[str, float]:
        if not self.method.needs_turns:
            return {}

        def find() -> dict[str, Tensor]:
            sums = self.variants.turns(self.pieces)
            if self.run_.group:
                self.run_.group.all_reduce(sums)
            return {"turns": sums[:-1] / sums[-1]}

        found = self.run_.remembered(find)["turns"].tolist()
        return {piece.name: turn for piece, turn in zip(self.pieces, found, strict=True)}

    def _perplexity(self, loss: float) -> float:
        if not loss < torch.inf:
            raise NumericsError(
                "the model predicts undefined or overflowing logits whatever is removed", "finite logits"
            )
        return math.exp(min(loss / self.tokens, 700.0))


def _parts(opened: Opened, method: PieceMethod) -> Parts:
    return parts_of(opened.config) if method.unit == "subblock" else {}


def _pieces(opened: Opened, method: PieceMethod) -> list[Piece]:
    """All that can go, in the order of the model."""
    parts, blocks = _parts(opened, method), opened.anatomy.blocks
    if not parts:
        return [Piece(block.index, WHOLE, block.size) for block in blocks]
    return [Piece(b.index, part, size) for b in blocks for part, size in part_sizes(b, parts).items()]


def _budget(opened: Opened, recipe: Recipe) -> float:
    return recipe.resolved_sparsity * opened.anatomy.block_parameters


def _remaining(opened: Opened, method: PieceMethod, gone: Sequence[Piece]) -> Remaining:
    """Blocks that lost everything vanish; where blocks change with their place they stay, empty."""
    parts = _parts(opened, method)
    lost: dict[int, list[str]] = {}
    for piece in gone:
        lost.setdefault(piece.block, []).append(piece.part)
    names = {piece.name for piece in gone}
    kept = sorted({piece.block for piece in _pieces(opened, method) if piece.name not in names})
    try:
        return Remaining.of(opened, kept, {index: lost[index] for index in kept if index in lost}, parts)
    except AnatomyError:
        if not parts:
            raise
        return Remaining.of(opened, range(len(opened.anatomy.blocks)), lost, parts)


def _rows(
    run: Run, removals: Sequence[Removal], pieces: Sequence[Piece], gone: Sequence[Piece]
) -> list[Layer]:
    steps = {removal.piece: (step, removal.perplexity) for step, removal in enumerate(removals, 1)}
    return [
        Layer(
            block=piece.block,
            matrix=piece.part,
            rows=1,
            columns=piece.parameters,
            sparsity_requested=run.recipe.resolved_sparsity,
            sparsity=float(piece in gone),
            notes=dict(zip(("step", "perplexity"), steps.get(piece, ()), strict=False)),
        )
        for piece in pieces
    ]


def _as_json(removals: Sequence[Removal]) -> str:
    rows = [{**vars(removal.piece), "perplexity": removal.perplexity} for removal in removals]
    return json.dumps(rows, indent=1) + "\n"


def _kept(run: Run, pieces: Sequence[Piece]) -> list[Removal]:
    """The rounds of the run that was interrupted."""
    path = run.scratch / ORDER
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    known = {piece.name: piece for piece in pieces}
    return [Removal(known[f"{row['block']}.{row['part']}"], row["perplexity"]) for row in rows]


def _as_scores(removals: Sequence[Removal]) -> dict[str, Tensor]:
    """By piece the round in which it goes, and the perplexity after each round."""
    steps = {removal.piece.name: torch.tensor([float(step)]) for step, removal in enumerate(removals, 1)}
    perplexities = torch.tensor([removal.perplexity for removal in removals], dtype=torch.float64)
    return {**steps, PERPLEXITIES: perplexities}


def _given(opened: Opened, method: PieceMethod, recipe: Recipe) -> list[Removal]:
    """The order of an earlier run, if it reaches far enough."""
    path = Path(recipe.scores or "")
    found = read_scores(path, origin_of(opened, method))
    pieces = _pieces(opened, method)
    order = sorted(
        (piece for piece in pieces if piece.name in found), key=lambda piece: float(found[piece.name])
    )
    if not reached(order, pieces, _budget(opened, recipe)):
        raise InputError(
            f"{path} orders {len(order)} removals, which do not reach sparsity {recipe.resolved_sparsity:g}",
            "scores of a run at this sparsity or a higher one",
            NO_SCORES,
        )
    return [Removal(piece, loss) for piece, loss in zip(order, found[PERPLEXITIES].tolist(), strict=True)]
