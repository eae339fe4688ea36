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
from secateur.calibration.windows import Windows
from secateur.checkpoint.reader import Checkpoint
from secateur.core.method import Method
from secateur.evaluation.memory import machine_facts
from secateur.pipeline.state import Outcome
from secateur.pipeline.verify import Verdict
from secateur.recipe import Recipe
from secateur.report.effect import effect
from secateur.report.model import Calibration, Machine, Protocol, Report

__all__ = ["Sizes", "build_report", "digest", "versions"]


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


def build_report(
    recipe: Recipe,
    method: Method,
    *,
    family: str,
    sizes: Sizes,
    outcome: Outcome,
    verdict: Verdict,
    loads_in: dict[str, str] | None = None,
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
    sparsity = recipe.resolved_sparsity
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
        calibration=_calibration(calibration) if calibration else None,
        seed=recipe.seed,
        versions=versions(),
        machine=Machine(**machine_facts()),
        date=datetime.now(timezone.utc),
        command=command,
        fingerprint=digest(fingerprint),
        effect=effect(
            recipe.pattern, sparsity, removes=method.removes,
            bytes_before=sizes.bytes_before, bytes_after=sizes.bytes_after,
        ),
        loads_in=loads_in or {},
        layers=outcome.layers,
        blocks=outcome.blocks,
        warnings=outcome.warnings,
        not_measured=missing,
    )  # fmt: skip


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
