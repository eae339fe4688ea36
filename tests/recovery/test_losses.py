"""Distances from a teacher against closed forms, and the positions that count."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model

from secateur.calibration.windows import Windows
from secateur.recovery.losses import block_outputs, divergence, hidden_distance

IDS = torch.arange(1, 25).view(2, 12)
EVERYWHERE = torch.ones(1, 1, dtype=torch.bool)


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = tiny_model("llama")(IDS).logits.detach()
    at = Windows.of(IDS).predicting
    assert float(divergence(logits, logits, at, 2.0)) == 0.0
    assert float(divergence(logits + 3.0, logits, at, 2.0)) == pytest.approx(0.0, abs=1e-5)


def test_the_divergence_is_from_teacher_to_student_at_a_temperature() -> None:
    teacher, student = torch.tensor([[[math.log(9.0), 0.0]]]), torch.zeros(1, 1, 2)
    softened = 3 / 4, 1 / 4  # the root of 9 : 1
    expected = 4 * sum(p * math.log(2 * p) for p in softened)
    assert float(divergence(student, teacher, EVERYWHERE, 2.0)) == pytest.approx(expected, rel=1e-5)
    backwards = 4 * sum(math.log(1 / (2 * p)) / 2 for p in softened)
    assert float(divergence(teacher, student, EVERYWHERE, 2.0)) == pytest.approx(backwards, rel=1e-5)


def test_only_real_tokens_with_a_real_next_one_predict() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    padded = Windows.of(torch.ones(2, 4), mask).predicting
    assert padded.tolist() == [[False, True, True, False], [True, False, False, False]]
    whole = Windows.of(torch.ones(1, 3)).predicting
    assert whole.tolist() == [[True, True, False]]
    wrong = torch.randn(2, 4, 5)
    wrong[padded] = 0
    assert float(divergence(wrong, torch.zeros(2, 4, 5), padded, 1.0)) == pytest.approx(0.0, abs=1e-6)


def test_distances_of_hidden_states() -> None:
    a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert float(hidden_distance([a], [a], EVERYWHERE, "cosine")) == pytest.approx(0, abs=1e-6)
    assert float(hidden_distance([a, a], [b, a], EVERYWHERE, "cosine")) == pytest.approx(0.5)
    assert float(hidden_distance([a], [b], EVERYWHERE, "mse")) == pytest.approx(5 / 4)


def test_outputs_of_blocks_are_those_of_the_model() -> None:
    model = tiny_model("llama")
    with block_outputs(list(model.model.layers)) as seen:
        found = model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[0], found[1])
    assert len(seen) == 2
    model(IDS)
    assert len(seen) == 2
