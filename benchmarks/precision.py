"""Mixed precision of experts against uniform bits, and experts dropped while the model runs.

    python benchmarks/precision.py MODEL --calibration TRAIN.txt --test TEST.txt WIKI.txt

First table: perplexity, divergence, bytes on disk and in memory of every allotment; with `--seeds 3` each is
calibrated on three parts of the text (mean and range). Second: what online pruning saves and costs, on the
dense model and on the one in two bits, of the first calibration. With `--speed` instead: bytes and speed of
fewer experts and of few bits, packed in memory and unpacked, each in turn with the dense model.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from protocol import Protocol, named, parts_of, protocol_parser
from tables import spread, write_table
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import secateur
from secateur.calibration.windows import Windows, load_windows
from secateur.experts.online import OnlinePlan
from secateur.loading.quantizer import SecateurQuantizationConfig
from secateur.runtime.facts import weight_bytes

PLANS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("uniform-bits", {"bits": 3}),
    ("mc-moe", {"bits": 2.54}),
    ("mc-moe", {"bits": 2.54, "scope": "global"}),
    ("uniform-bits", {"bits": 2}),
    ("uniform-bits", {"bits": 2, "rounding": "nearest"}),
    ("mc-moe", {"bits": 2.0}),
    ("mc-moe", {"bits": 2.0, "scope": "global"}),
    ("mc-moe", {"bits": 2.0, "two_bits": 0, "three_bits": 0}),
    ("mc-moe", {"bits": 1.57}),
    ("mc-moe", {"bits": 1.57, "scope": "global"}),
    ("uniform-bits", {"bits": 1}),
)
ONLINE = ((0.5, 0.02), (1.0, 0.0), (1.0, 0.02), (1.0, 0.1), (1.5, 0.02), (2.0, 0.02))


SMALLER: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("reap", {"sparsity": 0.5}, False),
    ("uniform-bits", {"options": {"bits": 2}}, False),
    ("uniform-bits", {"options": {"bits": 2}}, True),
    ("mc-moe", {"options": {"bits": 2.0}}, True),
)
"""Results that are timed, and whether their weights stay packed in memory."""
SPEED_HEADS = ("method", "settings", "loaded", "MB", "MB in memory", "prefill, tokens/s", "decode, tokens/s")


def in_memory(folder: Path) -> int:
    """Bytes of the loaded model whose matrices stay packed, in the dtype of its files."""
    how = SecateurQuantizationConfig(mode="packed")
    return weight_bytes(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=how))


def perplexity(model: PreTrainedModel, windows: Windows) -> float:
    """Of the whole model in memory."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in windows.batches(4):
            logits = model(batch.ids, use_cache=False).logits[:, :-1].float()
            targets = batch.ids[:, 1:]
            total += float(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += targets.numel()
    return math.exp(total / count)


def rounded(
    protocol: Protocol, texts: list[Path], scratch: Path, method: str, options: dict[str, Any]
) -> list[str]:
    """A line of the first table, from a run a calibration text; `scratch` keeps the results by its number."""
    found = []
    for number, text in enumerate(texts):
        out = scratch / str(number)
        report = protocol.prune(out, source=text, method=method, options=options)
        precision, others = report.precision, [after for _, after in protocol.others(out)]
        assert precision is not None
        print(json.dumps([method, options, report.perplexity_after, others, precision.experts]), flush=True)
        found.append(
            [
                precision.bits_experts or 0.0,
                precision.stored_bits_experts or 0.0,
                report.perplexity_after or 0.0,
                report.kl_divergence or 0.0,
                report.bytes_after / 1e6,
                in_memory(out) / 1e6,
                *others,
            ]
        )
    columns = [list(column) for column in zip(*found, strict=True)]
    digits = [2, 2, 2, 4, 2, 2, *[1] * (len(columns) - 6)]
    return [method, named(options), *map(spread, columns, digits)]


def speed_rows(protocol: Protocol, scratch: Path, repeats: int) -> list[list[str]]:
    """The dense model, then a line a result: bytes, and speed beside the dense model at batch 1."""
    rows: list[list[str]] = []
    for number, (method, settings, packed) in enumerate(SMALLER):
        out = scratch / str(number)
        protocol.prune(out, method=method, evaluation_windows=0, **settings)
        found = secateur.bench(out, against=protocol.model, packed=packed, repeats=repeats)
        print(json.dumps([method, settings, packed, found["measurements"]]), flush=True)
        if not rows:
            sizes = [found[f"{key}_against"] for key in ("bytes", "weight_bytes")]
            rows.append(["dense", "-", "-", *megabytes(sizes), *speeds(found, "against")])
        sizes = [found[key] for key in ("bytes", "weight_bytes")]
        options = named(settings.get("options", settings))
        loaded = "packed" if packed else "dense"
        rows.append([method, options, loaded, *megabytes(sizes), *speeds(found, "model")])
    return rows


def megabytes(sizes: list[int]) -> list[str]:
    return [f"{size / 1e6:.2f}" for size in sizes]


def speeds(found: dict[str, Any], model: str) -> list[str]:
    """Of prefill and decode: tokens a second, and beside them how many times the dense model's."""
    cells = []
    for phase in ("prefill", "decode"):
        alone, both = (phase, 1, model), (phase, 1)
        rows = found["measurements"]
        [speed] = [row for row in rows if (row["phase"], row["batch_size"], row["model"]) == alone]
        [ratio] = [row for row in found["ratios"] if (row["phase"], row["batch_size"]) == both]
        beside = f" ({ratio['ratio']:.2f}: {ratio['min']:.2f} to {ratio['max']:.2f})"
        cells.append(f"{speed['median']:.0f}" + (beside if model == "model" else ""))
    return cells


def online(model: PreTrainedModel, name: str, plan: OnlinePlan, windows: Windows) -> list[list[str]]:
    """A line a strength and share that is protected, in all blocks but the first two, and in all."""
    before = perplexity(model, windows)
    rows = [[name, "-", "-", "-", "0%", f"{before:.2f}"]]
    every = [block.block for block in plan.blocks]
    for blocks in (plan.usual(), every):
        for strength, protect in ONLINE:
            with secateur.prune_online(
                model, plan, blocks=blocks, strength=strength, protect=protect
            ) as pruner:
                after = perplexity(model, windows)
                saved = pruner.saved * len(blocks) / len(every)
            where = "all" if blocks == every else ", ".join(map(str, blocks))
            rows.append([name, where, str(strength), f"{protect:.0%}", f"{saved:.1%}", f"{after:.2f}"])
            print(rows[-1], flush=True)
    return rows


def plans_of(bits: str | None) -> list[tuple[str, dict[str, Any]]]:
    """All, or those that state nothing but one of these averages."""
    asked = [{"bits": float(number)} for number in (bits or "").split(",") if number]
    return [plan for plan in PLANS if not asked or plan[1] in asked]


def parse_arguments() -> argparse.Namespace:
    parser = protocol_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="parts of the calibration text, a run on each")
    parser.add_argument("--bits", help="3,2.54,2: no others, and no options beside them")
    parser.add_argument("--online", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--speed", action="store_true", help="bytes and speed in place of quality")
    parser.add_argument("--repeats", type=int, default=5, help="of the speed")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    protocol, name = Protocol(arguments), Path(arguments.model).name
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.speed:
            rows = speed_rows(protocol, Path(scratch), arguments.repeats)
            notes = (
                f"{name}, batch 1, 128 prompt tokens and 32 new ones, float32 on a CPU; median of "
                f"{arguments.repeats} in turn with the dense model, {torch.get_num_threads()} thread(s). In "
                "brackets times the dense model, and the range."
            )
            title = f"Speed of fewer experts and few bits: {name}"
            write_table(title, SPEED_HEADS, rows, notes=notes, out=arguments.out)
            return
        _quality(arguments, protocol, name, Path(scratch))


def _quality(arguments: argparse.Namespace, protocol: Protocol, name: str, scratch: Path) -> None:
    folder = secateur.inspect(arguments.model)["folder"]
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = load_windows(
        str(protocol.texts[0]), tokenizer=tokenizer, samples=protocol.windows, length=protocol.length
    )
    texts = parts_of(arguments.calibration, arguments.seeds, scratch)
    plans = plans_of(arguments.bits)
    rows = [
        rounded(protocol, texts, scratch / f"{method}-{number}", method, options)
        for number, (method, options) in enumerate(plans)
    ]
    seen = f"{arguments.seeds} disjoint calibrations (mean, range). " if arguments.seeds > 1 else ""
    notes = f"{protocol.notes}{seen}Dense perplexity on the first text: {perplexity(dense, windows):.2f}."
    others = (f"{text.parent.name}/{text.name}" for text in protocol.texts[1:])
    heads = ["method", "options", "bits", "stored bits", "perplexity", "KL", "MB", "MB in memory", *others]
    title = f"Experts of {name} in few bits"
    write_table(title, heads, rows, notes=notes, out=_beside(arguments.out, "bits"))
    if not arguments.online:
        return
    two = scratch / f"mc-moe-{plans.index(('mc-moe', {'bits': 2.0}))}" / "0"
    small = AutoModelForCausalLM.from_pretrained(two, dtype=torch.float32).eval()
    plan = OnlinePlan.load(two)
    rows = [*online(dense, "dense", plan, windows), *online(small, "mc-moe, 2 bits", plan, windows)]
    heads = ["model", "blocks", "strength", "protected", "activations saved", "perplexity"]
    title = f"Experts of {name} dropped online"
    write_table(title, heads, rows, notes=notes, out=_beside(arguments.out, "online"))


def _beside(out: Path | None, what: str) -> Path | None:
    return out and out.with_name(f"{out.stem}-{what}{out.suffix}")


if __name__ == "__main__":
    main()
