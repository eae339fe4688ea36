"""Tables of the benchmarks: to the terminal, and as Markdown with machine and versions."""

from __future__ import annotations

import datetime
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from secateur.evaluation.memory import machine_facts

__all__ = ["mean_and_range", "write_table"]


def mean_and_range(values: Sequence[float]) -> str:
    """A cell over seeds: the mean and, in brackets, half the range; a dash for none."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f} ({(max(values) - min(values)) / 2:.2f})"


def write_table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    notes: str = "",
    out: Path | None = None,
    command: str | None = None,
) -> None:
    """Print a Markdown table, and write it to `out` with what is needed to repeat it."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    table = "\n".join(lines)
    print(f"\n{table}\n\n{notes}\n")
    if out is None:
        return
    machine = machine_facts()
    shown = command or "python " + " ".join(Path(word).name if "/" in word else word for word in sys.argv)
    facts = [
        f"- command: `{shown}`",
        f"- machine: {machine.get('cpu')}, {machine.get('cores')} cores, "
        f"{(machine.get('memory_bytes') or 0) / 2**30:.0f} GiB, GPU: {machine.get('gpu') or 'none'}",
        f"- torch {torch.__version__}, transformers {transformers.__version__}, {datetime.date.today()}",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"# {title}\n\n" + "\n".join(facts) + f"\n\n{table}\n\n{notes}\n", encoding="utf-8")
