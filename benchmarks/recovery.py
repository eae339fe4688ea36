"""What each way to recover brings on `seedling`, with the same tokens.

    python benchmarks/recovery.py --train TRAIN.txt --test TEST.txt [--tokens 200000] [--out TABLE.md]

Calibration and recovery read TRAIN.txt, the perplexities are measured on windows of TEST.txt.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import write_table

import secateur

LENGTH = 256
CUTS = {
    "flap 35%": {"method": "flap", "sparsity": 0.35},
    "sparsegpt 60%": {"method": "sparsegpt", "sparsity": 0.6},
}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"how": "lora", "learning_rate": 3e-3},
    "lora, distilled": {"how": "lora", "learning_rate": 3e-3, "teacher": "seedling"},
    "full": {"how": "full", "learning_rate": 1e-3},
    "full, distilled": {"how": "full", "learning_rate": 1e-3, "teacher": "seedling"},
    "refit": {"how": "refit", "teacher": "seedling"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the table here as Markdown")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for cut, settings in CUTS.items():
            rows += _rows(cut, settings, Path(scratch), arguments)
    heads = ["cut", "way", "perplexity", "tokens", "training, s", "whole run, s"]
    write_table("Recovery of seedling", heads, rows, out=arguments.out)


def _rows(cut: str, settings: dict[str, Any], scratch: Path, arguments: Any) -> list[list[str]]:
    pruned = scratch / settings["method"]
    judged = {"evaluation_windows": arguments.windows, "measure_speed": False}
    calibration = {"source": str(arguments.train), "samples": 128, "length": LENGTH}
    first = secateur.prune(
        "seedling", pruned, **settings, **judged, calibration=calibration, text=str(arguments.test)
    )
    rows = [[cut, "none", f"{first.perplexity_after:.2f}", "0", "0", f"{first.seconds:.0f}"]]
    print(*rows[0], f"dense {first.perplexity_before:.2f}", sep=", ", file=sys.stderr, flush=True)
    for way, options in WAYS.items():
        report = secateur.recover(
            pruned,
            scratch / f"{settings['method']}-{way}",
            text=arguments.train,
            evaluation_text=str(arguments.test),
            tokens=arguments.tokens,
            length=LENGTH,
            **judged,
            **options,
        )
        found = report.recovery
        assert found is not None
        spent = [f"{found.tokens}", f"{found.training_seconds:.0f}", f"{report.seconds:.0f}"]
        rows.append([cut, way, f"{report.perplexity_after:.2f}", *spent])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
