"""What removing heads and channels gives: bytes and speed of a 1.1-billion-parameter model, memory of a run.

    python benchmarks/smaller.py --work FOLDER --out docs/evidence/smaller.md

Speed: a synthetic bf16 Llama (TinyLlama's sizes) loses a share of the parameters in its blocks; dense and
pruned model then prefill and decode in turn, batch 1, in one process; with `--llama PYTHON`, an interpreter
that has llama-cpp-python, as GGUF files in llama.cpp too. Memory: the peak resident memory of
`secateur prune` on a 5 GB checkpoint in a process of its own, as `wait4` reports it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gguf_llama import run_worker
from synthetic import PRESETS, SENTENCES, Shape, write_checkpoint
from tables import write_table
from transformers import AutoModelForCausalLM

import secateur
from secateur.evaluation.memory import run_measured
from secateur.evaluation.speed import compare_speed
from secateur.report.model import Report

ONE_BILLION = Shape(hidden=2048, ffn=5632, blocks=22, heads=32, kv_heads=4, vocab=32000)
MEMORY_LIMIT = 2.0e9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a disk with 20 GB free")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode-budgets", type=float, nargs="*", default=[], help="such as 0.8 0.6")
    parser.add_argument("--llama", metavar="PYTHON", help="also in llama.cpp, by this interpreter")
    parser.add_argument("--memory-methods", default="flap,osscar", help="comma separated; empty for none")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def cut(arguments: argparse.Namespace, dense: Path, small: Path, **budget: Any) -> Report:
    shutil.rmtree(small, ignore_errors=True)
    report: Report = secateur.prune(
        str(dense),
        small,
        method="magnitude-structure",
        evaluation_windows=0,
        measure_speed=False,
        calibration={"source": str(text(arguments.work)), "samples": 1, "length": 64},
        **budget,
    )
    return report


def speed_rows(arguments: argparse.Namespace) -> list[list[str]]:
    dense, small = written(arguments.work, "1b", ONE_BILLION), arguments.work / "smaller-1b"
    report = cut(arguments, dense, small, sparsity=arguments.sparsity)
    before, after = report.bytes_before / 1e9, report.bytes_after / 1e9
    rows = [["file, GB", f"{before:.3f}", f"{after:.3f}", f"{before / after:.2f}", ""]]
    rows += torch_rows(dense, small, arguments.repeats)
    if arguments.llama:
        rows += llama_rows(dense, small, arguments)
    shutil.rmtree(small)
    return rows


def torch_rows(dense: Path, small: Path, repeats: int) -> list[list[str]]:
    """Tokens a second of transformers, in bf16."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval() for folder in (small, dense)
    ]
    found = compare_speed(*models, batch_sizes=(1,), repeats=repeats)
    return [
        [
            ratio.phase,
            f"{was.median:.1f}",
            f"{now.median:.1f}",
            f"{ratio.ratio:.2f}",
            f"{ratio.min:.2f} to {ratio.max:.2f}",
        ]
        for ratio, now, was in zip(found.ratios, found.a.measurements, found.b.measurements, strict=True)
    ]


