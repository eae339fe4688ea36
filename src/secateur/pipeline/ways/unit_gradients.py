"""What the loss feels of every unit of the model, for the methods that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.anatomy.units import Units
from secateur.calibration.backward import IndexedWatch
from secateur.calibration.driver import Driver
from secateur.calibration.taylor import MemberTerms, collect_taylor
from secateur.core.progress import Progress
from secateur.core.statistics import BACKWARD, Statistic
from secateur.structure.base import UnitMethod

__all__ = ["UnitGradients", "unit_gradients"]


class UnitGradients(NamedTuple):
    """Attributes:
    units: for each kind of units (`3.ffn`) and statistic (members, count) float64, the root first.
    loss: mean over the calibration windows, nats a token.
    """

    units: dict[str, dict[Statistic, Tensor]]
    loss: float


def unit_gradients(
    driver: Driver,
    method: UnitMethod,
    groups: Sequence[tuple[int, Units]],
    scratch: Path,
    progress: Progress,
    watch: IndexedWatch | None = None,
) -> UnitGradients:
    """Differentiate the model of the driver once.

    Args:
        groups: block and units of all that is wanted.
        scratch: for what does not fit into memory.
        watch: sees what enters and leaves every block.
    """
    spaces: list[set[str]] = [set() for _ in driver.source.anatomy.blocks]
    for index, units in groups:
        spaces[index] |= set(units.spaces)
    scratch.mkdir(parents=True, exist_ok=True)
    found = collect_taylor(
        driver.source,
        driver.windows,
        terms=method.statistics & BACKWARD,
        spaces=spaces,
        scratch=scratch,
        progress=progress,
        group=driver.group,
        watch=watch,
    )
    return UnitGradients(
        {f"{index}.{units.kind}": _of_units(units, found.blocks[index]) for index, units in groups},
        found.loss,
    )


def _of_units(units: Units, found: Sequence[MemberTerms]) -> dict[Statistic, Tensor]:
    """(members, count) by statistic: producers along the units' own space first, the writer last."""
    first = next(iter(units.spaces))
    own = [one for one in found if one.member.space in units.spaces]
    own.sort(key=lambda one: (one.member.module == units.writer.name, one.member.space != first))
    return {
        term: torch.stack([units.of_entries(one.member.space, one.terms[term]) for one in own])
        for term in own[0].terms
    }
