from __future__ import annotations

import io

from rich.console import Console

from secateur.report.model import Report
from secateur.report.text import before_after
from secateur.report.verdict import rows, verdict

from .samples import layer_rows, sample


def printed(report: Report) -> str:
    file = io.StringIO()
    Console(width=400, file=file).print(before_after(report))
    return file.getvalue()


def test_every_row_is_printed_with_words_for_colours() -> None:
    report = sample(2)
    text = printed(report)
    assert verdict(report) in text
    assert report.effect in text
    for row in rows(report):
        assert all(word in text for word in (row.label, *row.cells(), row.change, row.outcome))


def test_reasons_warnings_and_fallbacks_are_printed() -> None:
    text = printed(sample(5, kl_divergence=None, warnings=["careful"], layers=layer_rows(5, fallbacks=True)))
    assert "no kl_divergence today" in text
    assert "warning: careful" in text
    assert "done differently in 2 of 35 matrices: damping raised" in text


def test_names_are_not_read_as_rich_markup() -> None:
    nasty = "[red]x[/nothing]"
    assert nasty in printed(sample(1, model=nasty))
    assert f"warning: {nasty}" in printed(sample(1, warnings=[nasty]))
