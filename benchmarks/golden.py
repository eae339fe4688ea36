"""Reproduce the golden perplexities of a trained model through the command line.

    python benchmarks/golden.py --golden golden.json --model MODEL --calibration CAL.txt --test TEST.txt

`golden.json` holds `{"perplexity": {"dense": ..., "wanda 0.5": ..., "sparsegpt 2:4": ...}}`, measured with
128 windows of 256 tokens for calibration (one a batch) and as many for the test, float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import write_table

TOLERANCE = 0.005
DATA = ["--samples", "128", "--length", "256"]


def secateur(*arguments: str) -> dict[str, object]:
    """Run one command with --json and return its object."""
    command = [sys.executable, "-m", "secateur", *arguments, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def perplexity(folder: Path | str, test: Path) -> float:
    result = secateur("evaluate", str(folder), "--text", str(test), "--windows", "128", "--length", "256")
    return float(result["perplexity"])  # type: ignore[arg-type]


def prune(name: str, model: Path, calibration: Path, out: Path) -> None:
    """`wanda 0.5` or `sparsegpt 2:4` into `out`."""
    method, amount = name.split()
    budget = ["--pattern", amount] if ":" in amount else ["--sparsity", amount]
    plain = ["--batch-size", "1", "--evaluation-windows", "0", "--no-measure-speed"]
    data = ["--calibration", str(calibration), *DATA]
    secateur("prune", str(model), "-o", str(out), "--method", method, *budget, *data, *plain)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="write the table here as Markdown")
    arguments = parser.parse_args()
    expected = json.loads(arguments.golden.read_text())["perplexity"]
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for name, golden in expected.items():
            folder: Path = arguments.model
            if name != "dense":
                folder = Path(scratch) / name.replace(" ", "-").replace(":", "of")
                prune(name, arguments.model, arguments.calibration, folder)
            reached = perplexity(folder, arguments.test)
            difference = reached / golden - 1
            worst = max(worst, abs(difference))
            rows.append([name, f"{golden:.5f}", f"{reached:.5f}", f"{difference:+.4%}"])
    notes = f"Largest difference {worst:.4%}; asked for: at most {TOLERANCE:.1%}."
    heads = ["run", "golden", "secateur", "difference"]
    write_table("Golden perplexities", heads, rows, notes=notes, out=arguments.out)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
