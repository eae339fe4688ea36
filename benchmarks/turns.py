"""Pruning and training in turns against one cut with the same training (Adapt-Pruner's central claim).

    python benchmarks/turns.py MODEL --calibration TRAIN.txt --test TEST.txt --out turns.md

Every row learns from as many tokens of the calibration corpus, in one curve of the learning rate, with one
method for all cuts; only the number of cuts differs. Each cell is a recipe run by the command line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from protocol import Protocol, protocol_parser
from tables import write_table

from secateur.report.model import Report


def parse_arguments() -> argparse.Namespace:
    parser = protocol_parser(__doc__)
    parser.add_argument("--method", default="adapt-pruner")
    parser.add_argument("--tokens", type=int, default=240_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    parser.add_argument("--distil", action="store_true", help="the dense model teaches")
    return parser.parse_args()


def stages(arguments: argparse.Namespace, protocol: Protocol, turns: int, sparsity: float) -> dict[str, Any]:
    """The part of a recipe that prunes and trains."""
    recover = {
        "how": "full",
        "text": protocol.calibration["source"],
        "tokens": arguments.tokens,
        "length": protocol.length,
        "learning_rate": arguments.learning_rate,
        **({"teacher": protocol.model} if arguments.distil else {}),
    }
    cut = {"method": arguments.method}
    if turns > 1:
        return {"interleave": {"turns": turns, "sparsity": sparsity, "prune": cut, "recover": recover}}
    recover["options"] = {"schedule": "wsd"}  # the curve of the turns
    return {"stages": [{**cut, "sparsity": sparsity}, {"recover": recover}]}


def cell(arguments: argparse.Namespace, protocol: Protocol, turns: int, sparsity: float) -> str:
    recipe = {
        "model": protocol.model,
        "calibration": protocol.calibration,
        "text": str(protocol.texts[0]),
        **protocol.judged(),
        **stages(arguments, protocol, turns, sparsity),
    }
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch) / "recipe.yaml", Path(scratch) / "out"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "secateur", "prune", "--recipe", str(file), "-o", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = Report.load(out)
    print(json.dumps([turns, sparsity, report.sparsity, report.perplexity_after]), flush=True)
    return f"{report.perplexity_after:.2f}"


def main() -> None:
    arguments = parse_arguments()
    protocol = Protocol(arguments)
    rows = [
        [str(turns), *(cell(arguments, protocol, turns, sparsity) for sparsity in arguments.budgets)]
        for turns in arguments.turns
    ]
    teacher = "distilled from the dense model" if arguments.distil else "on the next token alone"
    notes = (
        f"{protocol.notes}{arguments.tokens:,} tokens of {arguments.calibration.name} in all, {teacher}, "
        f"learning rate {arguments.learning_rate}. Sparsity is of the parameters in blocks."
    )
    name = f"{arguments.method} in turns of pruning and training: {Path(protocol.model).name}"
    heads = ["turns", *(f"{sparsity:.0%}" for sparsity in arguments.budgets)]
    write_table(name, heads, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
