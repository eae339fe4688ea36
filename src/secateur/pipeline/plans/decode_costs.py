"""What heads and channels cost a token on this machine: whole narrowed models, timed beside the dense one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.anatomy.skeleton import build_skeleton, load_tensors
from secateur.anatomy.units import Units
from secateur.calibration.distributed import Group
from secateur.checkpoint.durable import write_bytes
from secateur.core.errors import RecipeError
from secateur.core.goal import Goal
from secateur.core.progress import Progress
from secateur.evaluation.memory import available_memory_bytes
from secateur.evaluation.speed import compare_speed
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.result import Group as Member
from secateur.pipeline.plans.result import Result
from secateur.structure.base import StructureMethod
from secateur.structure.groups import floor_of

__all__ = ["DECODE", "DecodeTable", "measure_decode", "rising"]

DECODE = "decode.json"
SHARES = (0.75, 0.5, 0.0)
REPEATS = 7
PROMPT_TOKENS, NEW_TOKENS = 16, 8
FILL = 0.01
MEMORY_FRACTION = 0.4


@dataclass(frozen=True)
class DecodeTable:
    """One decode step, one sequence.

    Attributes:
        milliseconds: of the dense model.
        points: for each kind of unit, (share that stays in every block, time relative to dense).
    """

    milliseconds: float
    points: dict[str, list[tuple[float, float]]]

    def goal(self, groups: Sequence[Member], limit: float) -> Goal:
        """The limit in milliseconds, with what each group adds to a step at each width.

        Groups of a kind share its measured part in proportion to their parameters; between two measured
        widths the cost is linear, and it never falls with the width.
        """
        weight = {
            kind: sum(units.count * units.parameters for _, units in groups if units.kind == kind)
            for kind in self.points
        }
        costs, saved = [], 0.0
        for _, units in groups:
            part = self.milliseconds * units.count * units.parameters / weight[units.kind]
            shares, spent = self._spent(units.kind)
            costs.append(
                torch.from_numpy(part * np.interp(np.arange(units.count + 1) / units.count, shares, spent))
            )
            saved += float(costs[-1][-1])
        return Goal("milliseconds", limit, self.milliseconds - saved, costs)

    def _spent(self, kind: str) -> tuple[Sequence[float], Sequence[float]]:
        """Shares, rising, and what of a dense step goes to the units of the kind at each."""
        points = sorted([*map(tuple, self.points[kind]), (1.0, 1.0)])
        times = rising([time for _, time in points])
        return [share for share, _ in points], [time - times[0] for time in times]

    @classmethod
    def load(cls, path: Path) -> DecodeTable:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(values["milliseconds"], values["points"])

    @classmethod
    def shared(cls, table: DecodeTable | None, group: Group | None) -> DecodeTable | None:
        """The table of the first process, in every one."""
        if group is None:
            return table
        values = group.broadcast(asdict(table) if table else None)
        return cls(**values) if values else None

    def save(self, path: Path) -> None:
        write_bytes(path, json.dumps(asdict(self)).encode())


def measure_decode(
    opened: Opened,
    method: StructureMethod,
    groups: Sequence[Member],
    biases: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> DecodeTable:
    """Time the dense model against copies with fewer heads, then fewer channels, in every block.

    A copy is built from its configuration, with constant weights; each runs in turn with the dense model
    after a warm-up, and the median of their ratios counts.

    Raises:
        RecipeError: a model of which two do not fit into memory.
    """
    needed = 2 * opened.checkpoint.parameters * dtype.itemsize
    if device.type == "cpu" and needed > MEMORY_FRACTION * available_memory_bytes():
        raise RecipeError(
            f"a decode budget for {opened.checkpoint.parameters:,} parameters",
            "a model of which two fit into memory, to be timed",
            "use --budget bytes=...",
        )
    steps = _steps(groups, method)
    dense, times = opened.load(dtype, device), []
    points: dict[str, list[tuple[float, float]]] = {kind: [] for kind in steps}
    with progress.task("timing narrower copies of the model", sum(map(len, steps.values()))) as task:
        for kind, plans in steps.items():
            for share, kept in plans.items():
                narrow = _narrow(Result.of(opened, groups, kept, biases), device, dtype)
                speed = compare_speed(
                    narrow, dense, batch_sizes=(1,), repeats=REPEATS, prompt_tokens=PROMPT_TOKENS,
                    new_tokens=NEW_TOKENS,
                )  # fmt: skip
                ratio = next(row.ratio for row in speed.ratios if row.phase == "decode")
                times.append(1000 / speed.b.decode(1))
                points[kind].append((share, 1 / ratio))
                task.advance()
    return DecodeTable(statistics.median(times), points)


def rising(values: Sequence[float]) -> list[float]:
    """The rising sequence nearest to a noisy one: neighbours out of order share their mean."""
    runs: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while runs and runs[-1][0] > mean:
            before, many = runs.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        runs.append((mean, count))
    return [mean for mean, count in runs for _ in range(count)]


def _steps(groups: Sequence[Member], method: StructureMethod) -> dict[str, dict[float, list[Tensor]]]:
    """For each kind of unit, by the share that stays of it, what every group keeps."""
    steps: dict[str, dict[float, list[Tensor]]] = {}
    for kind in dict.fromkeys(units.kind for _, units in groups):
        plans = [[_kept(units, units.kind == kind, share, method) for _, units in groups] for share in SHARES]
        narrower = {_share(groups, kept, kind): kept for kept in plans}
        steps[kind] = {share: kept for share, kept in narrower.items() if share < 1}
    return steps


def _kept(units: Units, narrow: bool, share: float, method: StructureMethod) -> Tensor:
    count = round(share * units.count) if narrow else units.count
    return torch.arange(max(floor_of(units, method), count))


def _share(groups: Sequence[Member], kept: Sequence[Tensor], kind: str) -> float:
    """What of the kind stays, over all blocks."""
    own = [
        (len(stays), units.count)
        for (_, units), stays in zip(groups, kept, strict=True)
        if units.kind == kind
    ]
    return sum(stays for stays, _ in own) / sum(count for _, count in own)


def _narrow(result: Result, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of these sizes whose weights say nothing."""
    values = {**result.opened.checkpoint.config, **result.config_updates}
    model = build_skeleton(CONFIG_MAPPING[values["model_type"]].from_dict(values), dtype)
    filled: dict[int, Tensor] = {}
    tensors = model.state_dict(keep_vars=True)
    load_tensors(
        model,
        {
            name: filled.setdefault(id(tensor), torch.full_like(tensor, FILL, device="cpu"))
            for name, tensor in tensors.items()
            if tensor.is_meta
        },
    )
    return model.to(device)
