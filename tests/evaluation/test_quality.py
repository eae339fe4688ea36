"""Perplexity, divergence and agreement against the plain forward of whole models in memory."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from tiny_models import VOCAB, save_tiny, tiny_model, tiny_tokenizer
from torch.nn import functional

from secateur.calibration.source import FolderSource, MemorySource
from secateur.calibration.windows import Windows, load_windows
from secateur.checkpoint.reader import Checkpoint
from secateur.core.errors import CalibrationError, CheckpointError, InputError
from secateur.evaluation import quality
from secateur.evaluation.quality import Quality, compare_quality, perplexity, protocol_of

FAMILIES = ["llama", "gemma2", "granite", "gpt2", "opt", "gpt_neox", "olmoe", "cohere"]


def some_windows(count: int = 5, length: int = 24, seed: int = 0) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    return Windows.of(torch.randint(1, VOCAB, (count, length), generator=generator))


def padded_windows(side: str) -> tuple[Windows, list[torch.Tensor]]:
    """Rows of different lengths, and the same rows without their padding."""
    rows = [some_windows(1, length, length).ids[0] for length in (24, 9, 17)]
    ids, mask = torch.zeros(3, 24, dtype=torch.int64), torch.zeros(3, 24, dtype=torch.bool)
    for index, row in enumerate(rows):
        real = slice(len(row)) if side == "right" else slice(24 - len(row), 24)
        ids[index, real], mask[index, real] = row, True
    return Windows.of(ids, mask), rows


@torch.no_grad()
def plain_perplexity(model, windows: Windows) -> float:
    losses = [model(row[None], labels=row[None]).loss.double() for row in windows.ids]
    return math.exp(torch.stack(losses).mean())


@torch.no_grad()
def plain_log_probabilities(model, windows: Windows) -> torch.Tensor:
    return model(windows.ids).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_the_plain_forward(family):
    model, windows = tiny_model(family), some_windows()
    found = perplexity(MemorySource(model), windows, batch_size=2)
    assert found == pytest.approx(plain_perplexity(model, windows), rel=1e-5)


def test_a_folder_gives_the_same_as_the_model_in_memory(tmp_path):
    folder = save_tiny("qwen3", tmp_path, dtype=torch.bfloat16)
    model, windows = tiny_model("qwen3", dtype=torch.bfloat16).float(), some_windows()
    found = perplexity(FolderSource(Checkpoint.open(folder)), windows)
    assert found == pytest.approx(plain_perplexity(model, windows), rel=1e-5)


def test_logits_never_exceed_their_budget(monkeypatch):
    model, windows, shapes = tiny_model("gemma2"), some_windows(), []
    whole = perplexity(MemorySource(model), windows)
    monkeypatch.setattr(quality, "HOST_LOGIT_BYTES", 4 * VOCAB * 7)
    source = MemorySource(model)
    source.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert perplexity(source, windows, batch_size=3) == pytest.approx(whole, rel=1e-6)
    assert max(shape.numel() for shape in shapes) == VOCAB * 7
    assert sum(shape.numel() for shape in shapes) == VOCAB * 5 * 23


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model = tiny_model("llama")
    windows, rows = padded_windows(side)
    with torch.no_grad():
        losses = [
            functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum")
            for row in rows
        ]
    tokens = sum(len(row) - 1 for row in rows)
    expected = math.exp(sum(losses) / tokens)
    other_ids = Windows.of(windows.ids.masked_fill(~windows.mask, 7), windows.mask)
    for batch_size in (1, 3):
        found = perplexity(MemorySource(model), windows, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-5)
        assert perplexity(MemorySource(model), other_ids, batch_size=batch_size) == found
    dense, _ = compare_quality(MemorySource(model), MemorySource(model), windows)
    assert dense.tokens == tokens


def test_a_model_agrees_with_itself():
    source, windows = MemorySource(tiny_model("llama")), some_windows()
    both = compare_quality(source, source, windows, batch_size=2)
    assert both[0] == both[1]
    assert both[0].perplexity == perplexity(source, windows, batch_size=2)
    assert (both[1].kl_divergence, both[1].kl_error, both[1].top1_agreement) == (0.0, 0.0, 1.0)


def test_divergence_and_agreement_in_closed_form(monkeypatch):
    monkeypatch.setattr(quality, "HOST_LOGIT_BYTES", 4 * VOCAB * 10)
    dense, pruned, windows = tiny_model("llama"), tiny_model("llama", seed=1), some_windows()
    before, after = compare_quality(MemorySource(dense), MemorySource(pruned), windows, batch_size=2)
    p, q = (plain_log_probabilities(model, windows) for model in (dense, pruned))
    divergence = (p.exp() * (p - q)).sum(-1)
    assert after.kl_divergence == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert after.kl_divergence != pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-3)
    assert after.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert before.perplexity == pytest.approx(plain_perplexity(dense, windows), rel=1e-5)
    assert after.perplexity == pytest.approx(plain_perplexity(pruned, windows), rel=1e-5)
    assert before.tokens == after.tokens == 5 * 23


def test_standard_errors_are_those_of_the_window_means():
    dense, pruned, windows = tiny_model("llama"), tiny_model("llama", seed=1), some_windows()
    _, after = compare_quality(MemorySource(dense), MemorySource(pruned), windows)
    p, q = (plain_log_probabilities(model, windows) for model in (dense, pruned))
    losses = -q.gather(-1, windows.ids[:, 1:, None])[..., 0].mean(1)
    divergence = (p.exp() * (p - q)).sum(-1).mean(1)
    assert after.perplexity_error == pytest.approx(float(losses.std() / 5**0.5) * after.perplexity, rel=1e-4)
    assert after.kl_error == pytest.approx(float(divergence.std() / 5**0.5), rel=1e-4)


def test_one_window_has_no_standard_error():
    source = MemorySource(tiny_model("llama"))
    dense, _ = compare_quality(source, source, some_windows(1))
    assert (dense.perplexity_error, dense.kl_error) == (None, None)


def test_the_model_evaluated_is_left_as_it_was():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perplexity(MemorySource(model), some_windows())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_hopeless_model_has_infinite_perplexity_and_a_warning(caplog):
    model = tiny_model("llama")
    model.lm_head.weight.data *= 1e5
    source = MemorySource(model)
    with caplog.at_level(logging.WARNING, logger="secateur"):
        _, after = compare_quality(source, source, some_windows())
    assert after.perplexity == math.inf
    assert "perplexity is inf" in caplog.text


def test_two_vocabularies_do_not_compare():
    dense, other = tiny_model("llama"), tiny_model("llama", vocab_size=VOCAB + 8)
    with pytest.raises(InputError, match=f"{VOCAB} and {VOCAB + 8}"):
        compare_quality(MemorySource(dense), MemorySource(other), some_windows())


def test_windows_without_anything_to_predict():
    ids = torch.ones(2, 4, dtype=torch.int64)
    mask = torch.tensor([[True, False, True, False]] * 2)
    with pytest.raises(CalibrationError, match="two real tokens"):
        perplexity(MemorySource(tiny_model("llama")), Windows.of(ids, mask, "gaps"))


def test_protocol_tells_everything_that_was_read(tmp_path):
    windows, folder = some_windows(), tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    protocol = protocol_of(windows, torch.bfloat16, folder, split="held out")
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol == {
        "text": "given",
        "text_sha256": windows.sha256,
        "split": "held out",
        "window": 24,
        "stride": 24,
        "windows": 5,
        "tokens": 120,
        "dtype": "bfloat16",
        "tokenizer_sha256": protocol["tokenizer_sha256"],
    }
    other = protocol_of(some_windows(seed=1), torch.bfloat16, folder, split="held out")
    assert {key for key in protocol if protocol[key] != other[key]} == {"text_sha256"}


def test_the_hash_of_a_tokenizer_follows_its_file_or_its_vocabulary(tmp_path):
    windows, tokenizer = some_windows(), tiny_tokenizer()

    def digest(of) -> str:
        return protocol_of(windows, torch.float32, of)["tokenizer_sha256"]

    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert digest(loaded) == digest(tmp_path) == digest(str(tmp_path))
    in_memory = digest(tokenizer)
    assert in_memory == digest(tiny_tokenizer())
    loaded.name_or_path = ""
    loaded.add_tokens(["<new>"])
    assert digest(loaded) != in_memory
    with pytest.raises(CheckpointError, match="no tokenizer"):
        digest(tmp_path / "nothing")


def test_golden_perplexity_of_a_trained_model(shared):
    folder = shared / "models" / "stories260k"
    golden = json.loads((shared / "data" / "golden-stories260k.json").read_text())["perplexity"]
    checkpoint = Checkpoint.open(folder)
    tokenizer = type(tiny_tokenizer()).from_pretrained(folder)
    text = str(shared / "data" / "tinystories" / "test.txt")
    windows = load_windows(text, tokenizer=tokenizer, samples=128, length=256)
    assert perplexity(FolderSource(checkpoint), windows) == pytest.approx(golden["dense"], abs=1e-4)


def test_pruning_a_trained_model_shows(shared):
    folder = shared / "models" / "stories260k"
    tokenizer = type(tiny_tokenizer()).from_pretrained(folder)
    text = str(shared / "data" / "tinystories" / "test.txt")
    windows = load_windows(text, tokenizer=tokenizer, samples=8, length=256)

    def halved(index: int):
        """The block without the weights below the median magnitude of their matrix."""
        names = [name for name in checkpoint.tensors if name.startswith(f"model.layers.{index}.")]
        tensors = checkpoint.read(names)
        return {
            name: tensor * (tensor.abs() > tensor.abs().median()) if tensor.ndim == 2 else tensor
            for name, tensor in tensors.items()
        }

    checkpoint = Checkpoint.open(folder)
    dense, pruned = compare_quality(
        FolderSource(checkpoint), FolderSource(checkpoint, read=halved), windows, batch_size=4
    )
    assert isinstance(pruned, Quality)
    assert pruned.perplexity > 3 * dense.perplexity
    assert pruned.kl_divergence > 0.5
    assert pruned.kl_error < pruned.kl_divergence / 4
    assert pruned.top1_agreement < 0.8
