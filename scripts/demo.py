"""`make demo`: prune the bundled model with three methods, judge each, and draw them in one page.

    python scripts/demo.py --out demo-output

Everything happens offline and takes a few minutes on two cores. The folders stay for a look around.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import secateur
from secateur.cli.progress import progress_for
from secateur.report.model import Report

METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("unstructured", "2:4")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--samples", type=int, default=48, help="calibration windows, sampled from the model")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    return parser.parse_args()


def prune_all(arguments: argparse.Namespace, console: Console) -> list[Report]:
    """Six runs under one protocol: the same windows, the same seed."""
    reports = []
    for pattern in PATTERNS:
        for method in METHODS:
            folder = arguments.out / f"{method}-{pattern.replace(':', 'of')}"
            console.print(f"[bold]{method}[/bold] at 50%, {pattern} -> {folder}")
            reports.append(
                secateur.prune(
                    "seedling",
                    folder,
                    method=method,
                    sparsity=0.5,
                    pattern=pattern,
                    calibration={"samples": arguments.samples, "length": arguments.length},
                    evaluation_windows=32,
                    progress=progress_for(),
                )
            )
    return reports


def table_of(reports: list[Report]) -> Table:
    """Before and after, a row a run."""
    heads = ("method", "pattern", "sparsity", "perplexity", "KL", "top-1", "MB", "decode/s")
    table = Table(*heads, box=None, header_style="bold")
    first = reports[0]
    speed = first.decode_tokens_per_second_before
    table.add_row(
        "dense",
        "",
        "0%",
        f"{first.perplexity_before:.2f}",
        "0",
        "100%",
        f"{first.bytes_before / 1e6:.1f}",
        f"{speed:.0f}",
    )
    for report in reports:
        table.add_row(
            report.method,
            report.pattern,
            f"{report.sparsity:.1%}",
            f"{report.perplexity_after:.2f}",
            f"{report.kl_divergence:.3f}",
            f"{report.top1_agreement:.1%}",
            f"{report.bytes_after / 1e6:.1f}",
            f"{report.decode_tokens_per_second_after:.0f}",
        )
    return table


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    started = time.time()
    reports = prune_all(arguments, console)
    folders = sorted(path for path in arguments.out.iterdir() if path.is_dir())
    page = arguments.out / "compare.html"
    secateur.compare(folders, page)
    console.print(table_of(reports))
    console.print(reports[0].effect)
    console.print(f"Pages: {page} and report.html in each folder. {time.time() - started:.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
