"""Candidates judged side by side in processes that Ray starts: the same numbers, sooner."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from secateur.core.errors import MissingExtraError
from secateur.core.evolution import Levels
from secateur.pipeline.opened import open_model
from secateur.pipeline.search.candidates import Judge, Judging, Reference
from secateur.pipeline.search.supernet import Supernet

__all__ = ["ray_judging", "ray_running", "require_ray"]


def require_ray() -> None:
    """Raise `MissingExtraError` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "judging candidates in several processes (-O workers)")


@contextmanager
def ray_judging(
    count: int,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    supernet: Supernet,
    references: dict[str, Reference],
    *,
    resident: bool,
) -> Iterator[Judging]:
    """`count` processes, each with a judge of its own, inside `ray_running`.

    Every process computes with as many threads as this one, so that not one bit of a result depends on them.

    Args:
        folder: of the dense model; it and the files of the supernet must be there for every process.
    """
    import ray

    gpus = torch.cuda.device_count() / count if device.type == "cuda" else 0
    actor = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
    what = ray.put((supernet, references))
    settings = (str(folder), device.type, dtype, torch.get_num_threads(), resident)
    workers = [actor.remote(what, *settings) for _ in range(count)]

    def judge(candidates: Sequence[Levels], name: str, rows: Sequence[int]) -> list[float]:
        ordered = sorted(set(candidates))  # neighbours share what comes out of the first blocks
        bounds = [number * len(ordered) // count for number in range(count + 1)]
        parts = [ordered[start:stop] for start, stop in pairwise(bounds)]
        calls = [w.judge.remote(part, name, list(rows)) for w, part in zip(workers, parts, strict=True)]
        losses = [loss for part in ray.get(calls) for loss in part]
        found = dict(zip(ordered, losses, strict=True))
        return [found[levels] for levels in candidates]

    try:
        yield judge
    finally:
        for worker in workers:
            ray.kill(worker)


@contextmanager
def ray_running(count: int) -> Iterator[None]:
    """Ray with this many cores of this machine, or the cluster of `RAY_ADDRESS`, unless it runs already."""
    import ray

    if ray.is_initialized():
        yield
        return
    cores = None if "RAY_ADDRESS" in os.environ else count
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


class _Worker:
    """Lives in a process of its own."""

    def __init__(
        self,
        what: tuple[Supernet, dict[str, Reference]],
        folder: str,
        device: str,
        dtype: torch.dtype,
        threads: int,
        resident: bool,
    ) -> None:
        torch.set_num_threads(threads)
        source = open_model(folder).source(torch.device(device), dtype)
        self._judge = Judge(source, *what, resident=resident)

    def judge(self, *arguments: Any) -> list[float]:
        return self._judge(*arguments)
