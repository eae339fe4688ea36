"""Rounding errors of trained experts behave as the method supposes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from secateur.anatomy.mixture import mixture_of
from secateur.calibration.driver import Driver
from secateur.calibration.source import FolderSource
from secateur.calibration.visits import expert_errors, visits
from secateur.calibration.windows import load_windows
from secateur.checkpoint.reader import Checkpoint
from secateur.quantise.experts import rounded_stack

LEVELS = (1, 2, 3, 8)


def test_more_bits_move_the_output_of_trained_experts_less(shared: Path) -> None:
    folder, text = shared / "models" / "tales-moe", shared / "data" / "tales" / "valid.txt"
    windows = load_windows(str(text), tokenizer=AutoTokenizer.from_pretrained(folder), samples=8, length=128)
    errors = []
    for opened in Driver(FolderSource(Checkpoint.open(folder)), windows).blocks():
        mixture = mixture_of(opened.block)
        assert mixture is not None
        stacks = {
            name.removeprefix(f"{mixture.module}."): stack
            for name, stack in mixture.weights(opened.parameters).items()
        }
        others = [lambda bits=bits, stacks=stacks: rounded_stack(stacks, bits, 128) for bits in LEVELS]
        experts = opened.module.get_submodule(mixture.module)
        errors.append(expert_errors(experts, others, list(visits(opened, mixture.module))))
        opened.finish()
    table = torch.cat(errors)
    ordered = (table[:, 0] > table[:, 1]) & (table[:, 1] > table[:, 2])
    assert float(ordered.float().mean()) > 0.9
    assert bool((table[:, 3] < 0.1 * table[:, 2]).all())
