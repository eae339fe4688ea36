"""compare.html: several runs in one picture, apart where they were not measured alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from secateur.report.facets import PERPLEXITY, Looks, facet
from secateur.report.markup import Markup, Node, element
from secateur.report.numbers import duration, number, percent, size
from secateur.report.page import absent, data, page, section, table
from secateur.report.runs import Run, differences, grouped, load_runs

__all__ = ["compare", "render"]

_COLUMNS = (
    ("Removed", "sparsity", percent),
    ("Files", "bytes_after", size),
    ("Perplexity", "perplexity_after", number),
    ("Dense", "perplexity_before", number),
    ("KL", "kl_divergence", number),
    ("Top-1", "top1_agreement", percent),
    ("Prefill, tokens/s", "prefill_tokens_per_second_after", number),
    ("Decode, tokens/s", "decode_tokens_per_second_after", number),
    ("Time", "seconds", duration),
    ("Peak memory", "peak_memory_bytes", size),
)


def compare(paths: Sequence[str | Path]) -> str:
    """The page for run folders (or report.json paths). Raises `InputError` for one without a valid report."""
    return render(load_runs(paths))


def render(runs: Sequence[Run]) -> str:
    """The page for runs that are loaded already."""
    title = f"{len(runs)} runs compared" if len(runs) > 1 else "One run"
    facets = list(grouped([run for run in runs if run.protocol], lambda run: run.protocol).values())
    looks = Looks(runs)
    body = [
        _header(title, runs, facets),
        [
            facet(group, f"Protocol {index}" if facets[1:] else "Quality", looks)
            for index, group in enumerate(facets, 1)
        ],
        section("Every run", _table(runs, facets), note="Choose a column to sort by it."),
    ]
    return page(f"{title} · secateur", body)


def _header(title: str, runs: Sequence[Run], facets: list[list[Run]]) -> Markup:
    findings = [element("li", words) for words in (*_best(facets), _smallest(runs))]
    warnings = [element("li", words) for words in _warnings(runs, facets)]
    models = ", ".join(dict.fromkeys(run.report.name for run in runs))
    notice = element("aside", element("h3", "Not alike"), element("ul", warnings), aria_label="Notices")
    return element(
        "header",
        element("p", "secateur compare"),
        element("h1", title),
        element("p", models, class_="models"),
        element("ul", findings, class_="verdict"),
        notice if warnings else None,
    )


def _best(facets: list[list[Run]]) -> Iterator[str]:
    """At each budget that two runs of a model share under one protocol: the one that loses least."""
    for index, facet_runs in enumerate(facets, 1):
        where = f"Under protocol {index}, best" if facets[1:] else "Best"
        for (_, budget), group in grouped(facet_runs, _budget).items():
            known = [(value, run) for run in group if (value := PERPLEXITY.drawable(run.report)) is not None]
            if len(known) > 1:
                value, run = min(known, key=lambda pair: pair[0])
                dense = run.report.perplexity_before
                price = f"perplexity {number(value)}" + ("" if dense is None else f" (dense {number(dense)})")
                yield f"{where} at {budget}: {run.label}, {price}."


def _budget(run: Run) -> tuple[str, str]:
    report = run.report
    fixed = ":" in report.pattern
    return report.model, report.pattern if fixed else percent(report.sparsity_requested)


def _smallest(runs: Sequence[Run]) -> str:
    ratio, run = min(
        ((run.report.bytes_after / max(1, run.report.bytes_before), run) for run in runs), key=lambda p: p[0]
    )
    if ratio > 0.995:
        return "No run is smaller on disk than its dense model."
    return f"Smallest against its dense model: {run.label}, {percent(ratio)} of the bytes."


def _warnings(runs: Sequence[Run], facets: list[list[Run]]) -> Iterator[str]:
    if facets[1:]:
        protocols = [group[0].report.protocol for group in facets]
        differ = differences([protocol for protocol in protocols if protocol])
        yield (
            f"Quality was measured under {len(facets)} protocols that differ in {differ}. "
            "Their numbers cannot be compared, so each protocol has pictures of its own."
        )
    if len({run.machine for run in runs if run.report.decode_tokens_per_second_after is not None}) > 1:
        yield "Speed was measured on different machines, so each machine has pictures of its own."
    if any(len({run.report.model for run in group}) > 1 for group in facets):
        yield "The runs prune different models; KL divergence compares each with its own dense model."
    without = [run.label for run in runs if not run.protocol]
    if without:
        yield f"In no picture, because quality was not measured: {', '.join(without)}."


def _table(runs: Sequence[Run], facets: list[list[Run]]) -> Markup:
    protocols = {group[0].protocol: index for index, group in enumerate(facets, 1)}
    several, models = facets[1:] != [], len({run.report.model for run in runs}) > 1
    rows: list[list[Node]] = []
    for run in runs:
        values = [(getattr(run.report, key), show) for _, key, show in _COLUMNS]
        numbers = [absent() if value is None else data(show(value), value) for value, show in values]
        index = protocols.get(run.protocol)
        protocol = [absent("none") if index is None else data(str(index), index)] if several else []
        rows.append(
            [
                run.label,
                data(str(run.number), run.number),
                *protocol,
                *([run.report.name] if models else []),
                *numbers,
            ]
        )
    extra = [*(["Protocol"] if several else []), *(["Model"] if models else [])]
    return table(["Run", "No.", *extra, *(name for name, _, _ in _COLUMNS)], rows, kind="sortable")
