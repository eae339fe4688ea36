"""The text of a run: what is observed, and what is kept back to judge the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from secateur.calibration.windows import Windows, load_windows
from secateur.core.errors import CalibrationError
from secateur.core.progress import Progress
from secateur.evaluation.memory import available_memory_bytes
from secateur.pipeline.opened import Opened, choose_device
from secateur.recipe import MAX_DEFAULT_LENGTH, Calibration, Job

__all__ = ["RunData", "load_run_data", "load_windows_for", "split_run_data", "window_length"]

SELF = "self"
MEMORY_FRACTION = 0.8
WINDOWS_FILE = "windows.safetensors"


@dataclass(frozen=True)
class RunData:
    """The windows of a run.

    Attributes:
        loaded: everything that came from the calibration source.
        calibration: what the method observes of it; no windows where it observes nothing.
        evaluation: windows that judge before and after; None when there is nothing to judge on.
        held_out: how `evaluation` was obtained, in words, for the protocol of the report.
    """

    loaded: Windows
    calibration: Windows
    evaluation: Windows | None
    held_out: str


def window_length(opened: Opened, asked: int | None) -> int:
    """Tokens a window: what was asked for, else the model's maximum up to 2,048.

    Raises:
        CalibrationError: longer than the model accepts.
    """
    if asked is None:
        return min(opened.max_length, MAX_DEFAULT_LENGTH)
    if asked > opened.max_length:
        raise CalibrationError(
            f"windows of {asked} tokens",
            f"at most {opened.max_length}, the longest input of this model",
            f"use --length {opened.max_length}",
        )
    return asked


_SAMPLED: dict[tuple[str, int, int, int, str], Windows] = {}
"""The last windows that a model made, by the model, their number and length, the seed and the device."""


def load_run_data(
    opened: Opened,
    recipe: Job,
    progress: Progress,
    *,
    observes: bool = True,
    cache: Path | None = None,
) -> RunData:
    """Read or sample the calibration and evaluation windows.

    With no text of its own the evaluation uses windows of the same source that calibration does not see,
    the same ones whatever the method.

    Args:
        observes: whether the run looks at calibration windows; if not, they are left alone unless the
            evaluation needs their source.
        cache: folder of an earlier run, whose sampled windows are taken again.

    Raises:
        CalibrationError: text that is missing, empty or too short.
    """
    wanted = recipe.calibration.samples
    spare = recipe.evaluation_windows if recipe.text is None else 0
    place = choose_device(recipe.device)
    windows = _cached(cache) if cache and recipe.calibration.source == SELF else None
    if windows is None and not (observes or spare):
        windows = Windows.none()
    if windows is None:
        windows = load_windows_for(opened, recipe.calibration, wanted + spare, recipe.seed, progress, place)
    if recipe.text is not None and recipe.evaluation_windows:
        held = recipe.calibration.model_copy(update={"source": recipe.text, "column": None})
        evaluation = load_windows_for(opened, held, recipe.evaluation_windows, recipe.seed, progress, place)
        return RunData(windows, windows, evaluation, "the first windows of the text given")
    return split_run_data(windows, wanted, spare)


def split_run_data(windows: Windows, wanted: int, spare: int) -> RunData:
    """Keep the last windows back for the evaluation; a source that is too short is shared in proportion."""
    if not spare:
        return RunData(windows, windows, None, "not evaluated")
    if len(windows) < 2:
        reason = "the calibration windows themselves: the source has no more text"
        return RunData(windows, windows, windows, reason)
    kept_back = min(spare, max(1, len(windows) * spare // (wanted + spare)), len(windows) - 1)
    observed, held = windows.split(len(windows) - kept_back)
    reason = f"the last {kept_back} windows of the calibration source, not observed"
    return RunData(windows, observed, held, reason)


def load_windows_for(
    opened: Opened,
    calibration: Calibration,
    samples: int,
    seed: int,
    progress: Progress,
    device: torch.device,
) -> Windows:
    """Windows of the source that `calibration` names, sampled from the model itself for `self`: on the
    device if the model fits there, else on the CPU. What was sampled last in this process is not sampled
    again."""
    length = window_length(opened, calibration.length)
    sampled = calibration.source == SELF
    key = (opened.checkpoint.fingerprint(), samples, length, seed, str(device)) if sampled else None
    if key in _SAMPLED:
        return _SAMPLED[key]

    def whole() -> PreTrainedModel:
        if _fits_on(device, opened):
            return opened.load(opened.stored_dtype, device)
        _refuse_if_too_large(opened)
        return opened.load(torch.float32, torch.device("cpu"))

    windows = load_windows(
        calibration.source,
        tokenizer=opened.tokenizer,
        samples=samples,
        length=length,
        seed=seed,
        column=calibration.column,
        model=whole,
        progress=progress,
    )
    if key is not None:
        _SAMPLED.clear()
        _SAMPLED[key] = windows
    return windows


def _fits_on(device: torch.device, opened: Opened) -> bool:
    if device.type != "cuda":
        return False
    return opened.checkpoint.dense_nbytes < MEMORY_FRACTION / 2 * torch.cuda.mem_get_info(device)[0]


def _refuse_if_too_large(opened: Opened) -> None:
    needed = opened.checkpoint.parameters * 4
    available = available_memory_bytes()
    if needed > MEMORY_FRACTION * available:
        raise CalibrationError(
            f"self-sampling needs {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free",
            "a model that fits into memory",
            "give text instead: --calibration FILE.txt",
        )


def save_cache(data: RunData, folder: Path) -> None:
    """Keep the windows beside the journal so that a resumed run need not sample again."""
    if not len(data.loaded):
        return
    temporary = folder / "windows.new"
    save_file({"ids": data.loaded.ids}, temporary, metadata={"source": data.loaded.source})
    temporary.replace(folder / WINDOWS_FILE)


def _cached(folder: Path) -> Windows | None:
    if not (folder / WINDOWS_FILE).exists():
        return None
    with safe_open(folder / WINDOWS_FILE, "pt") as file:
        return Windows.of(file.get_tensor("ids"), source=(file.metadata() or {}).get("source", ""))
