"""Prune a 5 GB checkpoint with little memory: peak resident memory and time a block, as `wait4` reports them.

    python benchmarks/memory.py --work FOLDER --out docs/evidence/memory.md

A synthetic bf16 Llama (hidden 2048, FFN 8192, 36 blocks) is written first, shard by shard. Then
`secateur prune` runs in a process of its own, whose peak resident memory, interpreter and torch included,
is what counts.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from synthetic import PRESETS, SENTENCES, write_checkpoint
from tables import write_table

from secateur.evaluation.memory import run_measured
from secateur.report.model import Report

LIMITS = {"wanda": 1.6e9, "sparsegpt": 3.0e9}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a disk with 20 GB free")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--preset", choices=PRESETS, default="5gb")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = arguments.work / f"synthetic-{arguments.preset}"
    if not model.exists():
        write_checkpoint(model, PRESETS[arguments.preset])
    text = arguments.work / "text.txt"
    text.write_text("\n".join(SENTENCES) * 2000, encoding="utf-8")
    rows = [measure(arguments, model, text, method) for method in arguments.methods.split(",")]
    heads = ["method", "weights", "peak resident", "asked for", "total, s", "a block, s", "reached"]
    notes = (
        f"{arguments.samples} calibration windows of {arguments.length} tokens, batch size 1, float32 on the "
        "CPU, 50% unstructured; 2 evaluation windows before and after."
    )
    write_table("Memory of a 5 GB checkpoint", heads, rows, notes=notes, out=arguments.out)
    return int(any(row[-1] == "no" for row in rows))


def measure(arguments: argparse.Namespace, model: Path, text: Path, method: str) -> list[str]:
    out = arguments.work / f"pruned-{method}"
    shutil.rmtree(out, ignore_errors=True)
    data = [
        "--calibration",
        str(text),
        "--samples",
        str(arguments.samples),
        "--length",
        str(arguments.length),
    ]
    plain = ["--batch-size", "1", "--evaluation-windows", "2", "--no-measure-speed"]
    command = [sys.executable, "-m", "secateur", "prune", str(model), "-o", str(out), "--method", method]
    child = run_measured([*command, "--sparsity", "0.5", *data, *plain])
    report = Report.load(out)
    block = statistics.median(row.seconds or 0 for row in report.blocks)
    limit = LIMITS.get(method, 3.0e9)
    shutil.rmtree(out)
    return [
        method,
        f"{report.bytes_before / 1e9:.2f} GB",
        f"{child.peak_bytes / 1e9:.2f} GB",
        f"{limit / 1e9:.1f} GB",
        f"{child.seconds:.0f}",
        f"{block:.1f}",
        "yes" if child.peak_bytes <= limit else "no",
    ]


if __name__ == "__main__":
    sys.exit(main())
