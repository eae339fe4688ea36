"""A structured method: an importance for every unit of a block, and options that all methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field

from secateur.anatomy.model import Block
from secateur.core.method import METHODS, Method
from secateur.core.statistics import InputStatistics, Statistic
from secateur.structure.units import Units, units_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "AdaptiveMethod",
    "BlockStates",
    "Compensation",
    "DepthMethod",
    "Spread",
    "StructureMethod",
    "UnitMethod",
    "UnitProblem",
    "register",
]

Compensation = Literal["none", "bias", "least_squares"]
Spread = Literal["uniform", "global", "sigmoid"]
Targets = Literal["all", "ffn", "heads"]


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
        taylor: by `taylor_` statistic, (members, count) float64: of every matrix of the units (with its
            biases), what the loss feels of each; the first is the root, a producer.
    """

    name: str
    units: Units
    weight: Tensor
    inputs: InputStatistics
    generator: torch.Generator
    producers: Sequence[Tensor] = ()
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


class StructureMethod(UnitMethod):
    """Base of the methods that score all units, and then choose once.

    Class variables:
        comparable: scores of different blocks and kinds mean the same and need not be standardised.
    """

    comparable: ClassVar[bool] = False

    spread: Spread = Field(
        "uniform",
        description="uniform: the same share everywhere; global: one ranking of all units; "
        "sigmoid: more where a block turns the hidden state little",
    )
    sharpness: float = Field(13.1072, ge=0, description="of the spread sigmoid, per unit of angle / pi")

    def score(self, problem: UnitProblem) -> Tensor:
        """(count,) importance of each unit; the smallest go."""
        raise NotImplementedError


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


class DepthMethod(Method):
    """Base of the methods that remove whole decoder blocks."""

    family: ClassVar[str] = "structure"
    removes: ClassVar[str] = "whole decoder blocks"
    effect: ClassVar[str] = "a shallower dense model of the same class: fewer bytes and faster everywhere"

    def choose(self, states: BlockStates, count: int) -> list[int]:
        """The blocks that go, sorted."""
        raise NotImplementedError


M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator: put a method into the catalogue under its `id`."""
    METHODS.register(method.id)(method)
    return method
