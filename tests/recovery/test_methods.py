"""Options, the learning-rate curve, ranks, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config

from secateur.anatomy.resolve import resolve
from secateur.core.errors import MissingExtraError, RecipeError
from secateur.recipe import Recovery
from secateur.recovery import base
from secateur.recovery.base import RECOVERIES, learning_rate
from secateur.recovery.lora import Lora, spread_ranks


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_parts_of_a_schedule_that_meet_are_one_curve(schedule: str) -> None:
    whole = [learning_rate(step, 100, schedule=schedule, floor=0.1) for step in range(100)]
    first = [learning_rate(step, 30, schedule=schedule, floor=0.1, part=(0, 0.3)) for step in range(30)]
    rest = [learning_rate(step, 70, schedule=schedule, floor=0.1, part=(0.3, 1)) for step in range(70)]
    assert first + rest == pytest.approx(whole)
    assert max(whole) <= 1
    assert whole[:5] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert whole[99] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.05)


def test_wsd_is_constant_until_it_decays() -> None:
    curve = [learning_rate(step, 100, schedule="wsd", decay=0.2) for step in range(100)]
    assert set(curve[5:80]) == {1.0}
    assert curve[90] == pytest.approx(0.475)


def test_ranks_follow_importance_at_a_fixed_sum() -> None:
    assert spread_ranks(torch.full((6,), 0.2), 8) == [8] * 6
    ranks = spread_ranks(torch.tensor([0.05, 0.1, 0.2, 0.4]), 8)
    assert sum(ranks) == 32
    assert ranks == sorted(ranks)
    assert ranks[0] < 8 < ranks[-1]
    extreme = spread_ranks(torch.tensor([0.0, 0.0, 0.0, 1.0]), 1)
    assert min(extreme) >= 1


def test_the_settings_of_the_command_line_are_options() -> None:
    method = Recovery(text="t", rank=4, learning_rate=0.5, options={"alpha": 2}).method()
    assert (method.rank, method.learning_rate, method.alpha) == (4, 0.5, 2)  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="rank"):
        Recovery(how="full", text="t", rank=4).method()
    with pytest.raises(RecipeError, match="did you mean 'lora'"):
        Recovery(how="lorra", text="t").method()
    with pytest.raises(RecipeError, match="schedule_start"):
        Recovery(text="t", options={"schedule_start": 0.6, "schedule_end": 0.5}).method()


def test_every_option_says_what_it_is() -> None:
    for _, method in RECOVERIES:
        assert all(field.description for field in method.model_fields.values())


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"peft is not installed.*pip install 'secateur\[recover\]'"):
        Lora().require_packages()
    RECOVERIES.get("full")().require_packages()


def test_fused_experts_are_refused_unless_skipped() -> None:
    anatomy = resolve(tiny_config("qwen3_moe"))
    with pytest.raises(RecipeError, match="skip_experts"):
        Lora().check(anatomy)
    Lora(skip_experts=True).check(anatomy)
    with pytest.raises(RecipeError, match="has 'turns'"):
        Lora(rank_from="importance").check_importance(None, 2)
