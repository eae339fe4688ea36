"""How a run was made: everything needed to repeat it or to doubt it."""

from __future__ import annotations

from collections.abc import Callable

from secateur.report.markup import Markup, Node, element
from secateur.report.model import RECOVERY, Recovery, Report
from secateur.report.numbers import duration, percent, size
from secateur.report.numbers import number as number_of
from secateur.report.page import data, facts, section

__all__ = ["details"]

Pairs = list[tuple[str, Node]]


def details(report: Report) -> Markup:
    """Run, calibration, protocol, machine and versions as lists of facts."""
    groups: list[tuple[str, Pairs]] = [
        ("Run", _run(report)),
        ("Protocol of the evaluation", _protocol(report)),
        ("Calibration", _calibration(report)),
        ("Machine", _machine(report)),
        ("Versions", list(report.versions.items())),
    ]
    if report.recovery:
        groups.insert(1, ("Recovery", _recovery(report.recovery)))
    if report.loads_in:
        groups.insert(1, ("Loads in", list(report.loads_in.items())))
    if report.stages:
        groups.insert(1, ("Stages", _stages(report)))
    cards = [element("div", element("h3", title), facts(pairs)) for title, pairs in groups]
    return section("How it was made", element("div", cards, class_="cards"))


def _run(report: Report) -> Pairs:
    options = ", ".join(f"{name}={value}" for name, value in report.options.items())
    return [
        ("Model", report.model),
        ("Family", report.family),
        ("Method", report.method),
        ("Pattern", report.pattern),
        ("Allocation", report.allocation),
        ("Options", options or "the method's own"),
        *([("Budget", report.budget)] if report.budget else []),
        *_bits(report),
        ("Sparsity asked for", data(percent(report.sparsity_requested), report.sparsity_requested)),
        ("Sparsity reached", data(percent(report.sparsity), report.sparsity)),
        *_storage(report),
        ("Seed", data(str(report.seed), report.seed)),
        ("Time", _known(report, "seconds", duration)),
        ("Peak memory", _known(report, "peak_memory_bytes", size)),
        ("Date", report.date.isoformat(sep=" ", timespec="seconds")),
        ("Fingerprint", element("code", report.fingerprint)),
    ]


def _bits(report: Report) -> Pairs:
    """Average bits of a weight, of its code and of all that is stored of it."""
    found = report.precision
    if found is None:
        return []
    pairs = [
        ("Bits of experts", found.bits_experts, found.stored_bits_experts),
        ("Bits of all rounded matrices", found.bits_matrices, found.stored_bits_matrices),
    ]
    return [
        (name, f"{bits:.2f}, stored {stored:.2f}")
        for name, bits, stored in pairs
        if bits is not None and stored is not None
    ]


def _storage(report: Report) -> Pairs:
    """How many tensors are packed, what they take unpacked, and how the model was loaded to be timed."""
    stored, runtime = report.storage, report.runtime
    timed: Pairs = [("Timed", runtime.after)] if runtime else []
    if stored is None:
        return timed
    counts = f"{stored.tensors_packed} tensors packed, {stored.tensors_plain} as they are"
    return [("Stored as", f"{stored.format}: {counts}; {size(stored.dense_bytes)} unpacked"), *timed]


def _stages(report: Report) -> Pairs:
    """Of a chain, what each stage removed and left."""
    return [
        (
            f"{number}. {stage.method}",
            ("" if stage.pattern == RECOVERY else f"{percent(stage.sparsity)} removed, ")
            + size(stage.bytes_after)
            + ("" if stage.perplexity_after is None else f", perplexity {number_of(stage.perplexity_after)}"),
        )
        for number, stage in enumerate(report.stages, 1)
    ]


def _recovery(recovery: Recovery) -> Pairs:
    """What a model was mended with."""
    given = recovery.perplexity_given
    return [
        ("How", recovery.how),
        ("Teacher", recovery.teacher or "none"),
        ("Text", recovery.text),
        ("Text SHA-256", element("code", recovery.text_sha256)),
        ("Learnt from", data(f"{recovery.tokens:,} tokens", recovery.tokens)),
        ("Different ones", data(f"{recovery.distinct_tokens:,} tokens", recovery.distinct_tokens)),
        ("Trained", data(f"{recovery.trained_parameters:,} parameters", recovery.trained_parameters)),
        ("Steps", f"{recovery.steps:,}" + (", ended early" if recovery.stopped_early else "")),
        ("Best after", f"{recovery.best_step:,} steps"),
        ("Training time", duration(recovery.training_seconds)),
        ("Perplexity as given", "not measured" if given is None else data(number_of(given), given)),
    ]


def _known(report: Report, key: str, show: Callable[[float], str]) -> Node:
    value = getattr(report, key)
    return f"not measured: {report.not_measured[key]}" if value is None else data(show(value), value)


def _protocol(report: Report) -> Pairs:
    protocol = report.protocol
    if protocol is None:
        return [("Text", "none: quality was not measured")]
    return [
        ("Text", protocol.text or "not named"),
        ("Text SHA-256", element("code", protocol.text_sha256)),
        ("Split", protocol.split or "whole file"),
        ("Window", data(f"{protocol.window:,} tokens", protocol.window)),
        ("Stride", data(f"{protocol.stride:,} tokens", protocol.stride)),
        ("Windows", "all" if protocol.windows is None else data(f"{protocol.windows:,}", protocol.windows)),
        ("Precision", protocol.dtype),
        ("Tokenizer SHA-256", element("code", protocol.tokenizer_sha256)),
    ]


def _calibration(report: Report) -> Pairs:
    calibration = report.calibration
    if calibration is None:
        return [("Text", "none: this method looks at weights only")]
    tokens = calibration.windows * calibration.length
    return [
        ("Text", calibration.source),
        ("Windows", data(f"{calibration.windows:,}", calibration.windows)),
        ("Length", data(f"{calibration.length:,} tokens", calibration.length)),
        ("In all", data(f"{tokens:,} tokens", tokens)),
        ("SHA-256", element("code", calibration.sha256)),
    ]


def _machine(report: Report) -> Pairs:
    machine = report.machine
    memory = machine.memory_bytes
    threads = machine.threads
    return [
        ("Processor", machine.cpu or "unknown"),
        ("Cores", "unknown" if machine.cores is None else data(str(machine.cores), machine.cores)),
        ("Memory", "unknown" if memory is None else data(size(memory), memory)),
        ("Threads", "unknown" if threads is None else data(str(threads), threads)),
        ("GPU", machine.gpu or "none"),
    ]
