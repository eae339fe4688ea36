"""A way to recover, and the options that all trainings share."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from secateur.core.errors import MissingExtraError, RecipeError
from secateur.core.method import Method
from secateur.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from secateur.anatomy.model import Anatomy
    from secateur.recovery.student import Student

__all__ = ["RECOVERIES", "RecoveryMethod", "Training", "register"]


class RecoveryMethod(Method):
    """Base of the ways to recover.

    Class variables:
        packages: what it imports beyond the core, all in the extra `recover`.
        needs_teacher: it has nothing to learn from without the dense model.
    """

    family: ClassVar[str] = "recovery"
    removes: ClassVar[str] = "nothing"
    packages: ClassVar[tuple[str, ...]] = ()
    needs_teacher: ClassVar[bool] = False

    def check(self, anatomy: Anatomy) -> None:
        """Raise `RecipeError` for a model it cannot mend."""

    def require_packages(self) -> None:
        """Raise `MissingExtraError` for a package that is not there."""
        for package in self.packages:
            if find_spec(package) is None:
                raise MissingExtraError(package, "recover", f"recovery with {self.id}")


class Training(RecoveryMethod):
    """Base of the ways that follow a gradient.

    Class variables:
        trains_weights: weights themselves are trained, not something beside them.
    """

    trains_weights: ClassVar[bool] = True
    effect: ClassVar[str] = "the same shapes and zeros with other values: better, not smaller and not faster"

    learning_rate: float = Field(3e-4, ge=0, description="the highest of the run")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="after the warm-up: cosine, wsd (constant, then a linear decay), constant",
    )
    warmup: float = Field(0.05, ge=0, le=1, description="fraction of the schedule that warms up")
    decay: float = Field(0.1, ge=0, le=1, description="fraction of the schedule, at its end, that wsd decays")
    floor: float = Field(0.0, ge=0, le=1, description="fraction of the learning rate that is left at the end")
    schedule_start: float = Field(0.0, ge=0, le=1, description="where in the schedule this run begins")
    schedule_end: float = Field(1.0, ge=0, le=1, description="where in the schedule this run ends")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    kl_weight: float = Field(
        1.0,
        ge=0,
        le=1,
        description="with a teacher: weight of the divergence from it; the rest is cross-entropy",
    )
    temperature: float = Field(2.0, gt=0, description="of the divergence from the teacher")
    hidden: Literal["none", "cosine", "mse"] = Field(
        "none", description="with a teacher: distance of the outputs of matching blocks that is added"
    )
    hidden_weight: float = Field(1.0, ge=0, description="of that distance")
    evaluations: int = Field(10, ge=1, description="how often the validation windows are looked at")
    patience: int = Field(3, ge=0, description="looks without an improvement that end the run; 0: never")
    micro_batch: int = Field(0, ge=0, description="windows a forward pass; 0: the whole batch")
    gradient_checkpointing: bool = Field(False, description="compute block outputs again to save memory")
    checkpoint_seconds: float = Field(60.0, ge=0, description="between two saved states; 0: every step")

    @model_validator(mode="after")
    def _schedule_goes_on(self) -> Training:
        if self.schedule_start > self.schedule_end:
            raise RecipeError(
                f"schedule_start {self.schedule_start:g} after schedule_end {self.schedule_end:g}",
                "the part of the schedule that this run covers",
            )
        return self

    def check_importance(self, importance: Tensor | None, blocks: int) -> None:
        """Raise `RecipeError` if the options need an importance of every block and it is not there."""

    def student(self, model: PreTrainedModel, anatomy: Anatomy, importance: Tensor | None) -> Student:
        """The model made ready to be trained.

        Args:
            model: to be trained, without gradients; changed in place.
            importance: (L,) of the blocks, where the pruning run left it.
        """
        raise NotImplementedError

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of `step`, counted from 0, of `steps`: the schedule at the middle of the step."""
        return self.learning_rate * learning_rate(
            step,
            steps,
            schedule=self.schedule,
            warmup=self.warmup,
            decay=self.decay,
            floor=self.floor,
            part=(self.schedule_start, self.schedule_end),
        )


def learning_rate(
    step: int,
    total: int,
    *,
    schedule: str = "cosine",
    warmup: float = 0.05,
    decay: float = 0.1,
    floor: float = 0.0,
    part: tuple[float, float] = (0.0, 1.0),
) -> float:
    """Fraction of the highest learning rate at `step` of `total` (adapt-pruner, section 2: one curve over all
    stages).

    Args:
        warmup, decay: fractions of the whole curve.
        floor: what is left at its end.
        part: where on the curve these steps begin and end; parts that meet make one curve.

    >>> learning_rate(0, 2, warmup=0.5), learning_rate(1, 2, warmup=0.0, schedule="constant")
    (0.5, 1.0)
    """
    at = part[0] + (part[1] - part[0]) * (step + 0.5) / total
    if at < warmup:
        return at / warmup
    if schedule == "cosine":
        turned = (at - warmup) / (1 - warmup)
        return floor + (1 - floor) * (1 + math.cos(math.pi * turned)) / 2
    if schedule == "wsd" and at > 1 - decay:
        return floor + (1 - floor) * (1 - at) / decay
    return 1.0


RECOVERIES: Registry[type[RecoveryMethod]] = Registry(
    "way to recover",
    "secateur.recoveries",
    {name: f"secateur.recovery.{name}" for name in ("lora", "full", "refit")},
)
"""The catalogue of ways to recover; packages add theirs by the entry point group `secateur.recoveries`."""

M = TypeVar("M", bound=type[RecoveryMethod])


def register(method: M) -> M:
    """Class decorator: put a way to recover into the catalogue under its `id`."""
    RECOVERIES.register(method.id)(method)
    return method
