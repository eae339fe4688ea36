"""What packed weights give end to end: bytes, memory and speed of a billion parameters, and the same tokens.

    python benchmarks/packed.py --work FOLDER --out docs/evidence/packed.md
    python benchmarks/packed.py --work FOLDER --blocks 2 --pairs 2 --new-tokens 4 --prompt-tokens 32

A synthetic bf16 Llama (TinyLlama's sizes) gets zeros by magnitude and is stored packed. The dense model and
those are then loaded in turn, each in a process of its own and in the dtype of the files, and decode
at batch 1. Ratios are against the dense model of the same round. Trained models say whether
the tokens are those of the same weights loaded dense.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from packed_worker import loaded
from smaller import ONE_BILLION, written
from synthetic import SENTENCES
from tables import write_table
from torch import Tensor
from transformers import AutoTokenizer

import secateur

WORKER = Path(__file__).with_name("packed_worker.py")
DENSE = "dense"
VARIANTS: dict[str, dict[str, Any]] = {
    "50% bitmask": {"sparsity": 0.5, "format": "bitmask"},
    "70% bitmask": {"sparsity": 0.7, "format": "bitmask"},
    "2:4 nm": {"pattern": "2:4", "format": "nm"},
}
QUICK = {"evaluation_windows": 0, "measure_speed": False, "check_loading": False}
HEADS = [
    "model", "file, GB", "of dense", "resident, GB", "of dense", "decode, tokens/s", "times dense",
    "prefill, tokens/s", "times dense", "load, s",
]  # fmt: skip
STORED = "the dtype of the file"
PROMPT, ANSWER = 8, 48


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a disk with 12 GB free")
    parser.add_argument("--blocks", type=int, default=ONE_BILLION.blocks)
    parser.add_argument("--pairs", type=int, default=5, help="rounds of all models")
    parser.add_argument("--prefill-pairs", type=int, default=2, help="rounds in which prompts are read too")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--trained", nargs="*", default=[], help="trained models beside seedling, for tokens")
    parser.add_argument("--keep", action="store_true", help="leave the packed models in the folder")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def packed_folders(model: Path, work: Path, prefix: str) -> dict[str, Path]:
    """The model in every variant; what an earlier run has left is used again."""
    folders = {}
    for name, settings in VARIANTS.items():
        folder = folders[name] = (
            work / f"{prefix}-{name.replace('%', '').replace(':', '-').replace(' ', '-')}"
        )
        if not (folder / "report.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            secateur.prune(str(model), folder, method="magnitude", **settings, **QUICK)
    return folders


def rounds(folders: dict[str, Path], arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What the worker says of each model, a round after the other."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for number in range(arguments.pairs):
        prompt = arguments.prompt_tokens if number < arguments.prefill_pairs else 0
        for name, folder in folders.items():
            mode = "dense" if name == DENSE else "packed"
            command = [sys.executable, str(WORKER), str(folder), mode, str(arguments.new_tokens), str(prompt)]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seen[name].append(json.loads(child.stdout))
            print(name, seen[name][-1], file=sys.stderr)
    return seen


def speed_rows(folders: dict[str, Path], seen: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows, dense = [], seen[DENSE]
    whole_bytes, whole_resident = file_bytes(folders[DENSE]), middle(dense, "resident_bytes")
    for name, own in seen.items():
        nbytes, resident = file_bytes(folders[name]), middle(own, "resident_bytes")
        rows.append([
            name, f"{nbytes / 1e9:.3f}", f"{nbytes / whole_bytes:.1%}",
            f"{resident / 1e9:.2f}", f"{resident / whole_resident:.1%}",
            *speed(own, dense, "decode"), *speed(own, dense, "prefill"), f"{middle(own, 'load_seconds'):.1f}",
        ])  # fmt: skip
    return rows


def speed(own: list[dict[str, Any]], dense: list[dict[str, Any]], phase: str) -> tuple[str, str]:
    """Median and range, of the speed and of the ratios to the dense model of the same round."""
    pairs = [(one[phase], other[phase]) for one, other in zip(own, dense, strict=True) if one[phase]]
    if not pairs:
        return "", ""
    return middle_of([one for one, _ in pairs], 1), middle_of([one / other for one, other in pairs], 2)


def middle_of(values: list[float], digits: int) -> str:
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def middle(own: list[dict[str, Any]], key: str) -> float:
    return statistics.median(one[key] for one in own)


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def token_rows(models: list[str]) -> list[list[str]]:
    """Greedy tokens of packed weights against those of the same files loaded dense."""
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            for name, folder in packed_folders(Path(model), Path(scratch), "tokens").items():
                for dtype in ("float32", "auto"):
                    dense, packed = (answers(folder, mode, dtype) for mode in ("dense", "packed"))
                    equal = f"{int((dense == packed).sum())} of {dense.numel()}"
                    rows.append([Path(model).name, name, STORED if dtype == "auto" else dtype, equal])
    return rows


def answers(folder: Path, mode: str, dtype: str) -> Tensor:
    """(sentences, tokens): what follows the first tokens of each sentence."""
    model, tokenizer = loaded(str(folder), mode, dtype), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(sentence).input_ids[:PROMPT] for sentence in SENTENCES])
    told = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=ANSWER,
        max_new_tokens=ANSWER,
        do_sample=False,
    )
    return told[:, PROMPT:]


def main() -> None:
    arguments = parse_arguments()
    rows = token_rows(["seedling", *arguments.trained])
    shape = replace(ONE_BILLION, blocks=arguments.blocks)
    name = "1b" if shape == ONE_BILLION else f"1b-{shape.blocks}-blocks"
    dense = written(arguments.work, name, shape)
    packed = packed_folders(dense, arguments.work, f"packed-{name}")
    folders = {DENSE: dense, **packed}
    seen = rounds(folders, arguments)
    threads, kernel = seen[DENSE][0]["threads"], seen["2:4 nm"][0]["kernel"]
    notes = (
        f"{shape.parameters:,} parameters, bf16, {threads} threads, kernel: {kernel}. Medians and ranges of "
        f"{arguments.pairs} rounds in fresh processes, of which {arguments.prefill_pairs} read a prompt of "
        f"{arguments.prompt_tokens} tokens; {arguments.new_tokens} tokens decoded at batch 1. Resident: of "
        "the whole process, Python and torch included, after decoding."
    )
    write_table("Packed weights end to end", HEADS, speed_rows(folders, seen), notes=notes, out=arguments.out)
    notes = (
        f"{len(SENTENCES)} prompts in one batch, {ANSWER} greedy tokens each: packed in memory against the "
        "same files loaded dense. Where rounding decides between two tokens, those after it differ as well."
    )
    heads = ["model", "weights", "computed in", "equal tokens"]
    out = arguments.out and arguments.out.with_stem(f"{arguments.out.stem}-tokens")
    write_table("Tokens of packed weights", heads, rows, notes=notes, out=out)
    if not arguments.keep:
        for folder in packed.values():
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
