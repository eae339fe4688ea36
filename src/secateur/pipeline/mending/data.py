"""The text of a recovery: what is learnt from, what chooses the best weights, and what judges the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.calibration.windows import Windows
from secateur.core.errors import CalibrationError
from secateur.core.progress import Progress
from secateur.pipeline.data import RunData, load_run_data, load_windows_for, window_length
from secateur.pipeline.opened import Opened, choose_device
from secateur.recipe import Calibration, RecoveryRecipe

__all__ = ["RecoveryData", "load_recovery_data"]


@dataclass(frozen=True)
class RecoveryData:
    """The windows of a recovery; no window is in two of them.

    Attributes:
        training: to learn from.
        validation: to choose the best weights by.
        run: its `evaluation` judges the result.
    """

    training: Windows
    validation: Windows
    run: RunData

    @property
    def both(self) -> Windows:
        """Training windows, then those for validation."""
        return Windows.of(torch.cat([self.training.ids, self.validation.ids]), source=self.training.source)


def load_recovery_data(
    opened: Opened, recipe: RecoveryRecipe, progress: Progress, cache: Path | None = None
) -> RecoveryData:
    """Read or sample the text.

    Where the beginning of the very text that is learnt from judges the result, learning starts behind it.

    Args:
        opened: the model whose tokenizer counts, and that is sampled from for `self`.
        cache: folder of an earlier run, whose sampled evaluation windows are taken again.

    Raises:
        CalibrationError: text that is missing, empty or too short.
    """
    recover = recipe.recover
    length = window_length(opened, recover.length)
    run = load_run_data(opened, recipe, progress, cache=cache)
    judged = -(-(_judged_tokens(recipe, run) + recover.skip) // length)
    wanted = max(-(-recover.tokens // length), recover.batch_size) + recover.validation_windows
    source = Calibration(source=recover.text, column=recover.column, length=length)
    place = choose_device(recipe.device)
    windows = load_windows_for(opened, source, judged + wanted, recipe.seed, progress, place)
    if len(windows) < judged + recover.validation_windows + recover.batch_size:
        raise CalibrationError(
            f"{recover.text} has {len(windows)} windows of {length} tokens",
            f"{judged} to judge by or skip, {recover.validation_windows} to validate, "
            f"{recover.batch_size} to train",
            "give more text, or lower --length, --evaluation-windows, --batch-size or --validation-windows",
        )
    rest = windows.split(judged)[1] if judged else windows
    training, validation = rest.split(len(rest) - recover.validation_windows)
    return RecoveryData(training, validation, run)


def _judged_tokens(recipe: RecoveryRecipe, run: RunData) -> int:
    """How much of the beginning of the recovery text the evaluation has read."""
    read = 0
    if recipe.calibration.source == recipe.recover.text:
        read = run.loaded.ids.numel()
    if recipe.text == recipe.recover.text and run.evaluation is not None:
        read = max(read, run.evaluation.ids.numel())
    return read
