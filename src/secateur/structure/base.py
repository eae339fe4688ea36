"""A structured method: an importance for every unit of a block, and options that all methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    "BlockStates",
    "Compensation",
    "DepthMethod",
    "SliceMethod",
    "Spread",
    "StructureMethod",
    "UnitProblem",
    "WidthMethod",
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
    """

    name: str
    units: Units
    weight: Tensor
    inputs: InputStatistics
    generator: torch.Generator
    producers: Sequence[Tensor] = ()


class StructureMethod(Method):
    """Base of the methods that remove channels and heads.

    Class variables:
        comparable: scores of different blocks and kinds mean the same and need not be standardised.
    """

    family: ClassVar[str] = "structure"
    removes: ClassVar[str] = "attention heads with their key-value head, and feed-forward channels"
    effect: ClassVar[str] = "a smaller dense model: fewer bytes and faster everywhere"
    comparable: ClassVar[bool] = False

    spread: Spread = Field(
        "uniform",
        description="uniform: the same share everywhere; global: one ranking of all units; "
        "sigmoid: more where a block turns the hidden state little",
    )
    targets: Targets = Field("all", description="all, feed-forward channels alone, or heads alone")
    compensate: Compensation = Field(
        "none", description="none, bias (mean output) or least_squares (refit on what stays)"
    )
    sharpness: float = Field(13.1072, ge=0, description="of the spread sigmoid, per unit of angle / pi")
    min_keep: int = Field(1, ge=1, description="units of a kind that every block keeps at least")
    round_to: int = Field(1, ge=1, description="widths of feed-forward parts stay multiples of this")

    @property
    def statistics(self) -> frozenset[Statistic]:
        return self.needs | {"mean"} if self.compensate == "bias" else self.needs

    def units(self, block: Block) -> list[Units]:
        """The kinds of units of a block that compete."""
        ffn = {"all": {True, False}, "ffn": {True}, "heads": {False}}[self.targets]
        return [units for units in units_of(block) if units.kind.endswith("ffn") in ffn]

    def score(self, problem: UnitProblem) -> Tensor:
        """(count,) importance of each unit; the smallest go."""
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


class WidthMethod(Method):
    """Base of the methods that make the whole model narrower, every block alike."""

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
    def steps(self) -> dict[str, int]:
        """By width, what it stays a multiple of."""
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


M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator: put a method into the catalogue under its `id`."""
    METHODS.register(method.id)(method)
    return method
