"""PruneNet on planted matrices: what each policy can learn, and that it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_config
from torch import Tensor

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import units_of
from secateur.core.errors import InputError, RecipeError
from secateur.core.progress import SILENT
from secateur.core.statistics import InputStatistics
from secateur.structure.base import UnitProblem
from secateur.structure.prunenet import PruneNet
from secateur.structure.spectral import ks_distance, singular_values

ROWS, COLUMNS, BLOCKS = 160, 48, 3
KEPT = int(0.7 * ROWS)


def problem(gate: Tensor, index: int = 0, up: Tensor | None = None) -> UnitProblem:
    """Of a llama block with this gate matrix (F, d)."""
    rows, columns = gate.shape
    config = tiny_config(
        "llama", hidden_size=columns, intermediate_size=rows, num_attention_heads=4, head_dim=12
    )
    block = resolve(config).blocks[0]
    units = next(found for found in units_of(block) if found.kind == "ffn")
    generator = torch.Generator().manual_seed(index)
    other = torch.randn(2, rows, columns, generator=generator)
    return UnitProblem(
        f"{index}.ffn",
        units,
        other[0].T,
        InputStatistics(rows),
        generator,
        [gate, other[1] if up is None else up],
    )


def planted(symmetric: bool) -> list[UnitProblem]:
    """Six rows of ten are long; they share a mean direction, or have none."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(COLUMNS, generator=generator)
    found = []
    for index in range(BLOCKS):
        gate = 0.3 * torch.randn(ROWS, COLUMNS, generator=generator)
        long = torch.randperm(ROWS, generator=generator)[: int(0.6 * ROWS)]
        gate[long] = torch.randn(len(long), COLUMNS, generator=generator) + 0.7 * direction * (not symmetric)
        found.append(problem(gate, index))
    return found


def distance(problems: list[UnitProblem], scores: list[Tensor]) -> float:
    found = [
        ks_distance(
            singular_values(each.producers[0]),
            singular_values(each.producers[0][own.argsort(descending=True)[:KEPT]]),
        )
        for each, own in zip(problems, scores, strict=True)
    ]
    return float(torch.stack(found).mean())


def learned(problems: list[UnitProblem], seed: int = 0, **options: Any) -> dict[str, Tensor]:
    method = PruneNet.from_options(options)
    return method.prepare(problems, torch.Generator().manual_seed(seed), SILENT)


def scores(problems: list[UnitProblem], prepared: dict[str, Tensor], **options: Any) -> list[Tensor]:
    method = PruneNet.from_options(options)
    found = []
    for each in problems:
        each.prepared = prepared
        found.append(method.score(each))
    return found


@pytest.mark.parametrize(
    ("network", "symmetric", "succeeds"),
    [
        ("linear", False, True),
        ("factored", False, True),
        ("mlp", False, True),
        ("linear", True, False),
        ("mlp", True, True),
    ],
)
def test_policies_learn_what_they_can_represent(network: str, symmetric: bool, succeeds: bool) -> None:
    """A linear policy needs a mean direction: it cannot tell a row from its negative."""
    problems = planted(symmetric)
    prepared = learned(problems, network=network)
    reached = distance(problems, scores(problems, prepared, network=network))
    generator = torch.Generator().manual_seed(0)
    chance = torch.tensor(
        [distance(problems, [torch.rand(ROWS, generator=generator) for _ in problems]) for _ in range(20)]
    )
    assert (reached < float(chance.mean() - 3 * chance.std())) == succeeds
    norms = distance(problems, [each.producers[0].norm(dim=1) for each in problems])
    assert not succeeds or reached < norms + 0.05
    passes = prepared["distances"].mean(1)
    assert reached == pytest.approx(float(passes.min()), abs=0.02), "the best of all passes is what is kept"


def test_the_same_seed_learns_the_same() -> None:
    problems = planted(True)
    first, again, other = (learned(problems, seed, episodes=3) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["u"], other["u"])


FAITHFUL = {"estimator": "faithful", "reward": "inv_ks", "gamma": 0.9, "inference": "sample"}


@pytest.mark.parametrize("options", [{"samples": 1}, {"baseline": False}, {"reward": "w1"}, FAITHFUL])
def test_other_ways_to_learn_stay_finite_and_see_every_block_in_every_pass(options: dict[str, Any]) -> None:
    prepared = learned(planted(False), episodes=3, **options)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in prepared.values())
    assert prepared["distances"].shape == (4, BLOCKS)
    assert (prepared["distances"] > 0).all()


def test_a_state_is_free_of_scale_and_holds_what_was_asked_for() -> None:
    gate = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(6))
    one, other = problem(gate), problem(gate * 100)
    state = PruneNet().state(one)
    assert state.shape == (1, ROWS, COLUMNS)
    assert float(state.square().mean()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(state, PruneNet().state(other))
    three = PruneNet.from_options({"features": "gate_up_down"}).state(one)
    assert three.shape == (3, ROWS, COLUMNS)
    torch.testing.assert_close(three[2] / three[2].norm(), one.weight.T / one.weight.norm())


def test_only_draws_depend_on_the_seed() -> None:
    problems = planted(True)[:1]
    prepared = learned(problems, episodes=1)
    best, again = (scores(problems, prepared)[0] for _ in range(2))
    assert torch.equal(best, again)
    drawn, other = (scores(problems, prepared, inference="sample")[0] for _ in range(2))
    assert not torch.equal(drawn.argsort(), other.argsort())


def saved(path: Path, problems: list[UnitProblem], **options: Any) -> str:
    save_file(learned(problems, episodes=1, **options), path)
    return str(path)


def test_policies_of_other_shapes_are_refused(tmp_path: Path) -> None:
    here, narrow = planted(True), [problem(torch.randn(ROWS, COLUMNS // 2 * 2 - 12))]
    shorter = [problem(torch.randn(ROWS - 8, COLUMNS))]
    for network in ("linear", "mlp", "factored"):
        path = saved(tmp_path / f"{network}.safetensors", here, network=network)
        method = PruneNet.from_options({"policy": path})
        method.check(here)
        with pytest.raises(InputError, match=r"reads \d+ numbers a row.*expected"):
            method.check(narrow)
        if network == "factored":
            with pytest.raises(InputError, match=f"in {ROWS} rows.*in {ROWS - 8} rows"):
                method.check(shorter)
        else:
            method.check(shorter)
    with pytest.raises(InputError, match="is factored; expected linear"):
        PruneNet.from_options({"policy": path, "network": "linear"}).check(here)
    with pytest.raises(RecipeError, match="one width"):
        PruneNet.from_options({"network": "factored"}).check([*here, *shorter])


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("other", "text", "missing"):
        with pytest.raises(InputError, match=r"policy\.safetensors of a run"):
            PruneNet.from_options({"policy": str(tmp_path / f"{name}.safetensors")}).check(planted(True))
