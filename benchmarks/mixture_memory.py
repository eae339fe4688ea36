"""Remove half of the experts of a mixture that is larger than the memory: peak resident memory, time, bytes.

    python benchmarks/mixture_memory.py --work FOLDER --kill --out docs/evidence/mixture-memory.md

A synthetic bf16 Qwen3-MoE is written first, shard by shard. `secateur prune` runs in a process of its own,
whose peak resident memory, interpreter and torch included, is what counts; with `--kill` it is ended by
SIGKILL after half of the blocks and resumed. Names, shapes, configuration and one block of the result are
then compared with the source by the reader of the `safetensors` package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import BYTES_PER_PARAMETER, PRESETS, SENTENCES, Shape, write_checkpoint
from tables import write_table
from torch import Tensor

from secateur.evaluation.memory import ChildRun, machine_facts, run_measured
from secateur.report.model import Report

SHARE = 0.5
PIECE = 1 << 24
COUNTS = ("num_experts", "num_local_experts")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="on a disk with room for twice the model")
    parser.add_argument("--preset", choices=[name for name in PRESETS if PRESETS[name].experts])
    parser.add_argument("--blocks", type=int, help="instead of the preset's")
    parser.add_argument("--method", default="reap")
    parser.add_argument("--calibration", type=Path, help="a text; a few sentences over and over without one")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="auto", help="to compute in: auto is float32 on the CPU")
    parser.add_argument("--kill", action="store_true", help="end it half-way by SIGKILL, then resume")
    parser.add_argument("--out", type=Path)
    parser.set_defaults(preset="27gb-moe")
    return parser.parse_args()


class Weights(NamedTuple):
    """Tensors of a folder by name, each read when it is asked for, without secateur."""

    folder: Path
    files: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """From the headers of the files themselves."""
        files = {}
        for path in folder.glob("model*.safetensors"):
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path.name)
        return cls(folder, files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for path in sorted(set(self.files.values())):
            with safe_open(self.folder / path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return found

    def read(self, name: str) -> Tensor:
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"wrong: {what}")


def check_result(model: Path, out: Path, shape: Shape) -> str:
    """Compare the result with its source; what was found, for the notes."""
    left = round((1 - SHARE) * shape.experts)
    source, result = Weights.of(model), Weights.of(out)
    require(result.shapes() == expected_shapes(source, left), "names and shapes")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (model, out)]
    counts = {key for key in configs[0] if key in COUNTS}
    require(configs[1] == {**configs[0], **dict.fromkeys(counts, left)}, "config.json")
    middle = shape.blocks // 2
    kept = kept_experts(source, result, middle)
    scores = load_file(out / "scores.safetensors")[f"{middle}.experts"]
    require(
        kept == sorted(scores.argsort(stable=True)[-left:].tolist()), "the experts with the largest scores"
    )
    prefix = f"model.layers.{middle}."
    for new, old in enumerate(kept):
        for part in PROJECTIONS:
            names = [f"{prefix}mlp.experts.{number}.{part}.weight" for number in (old, new)]
            require(source.read(names[0]).equal(result.read(names[1])), names[1])
    attention = [name for name in source.files if name.startswith(f"{prefix}self_attn.")]
    require(all(source.read(name).equal(result.read(name)) for name in attention), "attention")
    return (
        f"Names and shapes of all {len(result.files):,} tensors and `config.json` are those of {left} "
        f"experts. In block {middle} the router rows, the experts and the attention that stay are those of "
        "the source, bit for bit, and the experts are those with the largest scores."
    )


def expected_shapes(source: Weights, left: int) -> dict[str, tuple[int, ...]]:
    """Those of the source without the experts from `left` on."""
    found = {}
    for name, size in source.shapes().items():
        _, is_expert, place = name.partition(".experts.")
        if is_expert and int(place.split(".")[0]) >= left:
            continue
        found[name] = (left, *size[1:]) if name.endswith(".mlp.gate.weight") else size
    return found


def kept_experts(source: Weights, result: Weights, block: int) -> list[int]:
    """Which rows of the source's router those of the result are."""
    old, new = (weights.read(f"model.layers.{block}.mlp.gate.weight") for weights in (source, result))
    return [int((old == row).all(1).nonzero().squeeze()) for row in new]


def digest(folder: Path) -> str:
    """SHA-256 of the weights and the scores, to compare runs by."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                found.update(piece)
    return found.hexdigest()[:16]


def killed_after(command: list[str], parts: Path, count: int) -> ChildRun:
    """Start a run and end it by SIGKILL when so many parts are written."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    while len(list(parts.glob("*.safetensors"))) < count:
        require(process.poll() is None, "the run ended before it was killed")
        time.sleep(0.2)
    process.kill()
    _, _, usage = os.wait4(process.pid, 0)
    return ChildRun(time.perf_counter() - started, usage.ru_maxrss * 1024)


def main() -> None:
    arguments = parse_arguments()
    shape = PRESETS[arguments.preset]
    if arguments.blocks:
        shape = replace(shape, blocks=arguments.blocks)
    model, out = arguments.work / f"synthetic-{arguments.preset}", arguments.work / "fewer-experts"
    if not model.exists():
        write_checkpoint(model, shape)
    text = arguments.calibration or arguments.work / "text.txt"
    if not arguments.calibration:
        text.write_text("\n".join(SENTENCES) * 2000, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    command = [
        *(
            sys.executable,
            "-m",
            "secateur",
            "prune",
            str(model),
            "-o",
            str(out),
            "--method",
            arguments.method,
        ),
        *("--sparsity", str(SHARE), "--calibration", str(text), "--samples", str(arguments.samples)),
        *("--length", str(arguments.length), "--dtype", arguments.dtype, "--evaluation-windows", "0"),
        *("--no-measure-speed", "--no-check-loading"),
    ]
    runs = {}
    if arguments.kill:
        half = shape.blocks // 2
        runs[f"killed after {half} blocks"] = killed_after(command, out / ".secateur" / "parts", half)
        command.append("--resume")
    runs["resumed" if arguments.kill else "run"] = run_measured(command)
    report, block, found = Report.load(out), block_bytes(shape), check_result(model, out, shape)
    rows = [
        ["weights before", gigabytes(report.bytes_before)],
        ["memory of the machine", gigabytes(machine_facts()["memory_bytes"] or 0)],
        ["a block in bf16, in float32", f"{gigabytes(block)}, {gigabytes(2 * block)}"],
        *([f"{name}: peak resident", gigabytes(child.peak_bytes)] for name, child in runs.items()),
        *([f"{name}: seconds", f"{child.seconds:.0f}"] for name, child in runs.items()),
        ["weights after", gigabytes(report.bytes_after)],
        ["SHA-256 of weights and scores", digest(out)],
    ]
    shutil.rmtree(out)
    notes = (
        f"{arguments.method} at {SHARE:.0%} on {arguments.samples} windows of {arguments.length} tokens, "
        f"dtype {arguments.dtype}, no evaluation, seed 0, {torch.get_num_threads()} thread(s). "
        f"{shape.blocks} blocks, hidden {shape.hidden}, {shape.experts} experts {shape.ffn} wide, "
        f"{shape.visited} visited. {found}"
    )
    write_table(
        "A mixture larger than the memory", ["what", "measured"], rows, notes=notes, out=arguments.out
    )


def block_bytes(shape: Shape) -> int:
    """Of one block in bf16."""
    one, two = (replace(shape, blocks=count).parameters for count in (1, 2))
    return BYTES_PER_PARAMETER * (two - one)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
