"""From what a recovery did and measured to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from secateur.checkpoint.packing import config_entry
from secateur.checkpoint.reader import Checkpoint
from secateur.evaluation.memory import machine_facts, peak_memory_bytes
from secateur.evaluation.quality import perplexity
from secateur.pipeline.loadable import found_to_load
from secateur.pipeline.mending.data import RecoveryData
from secateur.pipeline.mending.training import Mended, Mending, count_zeros
from secateur.pipeline.opened import Opened, choose_dtype
from secateur.pipeline.record import digest, storage_facts, versions
from secateur.pipeline.verify import Verdict, verify
from secateur.report.effect import effect
from secateur.report.model import (
    FILE_NAME,
    RECOVERY,
    Look,
    Machine,
    Protocol,
    Recovery,
    Report,
    Runtime,
    Stage,
)

__all__ = ["earlier_stages", "recovery_report"]

EFFECT = "Training changed values, not shapes: the files are as large and the model as fast as before it."
UNPACKED = (
    "Training changed values, not shapes or zeros: packed files came in, and these are dense. "
    "`secateur export MODEL --format bitmask -o OUT` packs them again."
)
LOSS = "squared error of the residual stream after the matrix, relative to the dense one, on text kept back"


def earlier_stages(opened: Opened) -> list[Stage]:
    """What was done to a model before, as its report tells."""
    if not (opened.folder / FILE_NAME).is_file():
        return []
    report = Report.load(opened.folder)
    return list(report.stages or [report.as_stage()])


def recovery_report(
    job: Mending,
    data: RecoveryData,
    mended: Mended,
    models: tuple[Opened, Opened],
    stages: Sequence[Stage],
    fingerprint: dict[str, Any],
    command: str,
    started: float,
) -> Report:
    """Judge the result against the dense model and put everything down.

    Args:
        models: the dense one, and the files that are about to be published.
        stages: what was done before.
        started: `time.perf_counter()` at the start of the run.
    """
    dense, recovered = models
    dtype = choose_dtype(job.recipe.dtype, job.device, job.opened.stored_dtype)
    verdict = verify(*models, job.recipe, data.run, job.device, dtype, job.progress)
    given = None
    if data.run.evaluation is not None:
        source = job.opened.source(job.device, dtype)
        given = perplexity(source, data.run.evaluation, progress=job.progress)
    before, after, zeros = dense.checkpoint, recovered.checkpoint, count_zeros(recovered)
    missing = dict(verdict.not_measured)
    peak = peak_memory_bytes()
    if peak is None:
        missing["peak_memory_bytes"] = "this system does not tell"
    report = Report(
        model=dense.name,
        family=job.opened.anatomy.family,
        method=job.method.id,
        pattern=RECOVERY,
        allocation="uniform",
        options=job.method.model_dump(mode="json"),
        sparsity_requested=0,
        sparsity=0,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        nonzero_parameters_before=before.parameters - count_zeros(dense),
        nonzero_parameters_after=after.parameters - zeros,
        bytes_before=before.nbytes,
        bytes_after=after.nbytes,
        **verdict.values,
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak,
        protocol=Protocol(**verdict.protocol) if verdict.protocol else None,
        seed=job.recipe.seed,
        versions=versions(),
        machine=Machine(**machine_facts()),
        date=datetime.now(timezone.utc),
        command=command,
        fingerprint=digest(fingerprint),
        effect=_effect(job.opened.checkpoint, after, zeros, verdict),
        loads_in=found_to_load(recovered, try_it=job.recipe.check_loading),
        loss_definition=LOSS,
        layers=mended.layers,
        recovery=_recovery(job, data, mended, given),
        storage=storage_facts(after, job.recipe.format),
        runtime=Runtime(**verdict.runtime) if verdict.runtime else None,
        warnings=mended.warnings,
        not_measured=missing,
    )
    return report.model_copy(update={"stages": [*stages, report.as_stage()] if stages else []})


def _effect(given: Checkpoint, recovered: Checkpoint, zeros: int, verdict: Verdict) -> str:
    if not recovered.formats:
        return UNPACKED if given.formats else EFFECT
    return effect(
        "unstructured",
        zeros / recovered.parameters,
        storage=config_entry(recovered.formats)["format"],
        bytes_before=recovered.dense_nbytes,
        bytes_after=recovered.nbytes,
        loaded=verdict.runtime["after"] if verdict.runtime else None,
    )


def _recovery(job: Mending, data: RecoveryData, mended: Mended, given: float | None) -> Recovery:
    curve = mended.curve
    length, batch_size = data.training.length, job.recipe.recover.batch_size
    facts = Recovery(
        how=job.method.id,
        teacher=job.teacher.name if job.teacher else None,
        text=data.training.source,
        text_sha256=data.training.sha256,
        tokens=data.training.tokens,
        distinct_tokens=data.training.tokens,
        trained_parameters=mended.trained,
        perplexity_given=given,
    )
    if curve is None:
        return facts
    seen = curve.step * batch_size * length
    looks = [Look(tokens=look.step * batch_size * length, **vars(look)) for look in curve.looks]
    return facts.model_copy(
        update={
            "tokens": seen,
            "distinct_tokens": min(seen, data.training.tokens),
            "steps": curve.step,
            "best_step": curve.best_step,
            "stopped_early": curve.stopped,
            "training_seconds": round(curve.seconds, 3),
            "looks": looks,
        }
    )
