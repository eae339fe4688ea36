"""What benchmarks of pruning share: their arguments, and runs on files or in memory that are judged alike."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import Windows, load_windows
from secateur.evaluation.quality import perplexity
from secateur.pipeline.prune_memory import prune_with_windows
from secateur.recipe import Recipe
from secateur.report.model import Layer, Report

__all__ = ["InMemory", "Protocol", "named", "parts_of", "protocol_parser"]


def protocol_parser(description: str | None, *, test_windows: int = 64) -> argparse.ArgumentParser:
    """With the model, its texts, their sizes, and the file of the table."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True, nargs="+", help="the first judges every run")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--test-windows", type=int, default=test_windows)
    parser.add_argument("--out", type=Path)
    return parser


def named(options: Mapping[str, Any]) -> str:
    """Options as a cell of a table."""
    return " ".join(f"{key}={value}" for key, value in options.items()) or "as it comes"


def parts_of(text: Path, count: int, folder: Path) -> list[Path]:
    """The text, and its 2nd to last of `count` equal parts as files of their own.

    Runs read a text from its start, so each is a calibration of its own: their windows are disjoint where
    none needs more than a part.
    """
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    found = [text]
    for part in range(1, count):
        found.append(folder / f"{part}-{text.name}")
        own = lines[part * len(lines) // count : (part + 1) * len(lines) // count]
        found[-1].write_text("".join(own), encoding="utf-8")
    return found


class Protocol:
    """One calibration and one judgement for all runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = str(arguments.model)
        self.texts: list[Path] = arguments.test
        self.windows, self.length = int(arguments.test_windows), int(arguments.length)
        self.calibration = {
            "source": str(arguments.calibration),
            "samples": arguments.samples,
            "length": arguments.length,
        }
        self.notes = (
            f"{Path(self.model).name}, {self.windows} windows of {self.length} tokens of "
            f"{', '.join(f'{text.parent.name}/{text.name}' for text in self.texts)}; calibration "
            f"{arguments.samples} windows of {arguments.calibration.name}. "
        )

    def judged(self, **settings: Any) -> dict[str, Any]:
        """Settings of a run that is judged on the first text, and neither timed nor opened again."""
        shared = {"evaluation_windows": self.windows, "measure_speed": False, "check_loading": False}
        return {**shared, **settings}

    def prune(
        self, out: Path, *, model: str | Path | None = None, source: Path | None = None, **settings: Any
    ) -> Report:
        """The report of a run on this model and calibration text, or on others."""
        report: Report = secateur.prune(
            model or self.model,
            out,
            calibration={**self.calibration, "source": str(source or self.calibration["source"])},
            text=str(self.texts[0]),
            **self.judged(**settings),
        )
        return report

    def others(self, out: Path) -> list[tuple[float, float]]:
        """Perplexity of the dense model and of a result, on every text but the first."""
        found = []
        for text in self.texts[1:]:
            judged = secateur.evaluate(
                out, against=self.model, text=str(text), windows=self.windows, length=self.length
            )
            found.append((float(judged["perplexity_dense"]), float(judged["perplexity"])))
        return found


class InMemory:
    """A model in float32 that is pruned in place again and again, judged on the same windows every time."""

    def __init__(self, model: str, test: Path, *, windows: int, length: int) -> None:
        self.folder, self.length = Path(secateur.inspect(model)["folder"]), length
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32").eval()
        self._dense = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._test = self.windows(str(test), windows, 0)
        self.tested = len(self._test)

    def windows(self, source: str, samples: int, seed: int) -> Windows:
        """`samples` windows; those of seed s begin where those of seed s - 1 end."""
        if source == "self":
            return load_windows(
                "self", tokenizer=self.tokenizer, samples=samples, length=self.length, seed=seed,
                model=lambda: self.model,
            )  # fmt: skip
        every = load_windows(
            source, tokenizer=self.tokenizer, samples=samples * (seed + 1), length=self.length
        )
        return every if seed == 0 else every.split(samples * seed)[1]

    def restore(self) -> None:
        """The dense weights again."""
        self.model.load_state_dict(self._dense)

    def perplexity(self) -> float:
        """On the test windows, with the weights as they are."""
        return perplexity(MemorySource(self.model), self._test, batch_size=16)

    def prune(self, calibration: Windows, **recipe: Any) -> list[Layer]:
        """Prune the dense weights by a recipe; one row a matrix."""
        self.restore()
        return prune_with_windows(self.model, Recipe(model="bench", **recipe), calibration)
