"""The verbs as plain functions, on folders or on models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.core.errors import OutputError, SecateurError
from secateur.core.progress import SILENT, Progress
from secateur.evaluation.memory import machine_facts, peak_memory_bytes
from secateur.evaluation.quality import compare_quality, perplexity, protocol_of
from secateur.evaluation.speed import compare_speed, measure_speed
from secateur.evaluation.tasks import run_tasks
from secateur.pipeline.data import load_windows_for
from secateur.pipeline.fastest import why_unpacked
from secateur.pipeline.mending.recover import recover_checkpoint
from secateur.pipeline.opened import Opened, choose_device, choose_dtype, open_model
from secateur.pipeline.prune import prune_checkpoint
from secateur.pipeline.prune_memory import prune_model
from secateur.recipe import Calibration, Recipe, RecoveryRecipe, parse
from secateur.report.compare import compare as draw
from secateur.report.files import write_text
from secateur.report.model import Report
from secateur.runtime.facts import kernel_of, weight_bytes

__all__ = ["bench", "compare", "evaluate", "prune", "recover"]


def prune(
    model: str | Path | PreTrainedModel,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    resume: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> Report:
    """Prune a checkpoint into a folder, or a model in memory in place.

    Args:
        model: local folder, hub id, `seedling`, or a loaded `PreTrainedModel`.
        out: folder for the result (for a folder or hub id).
        tokenizer: of a loaded model, where text is read.
        resume: go on where a killed run stopped.
        settings: fields of `Recipe`: method, sparsity, pattern, allocation, options, calibration, ...
            `calibration` may be a source (`"self"`, a path) or a dictionary of `Calibration` fields.

    Returns:
        The report, as it is also written to `out`/report.json.

    Raises:
        InputError: whatever cannot be used, in one line.

    >>> import secateur
    >>> report = secateur.prune("seedling", "pruned", method="wanda", sparsity=0.5)  # doctest: +SKIP
    """
    calibration = settings.get("calibration")
    if isinstance(calibration, (str, Path)):
        settings["calibration"] = {"source": str(calibration)}
    name = (model.config.name_or_path or "in memory") if isinstance(model, PreTrainedModel) else str(model)
    recipe: Recipe = parse(Recipe, {"model": name, **settings}, "the settings")
    if isinstance(model, PreTrainedModel):
        return prune_model(model, recipe, tokenizer=tokenizer, progress=progress)
    if out is None:
        raise OutputError("no output folder", "a folder for the result", "give out='pruned'")
    command = f"secateur.prune({name!r}, {str(out)!r}, ...)"
    report = prune_checkpoint(recipe, Path(out), resume=resume, command=command, progress=progress)
    if report is None:
        raise SecateurError("only the first process of a torchrun has a report; use the command line there")
    return report


def recover(
    model: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    resume: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> Report:
    """Train or refit a pruned checkpoint into a folder; shapes, names and zeros stay as they are.

    Args:
        model: local folder, hub id or `seedling`.
        text: what it learns from: a file, a hub data set, or `self`.
        resume: go on where a killed run stopped.
        settings: `how` (`lora`, `full` or `refit`), `teacher`, `tokens`, `length`, `batch_size`,
            `learning_rate`, `rank`, `validation_windows`, `options`, `evaluation_text`, and `seed`, `device`,
            `dtype`, `evaluation_windows`, `measure_speed` as for `prune`.

    Returns:
        The report, as it is also written to `out`/report.json.

    Raises:
        InputError: whatever cannot be used, in one line.

    >>> import secateur
    >>> secateur.recover("pruned", "mended", text="stories.txt", teacher="seedling")  # doctest: +SKIP
    """
    given = {"measure_speed": False, "model": str(model), "text": str(text), **settings}
    recipe = RecoveryRecipe.alone(given, "the settings")
    command = f"secateur.recover({str(model)!r}, {str(out)!r}, ...)"
    return recover_checkpoint(recipe, Path(out), resume=resume, command=command, progress=progress)


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | None = None,
    column: str | None = None,
    windows: int = 128,
    length: int | None = None,
    batch_size: int | None = None,
    tasks: Sequence[str] | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Perplexity of a folder, its divergence from a dense model, and tasks.

    Args:
        against: the dense model.
        text: file, hub data set or `self` (sampled from `against`, else from the model). Without text
            and tasks, `self`.
        windows, length: how much is read, in windows and tokens a window.

    Returns:
        `perplexity`, with `against` also `perplexity_dense`, `kl_divergence` (nats a token) and
        `top1_agreement`; `protocol`; with tasks `tasks`.

    Raises:
        InputError: a model, text or task that cannot be used.
    """
    opened = open_model(model)
    dense = open_model(against) if against is not None else None
    chosen = choose_device(device)
    precision = choose_dtype(dtype, chosen, opened.stored_dtype)
    result: dict[str, Any] = {"model": str(model)}
    if text is not None or not tasks:
        calibration = Calibration(
            source=text or "self", samples=windows, length=length, column=column, batch_size=batch_size
        )
        data = load_windows_for(dense or opened, calibration, windows, seed, progress, chosen)
        result["protocol"] = protocol_of(data, precision, opened.folder)
        source = opened.source(chosen, precision)
        if dense is None:
            result["perplexity"] = perplexity(source, data, batch_size=batch_size, progress=progress)
        else:
            before, after = compare_quality(
                dense.source(chosen, precision), source, data, batch_size=batch_size, progress=progress
            )
            result |= {
                "against": str(against),
                "perplexity": after.perplexity,
                "perplexity_dense": before.perplexity,
                "kl_divergence": after.kl_divergence,
                "top1_agreement": after.top1_agreement,
            }
    if tasks:
        loaded = opened.load(precision, chosen)
        result["tasks"] = run_tasks(
            loaded,
            opened.tokenizer,
            list(tasks),
            task_folder=task_folder,
            limit=limit,
            batch_size=batch_size or 8,
        )
    return result


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    packed: bool | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Prefill and decode speed apart, batch 1 and 8, median and spread; with `against` measured in turn.

    Args:
        packed: keep weights packed in memory that are so in the files; by default on a CPU where a kernel
            computes from most of them. `kernel` in the result says what did, or why none; None where no
            weights are packed.

    Raises:
        InputError: a model that cannot be loaded.
    """
    chosen = choose_device(device)
    opened = open_model(model)
    precision = choose_dtype(dtype, chosen, opened.stored_dtype)
    loaded, unpacked = _loaded(opened, precision, chosen, packed)
    result: dict[str, Any] = {
        "model": str(model),
        "bytes": opened.checkpoint.nbytes,
        "weight_bytes": weight_bytes(loaded),
        "machine": machine_facts(),
        "dtype": str(precision).removeprefix("torch."),
        "repeats": repeats,
    }
    if against is None:
        result |= measure_speed(
            loaded, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, progress=progress
        ).as_dict()
        result["kernel"] = unpacked or kernel_of(loaded)
    else:
        other = open_model(against)
        rival, other_unpacked = _loaded(other, precision, chosen, packed)
        both = compare_speed(
            loaded,
            rival,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            progress=progress,
        )
        result |= {
            "against": str(against), "bytes_against": other.checkpoint.nbytes,
            "weight_bytes_against": weight_bytes(rival),
            "kernel": unpacked or kernel_of(loaded) or other_unpacked or kernel_of(rival),
            **both.as_dict(),
        }  # fmt: skip
    result["peak_memory_bytes"] = peak_memory_bytes()
    return result


def _loaded(
    opened: Opened, dtype: torch.dtype, device: torch.device, packed: bool | None
) -> tuple[PreTrainedModel, str | None]:
    """A model, and why its packed weights are not kept so: None where they are, or it has none."""
    reason = why_unpacked(opened, dtype, device) if packed is None else None
    model = opened.load(dtype, device, packed=reason is None if packed is None else packed)
    return model, f"none, loaded dense: {reason}" if reason else None


def compare(runs: Sequence[str | Path], out: str | Path) -> list[dict[str, Any]]:
    """Draw several runs in one page and return their rows.

    Raises:
        InputError: a folder without a report.
    """
    reports = [Report.load(run) for run in runs]
    write_text(Path(out), draw([Path(run) for run in runs]))
    return [{"run": str(run), **_row(report)} for run, report in zip(runs, reports, strict=True)]


def _row(report: Report) -> dict[str, Any]:
    keys = (
        *("model", "method", "pattern", "allocation", "sparsity", "bytes_before", "bytes_after"),
        *("perplexity_before", "perplexity_after", "kl_divergence", "top1_agreement"),
        *("decode_tokens_per_second_before", "decode_tokens_per_second_after"),
    )
    return {key: getattr(report, key) for key in keys}
