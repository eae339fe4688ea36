"""A structured method: an importance for every unit of a block, and options that all methods share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from secateur.anatomy.model import Block
from secateur.anatomy.units import Units, units_of
from secateur.core.method import Method, register
from secateur.core.progress import Progress
from secateur.core.statistics import InputStatistics, Statistic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "WHOLE",
    "AdaptiveMethod",
    "BlockStates",
    "Compensation",
    "DepthMethod",
    "LooksMethod",
    "Losses",
    "Piece",
    "PieceLosses",
    "PieceMethod",
    "SearchMethod",
    "SliceMethod",
    "Spread",
    "StructureMethod",
    "UnitMethod",
    "UnitProblem",
    "WidthMethod",
    "register",
]

Compensation = Literal["none", "bias", "least_squares"]
Spread = Literal["uniform", "global", "sigmoid", "knapsack"]
Losses = Literal["", "each", "total"]
Targets = Literal["all", "ffn", "heads"]
Coarse = Literal["angular", "cosine", "mse", "mae"]


@dataclass
class UnitProblem:
    """The units of one kind in one block.

    Attributes:
        name: for messages, such as `3.ffn`.
        units: which they are.
        weight: (d, C) float32 of the matrix that collects them.
        producers: float32 (rows, d) of the matrices, or parts of fused ones, whose rows the units are.
        inputs: what was observed of its input; sums over tokens.
        generator: seeded for these very units.
        prepared: what the method's `prepare` gave.
        taylor: by `taylor_` statistic, (members, count) float64: of every matrix of the units (with its
            biases), what the loss feels of each; the first is the root, a producer.
    """

    name: str
    units: Units
    weight: Tensor
    inputs: InputStatistics
    generator: torch.Generator
    producers: Sequence[Tensor] = ()
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    taylor: Mapping[Statistic, Tensor] = field(default_factory=dict)


class UnitMethod(Method):
    """Base of the methods that remove channels and heads."""

    family: ClassVar[str] = "structure"
    removes: ClassVar[str] = "attention heads with their key-value head, and feed-forward channels"
    effect: ClassVar[str] = "a smaller dense model: fewer bytes and faster everywhere"

    targets: Targets = Field("all", description="all, feed-forward channels alone, or heads alone")
    compensate: Compensation = Field(
        "none", description="none, bias (mean output) or least_squares (refit on what stays)"
    )
    min_keep: int = Field(1, ge=1, description="units of a kind that every block keeps at least")
    round_to: int = Field(1, ge=1, description="widths of feed-forward parts stay multiples of this")
    protect_first: float = Field(0, ge=0, le=1, description="share of the blocks, from the first, left whole")
    protect_last: float = Field(0, ge=0, le=1, description="share of the blocks, from the last, left whole")

    @property
    def statistics(self) -> frozenset[Statistic]:
        return self.needs | {"mean"} if self.compensate == "bias" else self.needs

    def open_blocks(self, count: int) -> range:
        """Which of `count` blocks may lose units: both ends are rounded to whole blocks, halves up."""
        return range(int(self.protect_first * count + 0.5), count - int(self.protect_last * count + 0.5))

    def units(self, block: Block) -> list[Units]:
        """The kinds of units of a block that compete."""
        ffn = {"all": {True, False}, "ffn": {True}, "heads": {False}}[self.targets]
        return [units for units in units_of(block) if units.kind.endswith("ffn") in ffn]

    def refine(self, problem: UnitProblem, kept: Tensor) -> Tensor:
        """Units to keep instead, as many (sorted int64), once the Hessian of the cut model is there.

        Asked only before least squares; `problem.inputs` then has a Hessian.
        """
        return kept


class LooksMethod(Method):
    """Part of the methods that may remove a part, look at what is left, and remove the next."""

    @property
    def looks(self) -> int:
        """How often the model is looked at; each round ends at the same distance nearer to the target."""
        return 1

    @property
    def windows_a_look(self) -> int:
        """Calibration windows that a round looks at, the next ones in turn; 0: all."""
        return 0


class StructureMethod(UnitMethod, LooksMethod):
    """Base of the methods that score all units, and then choose once.

    Class variables:
        comparable: scores of different blocks and kinds mean the same and need not be standardised.
        unscored: own options that scores do not depend on.
        losses: what scores are to the spread `knapsack`. `each`: a loss of its own, and losses add up;
            `total`: the loss of all units up to this one; empty: an importance, counted once a parameter.
    """

    comparable: ClassVar[bool] = False
    unscored: ClassVar[frozenset[str]] = frozenset()
    losses: ClassVar[Losses] = ""

    spread: Spread = Field(
        "uniform",
        description="uniform: the same share everywhere; global: one ranking of all units; "
        "sigmoid: more where a block turns the hidden state little; knapsack: the least loss that meets the "
        "budget",
    )
    uniform: bool = Field(
        False, description="take the nearest plan in which all blocks are alike, as stock classes need"
    )
    remove_heads: int | None = Field(
        None, ge=0, description="key-value heads that go in the whole model; channels make up the rest"
    )
    coarse: Coarse = Field(
        "angular", description="how the spread sigmoid sees a block change the hidden state"
    )
    coarse_scope: Literal["block", "mlp"] = Field(
        "block", description="across a block or its feed-forward part"
    )
    sharpness: float = Field(13.1072, ge=0, description="of the spread sigmoid, per unit of angle / pi")

    @property
    def change(self) -> str:
        """The name under which the change of the hidden state is kept that the spread sigmoid reads."""
        name = {"angular": "turns", "cosine": "influence"}.get(self.coarse, self.coarse)
        return name if self.coarse_scope == "block" else f"{name}.mlp"

    def check(self, problems: Collection[UnitProblem]) -> None:
        """Refuse, before anything is read, what these options cannot score: tensors are on the meta device
        and have shapes alone. Raises `InputError`."""

    def prepare(
        self, problems: Collection[UnitProblem], generator: torch.Generator, progress: Progress
    ) -> dict[str, Tensor]:
        """What the weights of all blocks tell before the first is scored; kept for `--resume`.

        Args:
            problems: of all blocks, without statistics; every iteration is one pass over the files.
            generator: seeded for this run.
        """
        return {}

    def score(self, problem: UnitProblem) -> Tensor:
        """(count,) importance of each unit; the smallest go."""
        raise NotImplementedError

    def files(self, prepared: Mapping[str, Tensor]) -> dict[str, bytes]:
        """What lies beside the result for later runs, by name."""
        return {}


class AdaptiveMethod(UnitMethod):
    """Base of the methods that remove a little at a time, and look at the model again after each step."""

    compensate: Literal["none", "least_squares"] = Field(
        "none", description="none or least_squares (refit on what stays, once at the end)"
    )
    step: float = Field(0.02, gt=0, lt=1, description="share of its units that a block loses in a step")
    step_windows: int = Field(
        0, ge=0, description="calibration windows that a step looks at, the next ones in turn; 0: all"
    )

    @property
    def spread(self) -> str:
        return "adaptive"

    def increments(self, moves: Tensor) -> Tensor:
        """What a step adds to the sparsity of every block that can still lose units.

        Args:
            moves: (blocks,) float64, mean over tokens of 1 - cos(input, output).
        """
        raise NotImplementedError

    def rank(self, taylor: Mapping[Statistic, Tensor]) -> Tensor:
        """(count,) importance of each unit from what the loss feels; see `UnitProblem.taylor`."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockStates:
    """What the blocks of a dense model do to their input.

    Attributes:
        influence: (L,) mean over tokens of 1 - cos(input, output) of each block.
        turns: (L,) the same of the angle, divided by pi.
        angles: (L + 1, L + 1) mean over windows of arccos(cos)/pi between the hidden states of the last token
            at two depths; depth i is the input of block i.
    """

    influence: Tensor
    turns: Tensor
    angles: Tensor