def llama_rows(dense: Path, small: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """Tokens a second of processor time in llama.cpp, one thread, f16 files; the two models in turn."""
    files = []
    for name, folder in (("dense", dense), ("small", small)):
        file = arguments.work / f"{name}.gguf"
        file.unlink(missing_ok=True)
        secateur.export(folder, file, dtype="f16")
        files.append(file)
    asked = {"ids": list(range(1, 129)), "new_tokens": 32, "repeats": 1}
    times = [
        [run_worker(arguments.llama, {**asked, "path": str(file)}) for file in files]
        for _ in range(arguments.repeats)
    ]
    sizes = [file.stat().st_size / 1e9 for file in files]
    rows = [["GGUF f16, GB", *(f"{size:.3f}" for size in sizes), f"{sizes[0] / sizes[1]:.2f}", ""]]
    for phase in ("prefill", "decode"):
        was, now = ([pair[at][phase] for pair in times] for at in (0, 1))
        ratios = [after / before for before, after in zip(was, now, strict=True)]
        middle = [f"{median(found):.1f}" for found in (was, now)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([f"llama.cpp {phase}", *middle, f"{median(ratios):.2f}", spread])
    for file in files:
        file.unlink()
    return rows


def budget_rows(arguments: argparse.Namespace) -> list[list[str]]:
    """Time of a decode step: what was allowed, what the plan came to, what the result takes."""
    dense, small = written(arguments.work, "1b", ONE_BILLION), arguments.work / "smaller-1b"
    rows = []
    for share in arguments.decode_budgets:
        report = cut(arguments, dense, small, budget=f"decode={share}x")
        structure = report.structure
        assert structure is not None
        budget = structure.budget
        assert budget is not None
        _, measured = torch_rows(dense, small, arguments.repeats)
        shutil.rmtree(small)
        planned = budget.planned / budget.dense
        was, now, ratio = (float(cell) for cell in measured[1:4])
        took = f"{1e3 / was:.1f} ms to {1e3 / now:.1f} ms"
        rows.append([f"{share}", f"{report.sparsity:.1%}", f"{planned:.3f}", f"{1 / ratio:.3f}", took])
    return rows


def memory_rows(arguments: argparse.Namespace) -> list[list[str]]:
    model, rows = written(arguments.work, "5gb", PRESETS["5gb"]), []
    for method in filter(None, arguments.memory_methods.split(",")):
        out = arguments.work / f"smaller-{method}"
        shutil.rmtree(out, ignore_errors=True)
        child = run_measured(
            [
                *(sys.executable, "-m", "secateur", "prune", str(model), "-o", str(out)),
                *("--method", method, "--sparsity", str(arguments.sparsity), "--batch-size", "1"),
                *("--calibration", str(text(arguments.work)), "--samples", str(arguments.samples)),
                *("--length", str(arguments.length), "--evaluation-windows", "2", "--no-measure-speed"),
            ]
        )
        report = Report.load(out)
        shutil.rmtree(out)
        size = f"{report.bytes_before / 1e9:.2f} to {report.bytes_after / 1e9:.2f} GB"
        reached = "yes" if child.peak_bytes <= MEMORY_LIMIT else "no"
        rows.append(
            [f"peak of {method}", size, f"{child.peak_bytes / 1e9:.2f} GB", f"{child.seconds:.0f} s", reached]
        )
    return rows


def written(work: Path, name: str, shape: Shape) -> Path:
    folder = work / f"synthetic-{name}"
    if not folder.exists():
        write_checkpoint(folder, shape)
    return folder


def text(work: Path) -> Path:
    file = work / "text.txt"
    if not file.exists():
        file.write_text("\n".join(SENTENCES) * 2000, encoding="utf-8")
    return file


def main() -> None:
    arguments = parse_arguments()
    if arguments.speed:
        notes = (
            f"{ONE_BILLION.parameters:,} parameters, bf16, {torch.get_num_threads()} threads, "
            f"{arguments.sparsity:.0%} of the parameters in blocks removed, the same share of heads and "
            f"channels in every block; {arguments.repeats} pairs in turn, 128 prompt tokens and 32 new ones."
        )
        heads = ["what", "dense", "pruned", "ratio", "spread"]
        write_table("Smaller and faster", heads, speed_rows(arguments), notes=notes, out=arguments.out)
    if rows := budget_rows(arguments):
        notes = (
            "Budgets as a share of the dense model's decode step, one sequence. The plan is made from "
            "narrowed copies that are timed beforehand; the result is timed in turn with the dense model."
        )
        heads = ["budget", "sparsity", "planned", "measured", "a token"]
        out = arguments.out and arguments.out.with_stem(f"{arguments.out.stem}-budgets")
        write_table("Decode budgets", heads, rows, notes=notes, out=out)
    if rows := memory_rows(arguments):
        notes = (
            f"{arguments.samples} calibration windows of {arguments.length} tokens, batch size 1, float32; "
            f"the limit is {MEMORY_LIMIT / 1e9:g} GB."
        )
        out = arguments.out and arguments.out.with_stem(f"{arguments.out.stem}-memory")
        heads = ["what", "weights", "peak resident", "time", "within the limit"]
        write_table("Memory of structured pruning", heads, rows, notes=notes, out=out)


if __name__ == "__main__":
    main()
