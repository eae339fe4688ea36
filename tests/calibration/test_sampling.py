"""Text from the model itself: reproducible, independent of batching, distributed as the model says."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from calibration.shared import STORIES, needs_shared
from secateur.calibration.sampling import Vocabulary, sample_windows

FREE = Vocabulary(VOCAB, 0, ())


def sample(model: PreTrainedModel, vocabulary: Vocabulary = FREE, **changes: int) -> torch.Tensor:
    return sample_windows(model, vocabulary, **{"samples": 6, "length": 16, **changes})


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_windows_do_not_depend_on_how_many_are_drawn_at_once(family: str) -> None:
    model = tiny_model(family)
    together = sample(model)
    assert torch.equal(together, sample(model, rows=1))
    assert torch.equal(together, sample(model, rows=4))
    assert torch.equal(together[:3], sample(model, samples=3))
    assert not torch.equal(together, sample(model, seed=1))


def test_the_global_random_state_is_left_alone() -> None:
    model = tiny_model("llama").train()
    before = torch.random.get_rng_state()
    first = sample(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    torch.rand(3)
    assert torch.equal(first, sample(model))


def test_tokens_follow_the_model_s_distribution() -> None:
    """The second token after a fixed start has the softmax of the logits there: a chi-square of 5 sigma."""
    model = tiny_model("llama", vocab_size=24)
    drawn = sample(model, Vocabulary(24, 3, ()), samples=4000, length=2)[:, 1]
    with torch.no_grad():
        expected = model(torch.tensor([[3]])).logits[0, -1].double().softmax(-1) * 4000
    counts = torch.bincount(drawn, minlength=24)
    chi_square = ((counts - expected).square() / expected).sum()
    assert abs(chi_square - 23) < 5 * (2 * 23) ** 0.5


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    assert int(sample(tiny_model("llama"), Vocabulary(7, None, ()), samples=20).max()) < 7


def test_a_text_that_ends_is_followed_by_the_start_of_another() -> None:
    ends = tuple(range(100, VOCAB))
    windows = sample(tiny_model("llama"), Vocabulary(VOCAB, 5, ends))
    after_end = windows[:, 1:][windows[:, :-1] >= 100]
    assert len(after_end) > 10
    assert set(after_end.tolist()) == {5}


def test_without_a_start_the_first_token_is_drawn() -> None:
    first = sample(tiny_model("llama"), Vocabulary(VOCAB, None, ()), samples=50, length=2)[:, 0]
    assert len(set(first.tolist())) > 20


def test_the_start_is_beginning_else_end_else_nothing() -> None:
    tokenizer, config = tiny_tokenizer(), tiny_model("opt").config
    assert Vocabulary.of(tokenizer, config) == Vocabulary(VOCAB, 0, (0,))
    config.bos_token_id, config.eos_token_id = None, [4, 2]
    silent = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert Vocabulary.of(silent, config) == Vocabulary(VOCAB, 4, (4, 2))
    config.eos_token_id = None
    assert Vocabulary.of(silent, config).start is None


@needs_shared
def test_a_trained_model_tells_stories() -> None:
    """Its own text is far more likely to it than chance (6.2 nats a token)."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    windows = sample(model, Vocabulary.of(tokenizer, model.config), samples=4, length=64)
    with torch.no_grad():
        assert float(model(windows, labels=windows).loss) < 2.5
