"""The loop: it learns, stops, keeps the best, and goes on bit for bit where it was killed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from secateur.anatomy.resolve import resolve
from secateur.calibration.windows import Windows
from secateur.core.errors import NumericsError
from secateur.recovery.full import Full
from secateur.recovery.lora import Lora
from secateur.recovery.trainer import Teacher, Trainer, steps_of

GENERATOR = torch.Generator().manual_seed(3)
TEXT = torch.randint(1, 40, (1, 20), generator=GENERATOR).repeat(14, 1)
"""A line to be learnt by heart."""


def trainer(tmp_path: Path, method: Any, teacher: Teacher | None = None, **changes: Any) -> Trainer:
    model = tiny_model("llama")
    settings: dict[str, Any] = {"batch_size": 4, "steps": 12, "seed": 5, "saved": tmp_path / "state"}
    return Trainer(
        method.student(model, resolve(model.config), None),
        teacher,
        method,
        Windows.of(TEXT[:10]),
        Windows.of(TEXT[10:]),
        device=torch.device("cpu"),
        **{**settings, **changes},
    )


def weights(done: Trainer) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in done.student.parameters.values()]


@pytest.mark.parametrize("method", [Lora(learning_rate=0.02), Full(learning_rate=0.01)])
def test_it_learns_and_leaves_the_random_state_alone(method: Any, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    own = trainer(tmp_path, method)
    assert torch.equal(torch.get_rng_state(), before) or isinstance(method, Lora)  # adapters are drawn
    before = torch.get_rng_state()
    curve = own.run()
    assert torch.equal(torch.get_rng_state(), before)
    losses = [look.validation_loss for look in curve.looks]
    assert losses[-1] < losses[0] - 0.5
    assert curve.looks[-1].step == curve.step == curve.best_step == 12
    assert curve.looks[0].loss is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_killed_training_ends_in_the_same_bits(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Lora(learning_rate=0.02, dropout=dropout, evaluations=4, checkpoint_seconds=0)
    torch.manual_seed(0)
    whole = trainer(tmp_path / "whole", method)
    (tmp_path / "whole").mkdir()
    expected = whole.run()

    def killed(self: Trainer, step: Any = Trainer._step) -> None:
        if self.curve.step == 7:
            raise KeyboardInterrupt
        step(self)

    torch.manual_seed(0)
    first = trainer(tmp_path, method)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            first.run()
    torch.manual_seed(99)  # whatever the adapters begin with, the saved ones count
    second = trainer(tmp_path, method)
    curve = second.run()
    assert weights(second) == weights(whole)
    assert [vars(look) for look in curve.looks] == [vars(look) for look in expected.looks]


def test_the_best_weights_win_and_patience_ends_a_run_that_gets_worse(tmp_path: Path) -> None:
    method = Full(learning_rate=0.02, warmup=0.0, evaluations=12, patience=2)
    done = trainer(tmp_path, method)
    done.validation = Windows.of(TEXT[10:] + 200)  # tokens that the other text teaches not to expect
    before = weights(done)
    curve = done.run()
    assert curve.stopped
    assert curve.step == 2
    assert curve.best_step == 0
    assert weights(done) == before


def test_windows_of_a_round_come_once_each(tmp_path: Path) -> None:
    ids = torch.arange(1, 11)[:, None].repeat(1, 20)
    own = trainer(tmp_path, Full())
    own.windows = Windows.of(ids)
    drawn = list(itertools.chain(*(own._batch(step).ids[:, 0].tolist() for step in range(5))))
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(1, 11))
    assert drawn[:10] != drawn[10:]


def test_a_batch_in_parts_is_the_same_batch(tmp_path: Path) -> None:
    at_once = trainer(tmp_path, Full(learning_rate=0.01), steps=2, saved=tmp_path / "a")
    in_parts = trainer(tmp_path, Full(learning_rate=0.01, micro_batch=1), steps=2, saved=tmp_path / "b")
    again = trainer(
        tmp_path, Full(learning_rate=0.01, gradient_checkpointing=True), steps=2, saved=tmp_path / "c"
    )
    losses = [one.run().looks[-1].validation_loss for one in (at_once, in_parts, again)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    twin = tiny_model("llama")
    teacher = Teacher(twin, list(twin.model.layers))
    done = trainer(tmp_path, Full(learning_rate=1.0, hidden="mse"), teacher, steps=1)
    curve = done.run()
    assert curve.looks[-1].loss == pytest.approx(0.0, abs=1e-9)


def test_distillation_brings_a_student_to_its_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = tiny_model("llama", seed=4)
    method = Full(learning_rate=0.01, hidden="cosine", kl_weight=0.5, patience=0, evaluations=3)
    curve = trainer(tmp_path, method, Teacher(dense, list(dense.model.layers))).run()
    losses = [look.loss for look in curve.looks if look.loss is not None]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    broken = trainer(tmp_path, Full())
    with torch.no_grad():
        next(iter(broken.student.parameters.values())).fill_(float("nan"))
    with pytest.raises(NumericsError, match="nothing finite"):
        broken.run()


def test_steps_see_all_tokens() -> None:
    assert [steps_of(tokens, 4, 10) for tokens in (0, 1, 40, 41)] == [0, 1, 1, 2]
