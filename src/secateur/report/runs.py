"""Several reports side by side: labels that tell them apart, and groups that were measured alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from secateur.core.errors import InputError
from secateur.report.model import Protocol, Report
from secateur.report.numbers import percent

__all__ = ["Run", "differences", "grouped", "load_runs"]

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
_WORDS = {
    "text_sha256": "text",
    "window": "window",
    "stride": "stride",
    "windows": "number of windows",
    "dtype": "precision",
    "tokenizer_sha256": "tokenizer",
}
"""What must be equal for two qualities to be compared, and what people call it."""


@dataclass(frozen=True, eq=False)
class Run:
    """A report in a comparison. `number` counts from 1, `series` is the label without the sparsity."""

    number: int
    label: str
    series: str
    report: Report

    @property
    def protocol(self) -> tuple[object, ...]:
        """Equal for runs whose quality can share an axis."""
        protocol = self.report.protocol
        return tuple(getattr(protocol, key) for key in _WORDS) if protocol else ()

    @property
    def machine(self) -> tuple[object, ...]:
        """Equal for runs whose speed can share an axis."""
        machine = self.report.machine
        return (machine.cpu, machine.cores, machine.gpu)


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run folders or report.json files. Raises `InputError` for one without a valid report."""
    if not paths:
        raise InputError("no run to compare", "folders that `secateur prune` wrote", "name at least one")
    reports = [Report.load(path) for path in paths]
    series = _series(reports)
    labels = _labels(reports, series, [_folder(Path(path)) for path in paths])
    entries = enumerate(zip(labels, series, reports, strict=True), start=1)
    return [Run(index, label, name, report) for index, (label, name, report) in entries]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, both in the order of their first appearance."""
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def differences(protocols: Sequence[Protocol]) -> str:
    """`window (256, 2048) and precision (float32, bfloat16)`: where protocols are not the same."""
    parts = []
    for key, word in _WORDS.items():
        values = dict.fromkeys(str(getattr(protocol, key)) for protocol in protocols)
        if len(values) > 1:
            shown = ", ".join(v[:8] if key.endswith("sha256") else v for v in values)
            parts.append(f"{word} ({shown})")
    return " and ".join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])


def _series(reports: Sequence[Report]) -> list[str]:
    models = {report.model for report in reports}
    clash = len({report.name for report in reports}) < len(models)
    return [
        " ".join(
            [
                *([report.model if clash else report.name] if len(models) > 1 else []),
                report.method,
                *([report.pattern] if report.pattern != "unstructured" else []),
                *([report.allocation] if report.allocation != "uniform" else []),
            ]
        )
        for report in reports
    ]


def _labels(reports: Sequence[Report], series: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Series and sparsity; where that is the same twice, also what tells the runs apart."""
    labels = [_label(name, report) for name, report in zip(series, reports, strict=True)]
    calibrations = [f"on {report.calibration.source}" if report.calibration else "" for report in reports]
    seeds = [f"seed {report.seed}" for report in reports]
    numbers = [f"({index})" for index, _ in enumerate(reports, start=1)]
    for words in (calibrations, seeds, list(folders), numbers):
        labels = _told_apart(labels, words)
    return labels


def _label(series: str, report: Report) -> str:
    if report.precision:
        return f"{series} {report.precision.stored_bits_matrices or 0:.2f} bits"
    return series if ":" in report.pattern else f"{series} {percent(report.sparsity_requested)}"


def _told_apart(labels: list[str], words: list[str]) -> list[str]:
    """Append a word to labels that occur more than once, where the words differ."""
    words_of = grouped(range(len(labels)), lambda index: labels[index])
    told = list(labels)
    for indices in words_of.values():
        if len({words[index] for index in indices}) > 1:
            for index in indices:
                told[index] = f"{labels[index]} {words[index]}".rstrip()
    return told


def _folder(path: Path) -> str:
    place = path.absolute()
    return f"in {(place if path.is_dir() else place.parent).name}"
