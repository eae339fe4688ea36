"""What the Taylor tests share: models with planted units, and their scores."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.anatomy.units import Units, units_of
from secateur.calibration.driver import Driver
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import Windows
from secateur.core.progress import SILENT
from secateur.pipeline.ways.unit_gradients import UnitGradients, unit_gradients
from secateur.structure.base import UnitMethod


def windows_of(model: PreTrainedModel, count: int = 6, length: int = 16) -> Windows:
    generator = torch.Generator().manual_seed(3)
    return Windows.of(torch.randint(0, model.config.vocab_size, (count, length), generator=generator))


def groups_of(model: PreTrainedModel) -> list[tuple[int, Units]]:
    return [(block.index, units) for block in MemorySource(model).anatomy.blocks for units in units_of(block)]


def gradients_of(model: PreTrainedModel, method: UnitMethod, windows: Windows | None = None) -> UnitGradients:
    driver = Driver(MemorySource(model), windows or windows_of(model))
    with tempfile.TemporaryDirectory() as scratch:
        return unit_gradients(driver, method, groups_of(model), Path(scratch), SILENT)


def scores_of(
    model: PreTrainedModel, method: UnitMethod, windows: Windows | None = None
) -> dict[str, Tensor]:
    """Importance by kind of units (`1.ffn`)."""
    found = gradients_of(model, method, windows).units
    return {name: method.rank(terms) for name, terms in found.items()}  # type: ignore[attr-defined]


def silence(model: PreTrainedModel, block: int, channel: int) -> None:
    """Make a channel of a Llama dead: what it reads and what it writes."""
    mlp = model.model.layers[block].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[channel] = 0
        mlp.up_proj.weight[channel] = 0
        mlp.down_proj.weight[:, channel] = 0
