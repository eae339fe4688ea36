"""Least squares on the residual stream against solutions in closed form."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from secateur.calibration.driver import Driver
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import Windows
from secateur.recovery.refit import Refit
from secateur.recovery.stream import adds_up, correction, error_after, refit_block, writers

GENERATOR = torch.Generator().manual_seed(2)
IDS = torch.randint(1, 300, (48, 40), generator=GENERATOR)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(200, 6, generator=GENERATOR, dtype=torch.float64) @ torch.randn(
        6, 6, generator=GENERATOR, dtype=torch.float64
    )
    return inputs, torch.randn(200, 3, generator=GENERATOR, dtype=torch.float64)


def test_the_correction_is_that_of_least_squares() -> None:
    inputs, wanted = problem()
    hessian, cross = inputs.T @ inputs, wanted.T @ inputs
    found, used = correction(hessian, cross, None, 1e-12, 10)
    torch.testing.assert_close(found, torch.linalg.lstsq(inputs, wanted).solution.T)
    assert used == 1e-12
    left = float((wanted - inputs @ found.T).square().sum())
    assert error_after((hessian, cross), float(wanted.square().sum()), found) == pytest.approx(left)


def test_with_zeros_each_row_is_solved_on_its_support() -> None:
    inputs, wanted = problem()
    kept = torch.rand(3, 6, generator=GENERATOR) < 0.5
    kept[0] = True
    found, _ = correction(inputs.T @ inputs, wanted.T @ inputs, kept, 1e-12, 200)
    for row, support in enumerate(kept):
        expected = torch.linalg.lstsq(inputs[:, support], wanted[:, row : row + 1]).solution[:, 0]
        torch.testing.assert_close(found[row][support], expected, rtol=1e-3, atol=1e-4)
        assert not found[row][~support].any()


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", True), ("gpt2", True), ("gpt_neox", True), ("gemma2", False)]
)
def test_it_is_seen_whether_writers_add_up(family: str, expected: bool) -> None:
    driver = Driver(MemorySource(tiny_model(family)), Windows.of(IDS[:2]))
    seen = []
    for block in driver.blocks():
        seen.append(adds_up(block))
        block.finish()
    assert seen == [expected] * len(seen)


def test_writers_are_found_in_order() -> None:
    block = MemorySource(tiny_model("gpt2")).anatomy.blocks[0]
    assert [matrix.name for matrix in writers(block)] == ["attn.c_proj", "mlp.c_proj"]
    moe = MemorySource(tiny_model("mixtral")).anatomy.blocks[0]
    assert [matrix.name for matrix in writers(moe)] == ["self_attn.o_proj"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_refitted_block_is_nearer_to_the_dense_one(family: str, masked: bool) -> None:
    dense, pruned = tiny_model(family), tiny_model(family)
    source = MemorySource(pruned)
    with torch.no_grad():
        for block in source.anatomy.blocks:
            module = pruned.get_submodule(block.prefix)
            for matrix in writers(block):
                view = matrix.view(dict(module.named_parameters()))
                view.mul_(0.7)
                if masked:
                    view[:, ::2] = 0
    windows = Windows.of(IDS)
    ours, theirs = (Driver(MemorySource(model), windows, batch_size=2) for model in (pruned, dense))
    reached = []
    for student, teacher in zip(ours.blocks(), theirs.blocks(), strict=True):
        for done in refit_block(Refit(damping=0.1 if masked else 1e-6), student, teacher, 40, torch.float32):
            assert done.changed
            assert done.after < done.before
            kept = done.matrix.view(student.parameters) != 0
            assert not masked or not kept[:, ::2].any()
            reached.append(done.after)
        student.finish()
        teacher.finish()
    assert len(reached) == 4
    if not masked:
        assert max(reached) < 1e-6  # what was scaled down is found again


def test_a_matrix_that_is_right_already_is_left_alone() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours, theirs = (
        Driver(MemorySource(one), Windows.of(IDS), batch_size=2) for one in (model, tiny_model("llama"))
    )
    for student, teacher in zip(ours.blocks(), theirs.blocks(), strict=True):
        assert not any(d.changed for d in refit_block(Refit(), student, teacher, 40, torch.float32))
        student.finish()
        teacher.finish()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