class DepthMethod(LooksMethod):
    """Base of the methods that remove whole decoder blocks: those of lowest `rank` where their statistics
    come from gradients, else those that they `choose`."""

    family: ClassVar[str] = "structure"
    removes: ClassVar[str] = "whole decoder blocks"
    effect: ClassVar[str] = "a shallower dense model of the same class: fewer bytes and faster everywhere"

    def rank(self, taylor: Mapping[Statistic, Tensor]) -> Tensor:
        """(L,) float64, not negative: importance of each block, from what the loss feels: by statistic
        (members, L) float64."""
        raise NotImplementedError

    def choose(self, states: BlockStates, count: int) -> list[int]:
        """The blocks that go, sorted."""
        raise NotImplementedError


WHOLE = "block"
"""The part that is all of a block."""


@dataclass(frozen=True)
class Piece:
    """What a search removes as a whole.

    Attributes:
        block: index of the block.
        part: `self_attn` or `mlp` with the norms that serve it alone, or `block`.
        parameters: that its removal frees.
    """

    block: int
    part: str
    parameters: int

    @property
    def name(self) -> str:
        return f"{self.block}.{self.part}"


PieceLosses = Callable[[Sequence[Piece]], "list[float]"]
"""Losses of a model that each of these pieces is taken out of."""


class PieceMethod(Method):
    """Base of the methods that remove one piece after the other and look at the model after each."""

    family: ClassVar[str] = "structure"
    removes: ClassVar[str] = "attention and feed-forward parts of blocks, or whole blocks"
    effect: ClassVar[str] = "a smaller dense model: fewer bytes and faster everywhere"

    unit: Literal["subblock", "layer"] = Field(
        "subblock", description="subblock: attention and feed-forward parts on their own; layer: whole blocks"
    )

    def pick(
        self, pieces: Sequence[Piece], turns: Mapping[str, float], losses: PieceLosses
    ) -> tuple[Piece, float]:
        """The piece that goes next, and the loss of the model without it.

        Args:
            pieces: that are left, in the order of the model.
            turns: by name, how far the output of its block turns without it in the whole model: mean over
                tokens of 1 - cos; empty unless `needs_turns`.
            losses: of the model without what is gone and each of these pieces, summed over all tokens;
                infinite where another of them is known to be lower.
        """
        raise NotImplementedError

    @property
    def needs_turns(self) -> bool:
        return False

    def tries(self, pieces: int) -> int:
        """How many losses are asked for when so many pieces are left, for estimates."""
        return pieces


