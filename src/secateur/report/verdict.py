"""The before/after rows and the one sentence above them, for the page, the card and the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from secateur.report.model import RECOVERY, Report, Stage
from secateur.report.numbers import change, count, number, percent, size

__all__ = ["Outcome", "Row", "rows", "verdict"]

Outcome = Literal["better", "worse", "same", ""]


@dataclass(frozen=True)
class _Measure:
    """`lower_is_better` is None where neither is; up to `tolerance`, relative, two values are the same."""

    key: str
    label: str
    show: Callable[[float], str]
    lower_is_better: bool | None
    tolerance: float


_PAIRS = (
    _Measure("bytes", "Weight files", size, True, 0.005),
    _Measure("parameters", "Parameters", count, True, 0.0),
    _Measure("nonzero_parameters", "Non-zero parameters", count, None, 0.0),
    _Measure("perplexity", "Perplexity", number, True, 0.001),
    _Measure("prefill_tokens_per_second", "Prefill, tokens a second", number, False, 0.1),
    _Measure("decode_tokens_per_second", "Decode, tokens a second", number, False, 0.1),
)
_TO_DENSE = (
    _Measure("kl_divergence", "KL divergence from dense, nats a token", number, True, 0.0),
    _Measure("top1_agreement", "Same first choice as dense", percent, False, 0.0),
)


@dataclass(frozen=True)
class Row:
    """One line of the before/after table.

    `before` and `after` are None when they were not measured; `reason` then says why. A measure taken
    `against_dense` has the dense model itself in the first column.
    """

    key: str
    label: str
    before: float | None
    after: float | None
    show: Callable[[float], str]
    change: str = ""
    outcome: Outcome = ""
    reason: str = ""
    against_dense: bool = False

    def cells(self) -> tuple[str, str]:
        """Both values as text."""
        missing = "not measured"
        first = missing if self.before is None else self.show(self.before)
        return (
            "reference" if self.against_dense else first,
            missing if self.after is None else self.show(self.after),
        )


def _outcome(measure: _Measure, before: float, after: float) -> Outcome:
    if measure.lower_is_better is None:
        return ""
    if math.isnan(before) or math.isnan(after):
        return "" if math.isnan(before) else "worse"
    if before == after or abs(after - before) <= measure.tolerance * abs(before):
        return "same"
    return "better" if (after < before) == measure.lower_is_better else "worse"


def _pair(report: Report, measure: _Measure) -> Row:
    keys = [f"{measure.key}_{when}" for when in ("before", "after")]
    before, after = (getattr(report, key) for key in keys)
    row = Row(measure.key, measure.label, before, after, measure.show)
    if before is None or after is None:
        reasons = dict.fromkeys(report.not_measured[key] for key in keys if key in report.not_measured)
        return replace(row, reason="; ".join(reasons))
    return replace(row, change=change(before, after), outcome=_outcome(measure, before, after))


def _in_memory(report: Report) -> list[Row]:
    """Memory of the weights, where the models were loaded."""
    if report.runtime is None:
        return []
    before, after = float(report.runtime.weight_bytes_before), float(report.runtime.weight_bytes_after)
    label = f"Weights in memory, in {report.runtime.dtype}"
    measure = _Measure("weight_bytes", label, size, True, 0.005)
    words = change(before, after), _outcome(measure, before, after)
    return [Row(measure.key, measure.label, before, after, size, *words)]


def _against_dense(report: Report, measure: _Measure) -> Row:
    after = getattr(report, measure.key)
    perfect = 0.0 if measure.lower_is_better else 1.0
    row = Row(measure.key, measure.label, perfect, after, measure.show, against_dense=True)
    if after is None:
        return replace(row, reason=report.not_measured[measure.key])
    return replace(row, outcome=_outcome(measure, perfect, after))


def _recovered(report: Report) -> list[Row]:
    """What a recovery brought, where the table compares with another model than the one it was given."""
    given = report.recovery.perplexity_given if report.recovery else None
    after = report.perplexity_after
    if given is None or after is None or given == report.perplexity_before:
        return []
    measure = _PAIRS[3]
    words = change(given, after), _outcome(measure, given, after)
    return [Row("recovered", "Perplexity, pruned and then mended", given, after, measure.show, *words)]


def rows(report: Report) -> list[Row]:
    """The before/after table: size first, then quality, then speed."""
    pairs = [_pair(report, measure) for measure in _PAIRS]
    return [
        *pairs[:1],
        *_in_memory(report),
        *pairs[1:4],
        *_recovered(report),
        *(_against_dense(report, measure) for measure in _TO_DENSE),
        *pairs[4:],
    ]


def verdict(report: Report) -> str:
    """One sentence: what was done, what was gained, what was lost."""
    table = {row.key: row for row in rows(report)}
    speed, quality = _speed(table), _quality(table)
    if speed:
        speed += _how_loaded(report)
    if not speed and not quality:
        return f"{_deed(report)}: {_file(table['bytes'])}, and neither speed nor quality was measured."
    claims = f"{speed or 'speed was not measured'}, and {quality or 'quality was not measured'}"
    return f"{_deed(report)}: {_file(table['bytes'])}, {claims}."


def _deed(report: Report) -> str:
    if report.stages:
        return f"{', then '.join(map(_stage, report.stages))} pruned {report.name}"
    if report.recovery:
        return f"{report.method} changed the weights of {report.name}"
    if report.precision:
        bits = report.precision.stored_bits_matrices or 0.0
        return (
            f"{report.method} stored the matrices of {report.name} in {bits:.2f} bits a weight, with scales"
        )
    how = f"in a {report.pattern} pattern" if ":" in report.pattern else "as unstructured zeros"
    what = "prunable weights"
    if report.parameters_after < report.parameters_before:
        how, what = "as whole units", "parameters in blocks"
    if report.pattern == "experts":
        how, what = "whole", "routed experts"
    if report.sparsity and report.nonzero_parameters_after == report.parameters_before:
        how += ", inside a product that has no zeros"
    asked = ""
    if abs(report.sparsity - report.sparsity_requested) > 0.005:
        asked = f" ({percent(report.sparsity_requested)} was asked for)"
    removed = f"removed {percent(report.sparsity)}{asked} of the {what}"
    return f"{report.method} {removed} of {report.name} {how}"


def _stage(stage: Stage) -> str:
    return stage.method if stage.pattern == RECOVERY else f"{stage.method} ({percent(stage.sparsity)})"


def _file(row: Row) -> str:
    before, after = row.cells()
    if row.outcome == "better":
        return f"the file is smaller ({before} before, {after} after)"
    if row.outcome == "worse":
        return f"the file is larger ({before} before, {after} after)"
    return f"the file is not smaller ({before} before and after)"


def _speed(table: dict[str, Row]) -> str:
    known = {word: table[f"{word}_tokens_per_second"] for word in ("prefill", "decode")}
    known = {word: row for word, row in known.items() if row.outcome}
    if not known:
        return ""
    if all(row.outcome == "same" for row in known.values()):
        return f"{' and '.join(known)} {'are' if len(known) > 1 else 'is'} as fast as before"
    words = {"better": "faster", "worse": "slower", "same": "as fast as before"}
    return " and ".join(f"{word} is {words[row.outcome]} ({row.change})" for word, row in known.items())


def _how_loaded(report: Report) -> str:
    """Of packed files that were timed, what their speed is the speed of."""
    packed = report.storage is not None and report.storage.tensors_packed > 0
    return f", loaded {report.runtime.after}" if packed and report.runtime else ""


def _quality(table: dict[str, Row]) -> str:
    row = table["perplexity"]
    before, after = row.cells()
    if row.outcome == "same":
        return f"perplexity stayed at {after}"
    if row.outcome:
        verb = "rose" if row.outcome == "worse" else "fell"
        return f"perplexity {verb} from {before} to {after}" + (f" ({row.change})" if row.change else "")
    agreement = table["top1_agreement"]
    if agreement.after is not None:
        return f"its first choice is that of the dense model for {agreement.cells()[1]} of the tokens"
    return ""
