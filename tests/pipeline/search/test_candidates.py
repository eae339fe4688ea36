"""Candidates are judged as whole models would be, however they are run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.anatomy.units import units_of
from secateur.calibration.source import FolderSource
from secateur.calibration.windows import Windows
from secateur.checkpoint.reader import Checkpoint
from secateur.pipeline.search import candidates as judging
from secateur.pipeline.search.candidates import Judge, Reference
from secateur.pipeline.search.supernet import Supernet
from secateur.structure.levels import Version, ladders
from secateur.structure.tyr import Tyr

VOCAB = 320
LEVELS = [(0,) * 6, (1, 0, -1, 0, 0, 0), (1, 0, -1, 0, 0, 2), (0, 0, 0, 0, 0, 2), (1, 0, 0, -1, 0, 0)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        "llama", tmp_path_factory.mktemp("candidates") / "model", num_hidden_layers=3, num_key_value_heads=4
    )


@pytest.fixture(scope="module")
def windows() -> Windows:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[3, :4] = False
    return Windows.of(torch.randint(1, VOCAB, (5, 12), generator=generator), mask)


@pytest.fixture(scope="module")
def supernet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Supernet:
    """Levels whose matrices are arbitrary."""
    folder = tmp_path_factory.mktemp("supernet")
    blocks = source_of(model).anatomy.blocks
    groups = [(block.index, units) for block in blocks for units in units_of(block)]
    made = Supernet(folder, ladders(groups, [units.count // 2 for _, units in groups], 0, Tyr()))
    generator = torch.Generator().manual_seed(1)
    for block in blocks:
        versions = {}
        for ladder in made.of_block(block.index):
            order = torch.randperm(ladder.units.count, generator=generator)
            versions[ladder.units.kind] = {
                level: drawn(
                    ladder.units.others(order[: ladder.removed_at(level)]), ladder.units.width, generator
                )
                for level in range(ladder.lowest, ladder.highest + 1)
            }
        made.save(block.index, versions)
    return made


def drawn(kept: Tensor, width: int, generator: torch.Generator) -> Version:
    return Version(kept, 0.1 * torch.randn(64, len(kept) * width, generator=generator))


def source_of(model: Path) -> FolderSource:
    return FolderSource(Checkpoint.open(model))


def divergence(dense: Tensor, other: Tensor, k: int) -> Tensor:
    """KL over the k tokens that the first finds likeliest, of logits (..., V)."""
    at = dense.topk(k).indices
    p, q = (logits.double().gather(-1, at).log_softmax(-1) for logits in (dense, other))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("k", [7, VOCAB, 10_000])
@pytest.mark.parametrize("resident", [True, False])
def test_a_candidate_is_the_dense_model_with_its_matrices(
    k: int, resident: bool, model: Path, windows: Windows, supernet: Supernet
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    changed = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        for ladder, level in zip(supernet.ladders, LEVELS[2], strict=True):
            version = supernet.read(ladder.block)[ladder.units.kind][level]
            view = ladder.units.writer.view(dict(changed.model.layers[ladder.block].state_dict()))
            view.zero_()[:, ladder.units.columns(version.kept)] = version.weight
        rows = torch.tensor([0, 3, 4])
        mask = windows.mask[rows].long()  # type: ignore[index]
        inputs = {"input_ids": windows.ids[rows], "attention_mask": mask}
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        a, b = (each(**inputs).logits for each in (dense, changed))
    counted = mask[:, :-1].bool() & mask[:, 1:].bool()
    expected = divergence(a, b, min(k, VOCAB))[:, :-1][counted].mean()
    reference = Reference.of_model(source_of(model), windows, k)
    judge = Judge(source_of(model), supernet, {"search": reference}, resident=resident)
    assert judge([LEVELS[2]], "search", rows.tolist())[0] == pytest.approx(float(expected), rel=1e-4)
    entropy = torch.nn.functional.cross_entropy(
        b[:, :-1].transpose(1, 2), windows.ids[rows][:, 1:], reduction="none"
    )[counted].mean()
    by_text = Judge(source_of(model), supernet, {"text": Reference.of_text(windows)}, resident=resident)
    assert by_text([LEVELS[2]], "text", rows.tolist())[0] == pytest.approx(float(entropy), rel=1e-4)


def test_equal_models_do_not_diverge_and_shifts_of_logits_do_not_count(model: Path, windows: Windows) -> None:
    reference = Reference.of_model(source_of(model), windows, VOCAB)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model).eval()(windows.ids[:3]).logits[:, :-1]
    flat, places = logits.flatten(0, 1), reference.place[:3, :-1].flatten()
    targets = torch.zeros(len(flat), dtype=torch.int64)
    assert reference.losses(flat, targets, places).abs().max() < 1e-6
    assert reference.losses(flat + 5, targets, places).abs().max() < 1e-5
    assert reference.losses(flat * 2, targets, places).min() > 1e-4


def test_nothing_depends_on_what_else_is_judged_or_where_the_blocks_are(
    model: Path, windows: Windows, supernet: Supernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = {"search": Reference.of_model(source_of(model), windows, 20)}
    judge = Judge(source_of(model), supernet, reference, resident=True)
    rows = range(5)
    together = judge([*LEVELS, LEVELS[0]], "search", rows)
    assert together[0] == together[-1]
    assert len(set(together)) == len(LEVELS)
    assert [judge([levels], "search", rows)[0] for levels in reversed(LEVELS)] == together[:-1][::-1]
    streaming = Judge(source_of(model), supernet, reference, resident=False)
    assert streaming(LEVELS, "search", rows) == together[:-1]
    monkeypatch.setattr(judging, "STATE_BYTES", 1)
    assert streaming(LEVELS, "search", rows) == together[:-1]
    assert not any(p.numel() for p in streaming.source.model.model.layers.parameters() if not p.is_meta)


def test_beginnings_are_run_once(
    model: Path, windows: Windows, supernet: Supernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(source_of(model), supernet, {"search": Reference.of_text(windows)}, resident=True)
    runs = []
    run = judge._forward.run
    monkeypatch.setattr(judge._forward, "run", lambda *a: runs.append(a[1]) or run(*a))
    judge(LEVELS, "search", range(5))
    distinct = [{levels[:stop] for levels in LEVELS} for stop in (2, 4, 6)]
    assert len(runs) == sum(map(len, distinct)) == 2 + 3 + 5


def test_few_likely_tokens_are_kept_where_memory_is_short(
    model: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "REFERENCE_BYTES", windows.tokens * 8 * 3)
    reference = Reference.of_model(source_of(model), windows, 100)
    assert reference.likely is not None
    assert reference.likely.shape[1] == 3