class SearchMethod(StructureMethod):
    """Base of the methods that search how many units go where, in ever finer steps (tyr-the-pruner, 2.5).

    Scores rank the units of one kind in one block; how many of them go is what the search finds.
    """

    spread: Literal["uniform"] = Field("uniform", description="uniform: the search starts from equal shares")
    compensate: Literal["none", "least_squares"] = Field(
        "least_squares", description="none, or least_squares (refit on what stays), of every candidate"
    )
    iterations: int = Field(2, ge=1, description="rounds of the search, each with half the step (paper: 4)")
    step: float = Field(0.125, gt=0, le=1, description="share of the units that one level is, at first")
    levels: int = Field(9, ge=3, description="levels of each kind in each block; odd")
    error_accumulation: Literal["expected", "median", "none"] = Field(
        "expected",
        description="what a block is pruned to for the inputs of the next: the weighted mean of its levels, "
        "the level it starts from, or not at all",
    )
    generations: int = Field(8, ge=0, description="of each iteration; 0: stay where it starts (paper: 50)")
    offspring: int = Field(16, ge=1, description="candidates a generation (paper: 128)")
    tokens: tuple[PositiveInt, ...] = Field(
        (512, 2048), min_length=1, description="judged on, a stage (paper: 2048, 16384, 131072)"
    )
    survivors: tuple[PositiveInt, ...] = Field((4,), description="of each stage but the last (paper: 16, 4)")
    swaps: int = Field(4, ge=1, description="most moves between a parent and its offspring")
    fitness: Literal["kl", "perplexity"] = Field(
        "kl", description="divergence from the dense model over its likeliest tokens, or perplexity"
    )
    topk: int = Field(256, ge=1, description="likeliest tokens of the dense model that count (paper: 8192)")
    workers: int = Field(0, ge=0, description="processes on Ray that judge candidates; 0: this one")

    @property
    def tokens_judged(self) -> int:
        """Tokens of all candidates of the whole search, up to whole windows."""
        candidates = (self.offspring, *self.survivors)
        stages = sum(count * tokens for count, tokens in zip(candidates, self.tokens, strict=False))
        return self.iterations * self.generations * (stages + self.tokens[-1])


class WidthMethod(LooksMethod):
    """Base of the methods that make the whole model narrower, every block alike. Those whose statistics come
    from gradients `rank` the hidden dimensions; the others say the `importance` of entries of inputs."""

    family: ClassVar[str] = "structure"
    removes: ClassVar[str] = "hidden dimensions, heads and feed-forward channels, as many in every block"
    effect: ClassVar[str] = "a narrower dense model of the same class: fewer bytes and faster everywhere"

    search: int = Field(
        0,
        ge=0,
        description="so many of the largest models within the budget are tried on the calibration text "
        "(0: shrink everything alike)",
    )

    @property
    def widths(self) -> list[str]:
        """What shrinks: some of `hidden`, `heads`, `ffn`."""
        raise NotImplementedError

    @property
    def multiples(self) -> dict[str, int]:
        """By width, what it stays a multiple of."""
        raise NotImplementedError

    def rank(self, taylor: Mapping[Statistic, Tensor]) -> Tensor:
        """(d,) float64, not negative: importance of the hidden dimensions from what the loss feels: by term
        (members, d) float64."""
        raise NotImplementedError

    def importance(self, inputs: InputStatistics) -> Tensor:
        """(C,) importance of every entry of an input."""
        raise NotImplementedError


class SliceMethod(Method):
    """Base of the methods that rotate the residual stream and keep the first of its new directions."""

    family: ClassVar[str] = "structure"
    removes: ClassVar[str] = "directions of the residual stream"
    effect: ClassVar[str] = (
        "narrower matrices and two small ones more in every block: fewer bytes, faster on long texts"
    )

    round_to: int = Field(8, ge=1, description="the width that stays is a multiple of this")
    slice_head: bool = Field(False, description="slice what the last block writes and the head reads, too")
    orientation: Literal["random", "pca"] = Field(
        "random",
        description="turn what stays at random, so that no entry is special, or leave it by variance",
    )

    def directions(self, covariance: Tensor) -> Tensor:
        """(d, d) float64: orthonormal columns, the most important first.

        Args:
            covariance: (d, d) float64, sum of x x^T over the tokens at one place of the residual stream.
        """
        raise NotImplementedError
