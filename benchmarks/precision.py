"""Mixed precision of experts against uniform bits, and experts dropped while the model runs.

    python benchmarks/precision.py MODEL --calibration TRAIN.txt --test TEST.txt WIKI.txt

One calibration. First table: perplexity, divergence, bytes on disk and in memory of every allotment. Second:
what online pruning saves and costs, on the dense model and on the one in two bits.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from protocol import Protocol, named, protocol_parser
from tables import write_table
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import secateur
from secateur.calibration.windows import Windows, load_windows
from secateur.experts.online import OnlinePlan
from secateur.storage.kernels import weight_bytes
from secateur.storage.quantizer import SecateurQuantizationConfig

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


def rounded(protocol: Protocol, out: Path, method: str, options: dict[str, Any]) -> list[str]:
    report = protocol.prune(out, method=method, options=options)
    others = [after for _, after in protocol.others(out)]
    found = report.precision
    assert found is not None
    print(json.dumps([method, options, report.perplexity_after, others, found.experts]), flush=True)
    return [
        method,
        named(options),
        f"{found.bits_experts:.2f}",
        f"{found.stored_bits_experts:.2f}",
        f"{report.perplexity_after:.2f}",
        f"{report.kl_divergence:.4f}",
        *(f"{other:.1f}" for other in others),
        f"{report.bytes_after / 1e6:.2f}",
        f"{in_memory(out) / 1e6:.2f}",
    ]


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


def main() -> None:
    arguments = protocol_parser(__doc__).parse_args()
    protocol = Protocol(arguments)
    folder = secateur.inspect(arguments.model)["folder"]
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = load_windows(
        str(protocol.texts[0]), tokenizer=tokenizer, samples=protocol.windows, length=protocol.length
    )
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            rounded(protocol, Path(scratch) / str(number), method, options)
            for number, (method, options) in enumerate(PLANS)
        ]
        two = PLANS.index(("mc-moe", {"bits": 2.0}))
        small = AutoModelForCausalLM.from_pretrained(Path(scratch) / str(two), dtype=torch.float32).eval()
        plan = OnlinePlan.load(Path(scratch) / str(two))
        dropped = [*online(dense, "dense", plan, windows), *online(small, "mc-moe, 2 bits", plan, windows)]
    name = Path(arguments.model).name
    notes = f"{protocol.notes}Dense perplexity on the first text: {perplexity(dense, windows):.2f}."
    heads = [
        "method",
        "options",
        "bits",
        "stored bits",
        "perplexity",
        "KL",
        *(f"{text.parent.name}/{text.name}" for text in protocol.texts[1:]),
        "MB",
        "MB in memory",
    ]
    write_table(
        f"Experts of {name} in few bits", heads, rows, notes=notes, out=_beside(arguments.out, "bits")
    )
    heads = ["model", "blocks", "strength", "protected", "activations saved", "perplexity"]
    write_table(
        f"Experts of {name} dropped online", heads, dropped, notes=notes, out=_beside(arguments.out, "online")
    )


def _beside(out: Path | None, what: str) -> Path | None:
    return out and out.with_name(f"{out.stem}-{what}{out.suffix}")


if __name__ == "__main__":
    main()
