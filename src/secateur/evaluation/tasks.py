"""Tasks through lm-evaluation-harness, an optional dependency (extra `eval`)."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from secateur.core.errors import InputError, MissingExtraError, did_you_mean

__all__ = ["run_tasks"]

BOOTSTRAP_SAMPLES = 1000
"""For standard errors without a closed form; a mean has one."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float | int | None]]:
    """Evaluate tasks of lm-evaluation-harness on a model in memory.

    Nothing is downloaded for tasks of `task_folder` whose data are local files; those of the harness itself
    fetch their data from the hub. Equal calls give equal results; global generators are left as they were.

    Args:
        tasks: names of tasks, groups or tags; `*` and `?` match.
        task_folder: folder with YAML task files of your own, which go before those of the harness.
            Relative paths in a task file are seen from the working directory.
        limit: examples a task; by default all.
        batch_size: examples a forward pass.

    Returns:
        For each task its metrics, such as `acc` and `acc_stderr` (named `metric,filter` for filters other
        than `none`), and `samples`. A standard error that is not defined is `None`.

    Raises:
        MissingExtraError: without lm-eval.
        InputError: no such folder, unknown tasks, data that cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "eval", "tasks")
    if not tasks or (limit is not None and limit < 1):
        raise InputError(f"tasks {list(tasks)}, limit {limit}", "at least one task and one example")
    if task_folder is not None and not task_folder.is_dir():
        raise InputError(f"there is no folder {task_folder}", "a folder with YAML task files")
    manager = _task_manager(tasks, task_folder)
    names = _find(manager, tasks)
    with _left_as_it_was(model):
        return _metrics(_evaluate(model, tokenizer, manager, names, limit, batch_size))


def _task_manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """An index of the folder, and of the thousands of files of the harness only when they are needed."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _find(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The names of the harness that match; each of `tasks` must match at least one."""
    for task in tasks:
        if not manager.match_tasks([task]):
            close = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.55)
            hint = did_you_mean(task, close) if close else "list them with: lm-eval ls tasks"
            raise InputError(f"unknown task {task!r}", "", hint)
    return list(manager.match_tasks(list(tasks)))


def _evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    manager: Any,
    names: list[str],
    limit: int | None,
    batch_size: int,
) -> Mapping[str, Any]:
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    padded = copy.deepcopy(tokenizer)  # the harness gives it a padding token
    try:
        result: Mapping[str, Any] = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=padded, batch_size=batch_size, backend="causal"),
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError, ImportError, DatasetsError) as error:
        raise InputError(
            f"task {', '.join(names)} does not run ({type(error).__name__}: {error})",
            f"task files and data that can be read from {Path.cwd()}",
        ) from error
    return result


@contextmanager
def _left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """The harness seeds every global generator and switches the model to eval mode; put both back."""
    training, plain, numpy_state = model.training, random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(training)
        random.setstate(plain)
        np.random.set_state(numpy_state)


def _metrics(result: Mapping[str, Any]) -> dict[str, dict[str, float | int | None]]:
    """Rows `{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}` with plain names and only numbers."""
    rows: dict[str, dict[str, float | int | None]] = {}
    for task, row in result["results"].items():
        metrics = {name.removesuffix(",none"): value for name, value in row.items() if "," in name}
        rows[task] = {
            name: float(value) if isinstance(value, int | float) else None for name, value in metrics.items()
        }
        samples = result.get("n-samples", {}).get(task)
        if samples is not None:
            rows[task]["samples"] = int(samples["effective"])
    return rows
