"""What is timed, how often and in which order; never how fast."""

from __future__ import annotations

import statistics

import pytest
import torch
from tiny_models import tiny_model

from secateur.core.errors import InputError
from secateur.evaluation.speed import Measurement, SpeedResult, compare_speed, measure_speed

SETTINGS = {"prompt_tokens": 7, "new_tokens": 3, "batch_sizes": (1, 2), "repeats": 3}


def record_calls(model, calls, label):
    """Note who was called, with how many sequences, tokens and tokens in the cache."""

    def note(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else cache.get_seq_length()
        calls.append((label, *kwargs["input_ids"].shape, seen))

    model.register_forward_pre_hook(note, with_kwargs=True)


def test_every_phase_and_batch_size_has_its_repeats():
    result = measure_speed(tiny_model("llama"), **SETTINGS)
    rows = [(row.phase, row.batch_size, len(row.tokens_per_second)) for row in result.measurements]
    assert rows == [("prefill", 1, 3), ("decode", 1, 3), ("prefill", 2, 3), ("decode", 2, 3)]
    assert all(speed > 0 for row in result.measurements for speed in row.tokens_per_second)
    assert (result.device, result.dtype) == ("cpu", "float32")


def test_decode_goes_one_token_a_step_on_the_cache():
    model, calls = tiny_model("llama"), []
    record_calls(model, calls, "m")
    measure_speed(model, prompt_tokens=7, new_tokens=3, batch_sizes=(2,), repeats=1)
    run = [("m", 2, 7, 0), ("m", 2, 1, 7), ("m", 2, 1, 8), ("m", 2, 1, 9)]
    assert calls == run * 2, "a warm-up and one repeat"


def test_decode_is_greedy_generation():
    model, chosen = tiny_model("llama"), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: chosen.append(kwargs["input_ids"]), with_kwargs=True
    )
    measure_speed(model, prompt_tokens=7, new_tokens=4, batch_sizes=(2,), repeats=1)
    hook.remove()
    prompt = chosen[-5]
    steps = torch.cat(chosen[-4:], dim=1)
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(steps, generated[:, 7:])


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "gpt_oss", "deepseek_v3"])
def test_caches_of_other_families(family):
    result = measure_speed(
        tiny_model(family), prompt_tokens=5, new_tokens=2, batch_sizes=(2,), repeats=1, device="cpu"
    )
    assert result.decode(2) > 0


def test_two_models_take_turns():
    calls = []
    models = [tiny_model("llama"), tiny_model("qwen3")]
    for label, model in zip("AB", models, strict=True):
        record_calls(model, calls, label)
    comparison = compare_speed(*models, prompt_tokens=5, new_tokens=1, batch_sizes=(1,), repeats=3)
    prefills = [label for label, _, tokens, _ in calls if tokens == 5]
    assert prefills == ["A", "B"] * 4
    assert [(row.phase, row.batch_size) for row in comparison.ratios] == [("prefill", 1), ("decode", 1)]


def test_ratios_are_medians_over_pairs():
    comparison = compare_speed(tiny_model("llama"), tiny_model("llama"), **SETTINGS)
    for row, of_a, of_b in zip(
        comparison.ratios, comparison.a.measurements, comparison.b.measurements, strict=True
    ):
        pairs = [a / b for a, b in zip(of_a.tokens_per_second, of_b.tokens_per_second, strict=True)]
        assert (row.ratio, row.min, row.max) == (statistics.median(pairs), min(pairs), max(pairs))


def test_the_prompt_is_capped_at_the_positions_of_both_models():
    short, long = tiny_model("llama", max_position_embeddings=20), tiny_model("llama")
    assert measure_speed(short, new_tokens=8, batch_sizes=(1,), repeats=1).prompt_tokens == 12
    comparison = compare_speed(long, short, new_tokens=8, batch_sizes=(1,), repeats=1)
    assert comparison.a.prompt_tokens == comparison.b.prompt_tokens == 12


def test_the_mode_of_the_model_and_the_global_generator_stay():
    model = tiny_model("llama").train()
    state = torch.get_rng_state()
    measure_speed(model, **SETTINGS)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_does_not_run():
    model = tiny_model("gpt2", resid_pdrop=0.9).train()
    seen = []
    model.transformer.drop.register_forward_hook(lambda module, args, out: seen.append(module.training))
    measure_speed(model, **SETTINGS)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"repeats": 0}, "repeats"),
        ({"batch_sizes": (0,)}, "batch sizes"),
        ({"batch_sizes": ()}, "batch sizes"),
        ({"new_tokens": 0}, "new tokens"),
        ({"prompt_tokens": 0}, "prompt tokens"),
        ({"new_tokens": 256}, "256 positions"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(InputError, match=complaint):
        measure_speed(tiny_model("llama"), **{**SETTINGS, **settings})


def test_rows_for_the_report():
    result = SpeedResult(8, 4, "cpu", "float32", (Measurement("decode", 1, (30.0, 10.0, 20.0)),))
    assert result.decode(1) == 20
    assert result.as_dict("seedling")["measurements"] == [
        {"phase": "decode", "batch_size": 1, "model": "seedling", "median": 20.0, "min": 10.0, "max": 30.0}
    ]
    with pytest.raises(InputError, match="batch size 8"):
        result.decode(8)
