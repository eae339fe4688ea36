"""What scoring the experts of a block costs as their number grows: CPU seconds of observing and of scoring.

    python benchmarks/scoring_experts.py --out scoring-experts.md

A synthetic Qwen3-MoE of one block, each count a model of its own, the same tokens for all. The counts are
gone through several times in turn and the smallest time of each is taken.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import write_table
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from secateur.calibration.driver import Driver
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import Windows
from secateur.core.method import METHODS, methods_of
from secateur.experts.base import expert_problem

COUNTS = (8, 16, 32, 64, 128)
TOP_K = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--width", type=int, default=128, help="of one expert")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def model_of(count: int, arguments: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=arguments.hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=arguments.width,
        num_experts=count,
        num_experts_per_tok=TOP_K,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def times(model: Any, windows: Windows) -> dict[str, tuple[float, float]]:
    """By method, CPU seconds of observing the block and of scoring its experts."""
    found = {}
    for name in methods_of("experts"):
        method = METHODS.get(name).from_options({})
        for block in Driver(MemorySource(model), windows).blocks(outputs=False):
            needs = method.statistics
            seeing, routing = cpu_seconds(lambda block=block, needs=needs: block.observe_routing(needs))
            problem = expert_problem(
                block.block,
                block.parameters,
                top_k=TOP_K,
                generator=torch.Generator().manual_seed(0),
                routing=routing,
            )
            scoring, _ = cpu_seconds(lambda method=method, problem=problem: method.score(problem))
            found[name] = (seeing, scoring)
            block.finish()
    return found


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    ids = torch.randint(0, 512, (arguments.windows, arguments.length))
    windows, models = Windows.of(ids), {count: model_of(count, arguments) for count in COUNTS}
    rounds = [
        {count: times(models[count], windows) for count in COUNTS} for _ in range(arguments.repeats + 1)
    ]
    rows = []
    for name in methods_of("experts"):
        best = {
            count: [min(one[count][name][part] for one in rounds[1:]) for part in range(2)]
            for count in COUNTS
        }
        rows.append([name, *(f"{seeing:.3f} + {scoring:.3f}" for seeing, scoring in best.values())])
    notes = (
        f"CPU seconds of observing + of scoring, best of {arguments.repeats} after one to warm up; "
        f"{arguments.windows * arguments.length:,} tokens, hidden {arguments.hidden}, experts of width "
        f"{arguments.width}, top {TOP_K}, one thread."
    )
    heads = ["method", *(f"{count} experts" for count in COUNTS)]
    write_table("Scoring the experts of one block", heads, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
