"""Few experts are named, many are counted."""

from __future__ import annotations

import torch

from secateur.pipeline.ways.unvisited import unvisited


def test_none() -> None:
    assert unvisited({0: torch.ones(3), 2: torch.ones(4)}, "they go.") == []


def test_few_are_named() -> None:
    counts = {0: torch.tensor([0, 2, 0]), 1: torch.ones(3), 4: torch.tensor([1, 0, 5])}
    [words] = unvisited(counts, "first to go.")
    assert words == "No calibration token visited experts 0, 2 of block 0; 1 of block 4: first to go."


def test_many_are_counted() -> None:
    [words] = unvisited({0: torch.zeros(5), 1: torch.zeros(900), 2: torch.ones(1000)}, "first to go.")
    assert "905 of 1,905 experts (900 of them in block 1): first to go. More windows" in words
