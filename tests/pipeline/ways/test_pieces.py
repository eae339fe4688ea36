"""Sub-block searches on files: the right pieces, exact against a silenced model, resumable, loadable."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from elsewhere import IDS, loaded_elsewhere
from small_runs import interrupted, same_bytes, text_beside
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.parts import parts_of
from secateur.calibration.driver import Driver
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import Windows
from secateur.core.errors import AnatomyError, InputError, RecipeError
from secateur.evaluation.quality import perplexity, predicted_tokens
from secateur.pipeline.ways import pieces, variants
from secateur.pipeline.ways.variants import Variants
from secateur.report.model import Report
from secateur.structure.base import Piece

prune = partial(small_runs.prune, method="blockpruner", calibration={"batch_size": 2})


def dense_of(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def silence(model: Any, gone: list[tuple[int, str]]) -> None:
    with torch.no_grad():
        for block, part in gone:
            layer = model.model.layers[block]
            (layer.self_attn.o_proj if part == "self_attn" else layer.mlp.down_proj).weight.zero_()


def removed(report: Report) -> list[tuple[int, str]]:
    return [(row.block, row.matrix) for row in report.layers if row.sparsity]


def windows_of(model: Path) -> Windows:
    from transformers import AutoTokenizer

    from secateur.calibration.windows import load_windows

    tokenizer = AutoTokenizer.from_pretrained(model)
    return load_windows(text_beside(model), tokenizer=tokenizer, samples=6, length=24)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_result_is_the_silenced_model(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=4)
    report = prune(model, tmp_path / "out", sparsity=0.4)
    dense, here = dense_of(model), dense_of(tmp_path / "out")
    silence(dense, removed(report))
    with torch.no_grad():
        assert torch.equal(here(IDS).logits, dense(IDS).logits)
    assert report.parameters_after == sum(p.numel() for p in here.parameters())


def test_the_result_loads_in_a_fresh_process_without_secateur(tmp_path: Path) -> None:
    model, out = save_tiny("llama", tmp_path / "model", num_hidden_layers=4), tmp_path / "out"
    prune(model, out, sparsity=0.4)
    assert torch.equal(loaded_elsewhere(out, "remote").logits, dense_of(out)(IDS).logits)


def test_one_removal_is_an_exhaustive_search(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    report = prune(model, tmp_path / "out", sparsity=0.09)
    windows, found = windows_of(model), {}
    for block in range(4):
        for part in ("self_attn", "mlp"):
            dense = dense_of(model)
            silence(dense, [(block, part)])
            found[block, part] = perplexity(MemorySource(dense), windows)
    rows = json.loads((tmp_path / "out" / "order.json").read_text())
    first = (rows[0]["block"], rows[0]["part"])
    assert first == min(found, key=lambda piece: found[piece])
    assert rows[0]["perplexity"] == pytest.approx(found[first], rel=1e-5)
    if rows[0]["part"] == "self_attn":
        assert removed(report) == [first]


def test_pieces_that_do_nothing_go_first_and_whole_blocks_vanish(tmp_path: Path) -> None:
    """On a trained model: on a random one other pieces may be worse than nothing."""
    model, source = tmp_path / "model", Path(secateur.inspect("seedling")["folder"])
    shutil.copytree(source, model)
    dense = dense_of(source)
    silence(dense, [(2, "self_attn"), (2, "mlp"), (0, "self_attn")])
    dense.save_pretrained(model)
    report = prune(model, tmp_path / "out", sparsity=0.21)
    assert sorted(removed(report)) == [(0, "self_attn"), (2, "mlp"), (2, "self_attn")]
    assert report.kl_divergence == pytest.approx(0, abs=1e-6)
    pruned = dense_of(tmp_path / "out")
    assert len(pruned.model.layers) == 5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"] == {
        "0": {"skip": ["self_attn"]}
    }
    with torch.no_grad():
        assert torch.equal(pruned(IDS).logits, dense(IDS).logits)


def test_whole_blocks_alone_are_the_stock_class(tmp_path: Path) -> None:
    model = save_tiny("stablelm", tmp_path / "model", num_hidden_layers=4)
    with pytest.raises(AnatomyError, match="whole blocks"):
        prune(model, tmp_path / "out", sparsity=0.5)
    report = prune(model, tmp_path / "out", sparsity=0.5, options={"unit": "layer"})
    assert [part for _, part in removed(report)] == ["block", "block"]
    pruned = dense_of(tmp_path / "out")
    assert type(pruned).__name__ == "StableLmForCausalLM"
    assert len(pruned.model.layers) == 2


def test_blocks_that_change_with_their_place_stay_as_empty_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("deepseek_v3", tmp_path / "model", num_hidden_layers=4)
    lost = [Piece(0, "self_attn", 1), Piece(0, "mlp", 1)]
    monkeypatch.setattr(pieces, "chosen", lambda *_: lost)
    prune(model, tmp_path / "out", sparsity=0.2)
    pruned, dense = dense_of(tmp_path / "out"), dense_of(model)
    assert len(pruned.model.layers) == 4
    assert not list(pruned.model.layers[0].parameters())
    silence(dense, [(0, "self_attn"), (0, "mlp")])
    with torch.no_grad():
        assert torch.equal(pruned(IDS).logits, dense(IDS).logits)


def test_the_whole_toolkit_goes_on_with_the_result(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    once = tmp_path / "once"
    prune(model, once, sparsity=0.25)
    assert secateur.inspect(once)["family"] == "llama"
    text = str(tmp_path / "text.txt")
    assert secateur.evaluate(once, against=model, text=text, windows=2, length=24)["kl_divergence"] > 0
    assert secateur.bench(once, repeats=1, new_tokens=3, prompt_tokens=8)["bytes"] > 0
    for method in ("wanda", "flap", "osscar", "shortgpt", "blockpruner"):
        again = prune(once, tmp_path / method, method=method, sparsity=0.3)
        loaded = dense_of(tmp_path / method)
        assert again.parameters_after == sum(p.numel() for p in loaded.parameters())
        assert (again.parameters_after < again.parameters_before) == (method != "wanda")
    prune(tmp_path / "flap", tmp_path / "last", sparsity=0.2)
    dense_of(tmp_path / "last")


def test_orders_are_nested_and_plan_other_sparsities(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    prune(model, tmp_path / "more", sparsity=0.5)
    prune(model, tmp_path / "less", sparsity=0.25)
    orders = [json.loads((tmp_path / name / "order.json").read_text()) for name in ("less", "more")]
    assert orders[0] == orders[1][: len(orders[0])]
    scores = str(tmp_path / "more" / "scores.safetensors")
    prune(model, tmp_path / "again", sparsity=0.25, scores=scores)
    assert same_bytes(tmp_path / "again", tmp_path / "less")
    with pytest.raises(InputError, match="do not reach"):
        prune(model, tmp_path / "out", sparsity=0.8, scores=scores)
    with pytest.raises(InputError, match="scores of options"):
        prune(model, tmp_path / "out", sparsity=0.25, scores=scores, options={"unit": "layer"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"shortlist": 3}])
def test_a_search_that_was_interrupted_ends_in_the_same_bytes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    prune(model, tmp_path / "whole", sparsity=0.5, options=options)
    with interrupted(4, Variants, "losses"):
        prune(model, tmp_path / "out", sparsity=0.5, options=options)
    before = len(json.loads((tmp_path / "out" / ".secateur" / "scratch" / "order.json").read_text()))
    assert before >= 2
    prune(model, tmp_path / "out", resume=True, sparsity=0.5, options=options)
    assert same_bytes(tmp_path / "out", tmp_path / "whole", "scores.safetensors", "order.json")


@pytest.mark.parametrize("streamed", [False, True])
def test_variants_are_models_with_silenced_parts(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("gemma2", tmp_path / "model", num_hidden_layers=3)
    windows, dense = windows_of(model), dense_of(model)
    if streamed:
        monkeypatch.setattr(variants, "MODEL_FRACTION", 0)
    looked = Variants(Driver(MemorySource(dense), windows, batch_size=2), parts_of(dense.config))
    pieces = [Piece(block, part, 1) for block in range(3) for part in ("self_attn", "mlp")]
    gone = {0: frozenset({"mlp"}), 2: frozenset({"self_attn", "mlp"})}
    left = [piece for piece in pieces if piece.part not in gone.get(piece.block, ())]
    behind: list[int] = []
    assert len(looked.groups(3)) == (1 if streamed else 3)
    found = looked.losses(gone, left, tick=behind.append)
    assert sum(behind) == 3 * len(left)
    for piece, loss in zip(left, found, strict=True):
        other = dense_of(model)
        silence(other, [(0, "mlp"), (2, "self_attn"), (2, "mlp"), (piece.block, piece.part)])
        expected = torch.tensor(perplexity(MemorySource(other), windows)).log() * predicted_tokens(windows)
        assert loss == pytest.approx(float(expected), rel=1e-5)
    lowest = min(found)
    bounded = looked.losses(gone, left, bound=lowest)
    assert [loss if loss == lowest else torch.inf for loss in found] == bounded


def test_a_bound_gives_up_before_the_last_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    looked = Variants(
        Driver(MemorySource(dense_of(model)), windows_of(model), batch_size=1),
        parts_of(dense_of(model).config),
    )
    pieces = [Piece(block, "mlp", 1) for block in range(3)]
    totals, counted = looked.losses({}, pieces), []
    monkeypatch.setattr(variants, "summed_loss", lambda *given: counted.append(1) or summed(*given))
    assert looked.losses({}, pieces, bound=min(totals) / 2) == [torch.inf] * 3
    assert len(counted) < 6 * 3


summed = variants.summed_loss


def test_a_share_that_no_pieces_make_is_refused(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    for sparsity in (0.01, 0.97):
        with pytest.raises(RecipeError, match="smallest piece"):
            prune(model, tmp_path / "out", sparsity=sparsity)
    assert not (tmp_path / "out").exists()
