"""Gradient magnitudes against plain autograd through the whole model, one sequence at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, save_tiny, tiny_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from secateur.anatomy.model import Anatomy
from secateur.calibration.gradient_store import GradientStore, Norm
from secateur.calibration.gradients import collect_gradients
from secateur.calibration.source import FolderSource, MemorySource
from secateur.calibration.windows import Windows
from secateur.checkpoint.reader import Checkpoint
from secateur.core.errors import CalibrationError, ResumeError

LENGTH = 12
Magnitudes = list[dict[str, Tensor]]


def windows_of(count: int = 5, length: int = LENGTH) -> Windows:
    return Windows.of(torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)))


def budget(model: PreTrainedModel, sequences: int) -> int:
    """Bytes in which just so many sequences fit."""
    config = model.config
    return 4 * LENGTH * config.hidden_size * (config.num_hidden_layers + 1) * sequences + 3


def loaded(store: GradientStore) -> Magnitudes:
    return [store.load(block.index) for block in store.anatomy.blocks]


def by_autograd(model: PreTrainedModel, anatomy: Anatomy, sequences: list[Tensor], norm: Norm) -> Magnitudes:
    """The definition: backward of the mean loss of each sequence, magnitudes summed up."""
    total: dict[str, Tensor] = {}
    for ids in sequences:
        model.zero_grad()
        logits = model(ids[None], use_cache=False).logits
        functional.cross_entropy(logits[0, :-1], ids[1:]).backward()
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            part = gradient.abs() if norm == "l1" else gradient.square()
            total[name] = total.get(name, 0) + part
    total = {name: tensor if norm == "l1" else tensor.sqrt() for name, tensor in total.items()}
    return [
        {
            matrix.name: matrix.view({matrix.parameter: total[f"{block.prefix}.{matrix.parameter}"]})
            for matrix in block.matrices
        }
        for block in anatomy.blocks
    ]


def require_close(ours: Magnitudes, expected: Magnitudes, tolerance: float) -> None:
    for mine, other in zip(ours, expected, strict=True):
        assert list(mine) == list(other)
        for name, tensor in other.items():
            assert mine[name].shape == tensor.shape
            scale = float(tensor.abs().max())
            assert float((mine[name] - tensor).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitudes_are_those_of_autograd_through_the_whole_model(family: str, tmp_path: Path) -> None:
    model, windows = tiny_model(family), windows_of()
    norm: Norm = "l1" if len(family) % 2 else "l2"
    store = collect_gradients(
        MemorySource(model), windows, norm=norm, folder=tmp_path, budget_bytes=budget(model, 2)
    )
    assert store.chunks == 3
    require_close(loaded(store), by_autograd(model, store.anatomy, list(windows.ids), norm), 1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_chunks_and_order_do_not_matter(norm: Norm, tmp_path: Path) -> None:
    model, windows = tiny_model("qwen3_moe"), windows_of()
    stores = [
        collect_gradients(MemorySource(model), given, norm=norm, folder=tmp_path / name, budget_bytes=bytes_)
        for name, given, bytes_ in (
            ("whole", windows, 1 << 30),
            ("single", windows, 1),
            ("reordered", Windows.of(windows.ids.flip(0)), budget(model, 2)),
        )
    ]
    assert [store.chunks for store in stores] == [1, 5, 3]
    for store in stores[1:]:
        require_close(loaded(store), loaded(stores[0]), 1e-6)
        assert store.meta["loss"] == pytest.approx(stores[0].meta["loss"], rel=1e-6)


def test_meta_says_what_the_sums_are_of(tmp_path: Path) -> None:
    model, windows = tiny_model("llama"), windows_of()
    store = collect_gradients(MemorySource(model), windows, norm="l2", folder=tmp_path)
    with torch.no_grad():
        loss = model(windows.ids, labels=windows.ids, use_cache=False).loss
    assert store.meta == {"norm": "l2", "sequences": 5, "tokens": 60, "loss": pytest.approx(float(loss))}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_has_no_gradient(left: bool, tmp_path: Path) -> None:
    model, windows, lengths = tiny_model("llama"), windows_of(3), [12, 5, 8]
    ids, mask = windows.ids.flip(0), torch.zeros(3, LENGTH, dtype=torch.bool)
    for row, length in enumerate(lengths):
        where = slice(LENGTH - length, None) if left else slice(length)
        ids[row, where], mask[row, where] = windows.ids[row, :length], True
    store = collect_gradients(MemorySource(model), Windows.of(ids, mask), norm="l1", folder=tmp_path)
    alone = [windows.ids[row, :length] for row, length in enumerate(lengths)]
    require_close(loaded(store), by_autograd(model, store.anatomy, alone, "l1"), 1e-5)
    assert store.meta["tokens"] == sum(lengths)


class Interrupted(MemorySource):
    """Stops for good at a given opening of a block, as a kill would."""

    def __init__(self, model: PreTrainedModel, openings: int) -> None:
        super().__init__(model)
        self.openings, self.opened = openings, 0

    def open(self, index: int) -> nn.Module:
        if self.openings == 0:
            raise KeyboardInterrupt
        self.openings -= 1
        self.opened += 1
        assert all(parameter.is_meta for parameter in self._blocks.parameters()), "two blocks at once"
        return super().open(index)


def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    """Killed before an opening of a block: the first, on the way forward, back, at the end of a chunk."""
    model, windows = tiny_model("llama", num_hidden_layers=3), windows_of()

    def collect(folder: Path, openings: int) -> int:
        source = Interrupted(model, openings)
        collect_gradients(source, windows, norm="l2", folder=folder, budget_bytes=budget(model, 2))
        return source.opened

    assert collect(tmp_path / "whole", 10**6) == 18
    expected = contents(tmp_path / "whole")
    for openings in (0, 4, 6, 8, 11, 17):
        folder = tmp_path / str(openings)
        with pytest.raises(KeyboardInterrupt):
            collect(folder, openings)
        assert collect(folder, 10**6) == 18 - openings // 6 * 6
        assert contents(folder) == expected
        assert collect(folder, 0) == 0, "a finished collection is not repeated"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_kill_while_a_file_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, windows = tiny_model("llama"), windows_of()

    def collect(folder: Path) -> GradientStore:
        return collect_gradients(
            MemorySource(model), windows, norm="l1", folder=folder, budget_bytes=budget(model, 2)
        )

    collect(tmp_path / "whole")
    for replacement in (1, 3, 4, 5):  # of the first state, a block, the state, and a block of the next chunk
        folder = tmp_path / str(replacement)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", dying(replacement))
            with pytest.raises(KeyboardInterrupt):
                collect(folder)
        collect(folder)
        assert contents(folder) == contents(tmp_path / "whole")


def dying(at: int) -> Callable[[Path, Path], None]:
    """`os.replace` that ends the process, so to speak, instead of its call number `at`."""
    replace, calls = os.replace, iter(range(1, at + 1))

    def call(source: Path, target: Path) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        replace(source, target)

    return call


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"norm": "l2"}, "norm 'l1' -> 'l2'"), ({"budget_bytes": 1}, "chunk_sequences")],
)
def test_gradients_of_another_run_are_refused(
    changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    source = MemorySource(tiny_model("llama"))
    collect_gradients(source, windows_of(), norm="l1", folder=tmp_path)
    with pytest.raises(ResumeError, match=reason):
        collect_gradients(source, windows_of(), **{"norm": "l1", "folder": tmp_path, **changes})
    with pytest.raises(ResumeError, match="windows_sha256"):
        collect_gradients(source, windows_of(4), norm="l1", folder=tmp_path)


def test_half_precision_models_are_differentiated_in_float32(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    source = FolderSource(Checkpoint.open(folder), dtype=torch.bfloat16)
    store = collect_gradients(source, windows_of(), norm="l1", folder=tmp_path / "gradients")
    model = tiny_model("llama", dtype=torch.bfloat16).float()
    require_close(loaded(store), by_autograd(model, store.anatomy, list(windows_of().ids), "l1"), 1e-5)


def test_the_model_keeps_no_gradients(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    store = collect_gradients(MemorySource(model), windows_of(), norm="l1", folder=tmp_path)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"gradients.json", *(f"block-{index:05d}.safetensors" for index in range(2))}
    assert "lm_head" not in store.load(0)


def test_windows_the_model_cannot_take_are_refused(tmp_path: Path) -> None:
    windows = Windows.of(torch.tensor([[1, VOCAB]]))
    with pytest.raises(CalibrationError, match="vocabulary"):
        collect_gradients(MemorySource(tiny_model("llama")), windows, norm="l1", folder=tmp_path)


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
