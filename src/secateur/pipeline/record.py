"""From what a run did and measured to its report."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
import transformers

import secateur
from secateur.anatomy.costs import cached_values_per_token, macs_per_token, non_embedding_parameters
from secateur.anatomy.model import Anatomy
from secateur.calibration.windows import Windows
from secateur.checkpoint.packing import DENSE
from secateur.checkpoint.reader import Checkpoint
from secateur.core.method import Method
from secateur.evaluation.memory import machine_facts
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import Outcome
from secateur.pipeline.verify import Verdict
from secateur.recipe import Recipe
from secateur.report.effect import effect
from secateur.report.model import Calibration, Machine, Protocol, Report, Runtime, Storage, Structure, Visits

__all__ = ["Sizes", "build_report", "digest", "running_costs", "storage_facts", "structure_facts", "versions"]


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes before and after, and how many weights are not zero by plan."""

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    nonzero_parameters_before: int
    nonzero_parameters_after: int

    @classmethod
    def of(cls, before: Checkpoint, after: Checkpoint, zeros: int) -> Sizes:
        """As counted in the files."""
        return cls(
            before.parameters,
            after.parameters,
            before.nbytes,
            after.nbytes,
            before.parameters,
            after.parameters - zeros,
        )

    @classmethod
    def unchanged(cls, parameters: int, nbytes: int, zeros: int) -> Sizes:
        """Zeros in dense files: the same parameters and bytes, fewer weights that are not zero."""
        return cls(parameters, parameters, nbytes, nbytes, parameters, parameters - zeros)


def structure_facts(models: tuple[Opened, Opened], outcome: Outcome) -> dict[str, Any]:
    """What a ratio of units alone does not say of a smaller model (structured-baselines, 5.8)."""
    facts: dict[str, Any] = dict(outcome.structure)
    for when, model in zip(("before", "after"), models, strict=True):
        facts |= {f"{key}_{when}": value for key, value in running_costs(model).items()}
    return facts


def running_costs(model: Opened, smaller: Anatomy | None = None) -> dict[str, int | None]:
    """Of a model, or of a smaller one in its dtype."""
    anatomy = smaller or model.anatomy
    values = cached_values_per_token(anatomy)
    return {
        "non_embedding_parameters": non_embedding_parameters(anatomy),
        "macs_per_token": macs_per_token(anatomy, model.checkpoint.config),
        "kv_bytes_per_token": None if values is None else values * model.stored_dtype.itemsize,
    }


def build_report(
    recipe: Recipe,
    method: Method,
    *,
    family: str,
    sizes: Sizes,
    outcome: Outcome,
    verdict: Verdict,
    loads_in: dict[str, str] | None = None,
    structure: dict[str, Any] | None = None,
    storage: Storage | None = None,
    calibration: Windows | None,
    fingerprint: dict[str, Any],
    command: str,
    seconds: float,
    peak_memory_bytes: int | None,
) -> Report:
    """Everything the contract with users asks for, validated; `calibration` are the windows that were
    observed, if any."""
    measured = {**verdict.values, "seconds": round(seconds, 3), "peak_memory_bytes": peak_memory_bytes}
    missing = dict(verdict.not_measured)
    if peak_memory_bytes is None:
        missing["peak_memory_bytes"] = "this system does not tell"
    sparsity = recipe.resolved_sparsity if outcome.requested is None else outcome.requested
    return Report(
        model=recipe.model,
        family=family,
        method=recipe.method,
        pattern=recipe.pattern if method.family == "weights" else method.family,
        allocation=getattr(method, "spread", recipe.allocation),
        options=method.model_dump(mode="json"),
        sparsity_requested=sparsity,
        sparsity=outcome.sparsity,
        **vars(sizes),
        **measured,
        protocol=Protocol(**verdict.protocol) if verdict.protocol else None,
        expert_visits=Visits(**verdict.visits) if verdict.visits else None,
        calibration=_calibration(calibration) if calibration else None,
        seed=recipe.seed,
        versions=versions(),
        machine=Machine(**machine_facts()),
        date=datetime.now(timezone.utc),
        command=command,
        fingerprint=digest(fingerprint),
        effect=effect(
            recipe.pattern, sparsity, removes=method.removes,
            storage=storage.format if storage and storage.tensors_packed else DENSE,
            bytes_before=sizes.bytes_before, bytes_after=sizes.bytes_after,
            loaded=verdict.runtime["after"] if verdict.runtime else None,
        ),
        loads_in=loads_in or {},
        budget=recipe.budget,
        structure=None if structure is None else Structure.model_validate(structure),
        precision=outcome.precision,
        storage=storage,
        runtime=Runtime(**verdict.runtime) if verdict.runtime else None,
        layers=outcome.layers,
        blocks=outcome.blocks,
        warnings=[*outcome.warnings, *_not_packed(storage)],
        not_measured=missing,
    )  # fmt: skip


def storage_facts(checkpoint: Checkpoint, format: str) -> Storage | None:
    """How the tensors of a result are stored; None where dense files were asked for."""
    if format == DENSE:
        return None
    packed = len(checkpoint.formats)
    return Storage(
        format=format,
        tensors_packed=packed,
        tensors_plain=len(checkpoint.tensors) - packed,
        dense_bytes=checkpoint.dense_nbytes,
    )


def _not_packed(storage: Storage | None) -> list[str]:
    if storage is None or storage.tensors_packed:
        return []
    return [f"Nothing would become smaller in format {storage.format}: these are ordinary files."]


def _calibration(windows: Windows) -> Calibration:
    return Calibration(
        source=windows.source, windows=len(windows), length=windows.length, sha256=windows.sha256
    )


def digest(fingerprint: dict[str, Any]) -> str:
    """One short hash of a flat fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    return {
        "secateur": secateur.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
