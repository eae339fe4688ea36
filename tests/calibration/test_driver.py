"""Block by block is the model itself, and statistics are what a naive look at the whole model gives."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, UNLISTED, VOCAB, save_tiny, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from calibration.shared import STORIES, STORIES_TEXT, TALES_MOE, needs_shared
from secateur.anatomy.model import Block
from secateur.calibration.driver import Driver
from secateur.calibration.source import FolderSource, MemorySource
from secateur.calibration.windows import Windows, load_windows
from secateur.checkpoint.reader import Checkpoint
from secateur.core.errors import CalibrationError
from secateur.core.statistics import InputStatistics

ALL = {"second_moment", "mean", "hessian"}
DENSE = ("llama", "gpt2", "gemma2", "opt")
SPARSE = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3")

Found = list[dict[str, list[InputStatistics]]]


def windows_of(count: int = 5, length: int = 24, seed: int = 0) -> Windows:
    return Windows.of(torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed)))


def observe_all(driver: Driver) -> Found:
    found = []
    for block in driver.blocks():
        found.append(block.observe(ALL))
        block.finish()
    return found


def logits_of(driver: Driver) -> list[Tensor]:
    return [driver.logits(batch) for batch in range(len(driver.batches))]


def require_close(ours: Found, theirs: Found, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest entry of each statistic."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            for a, b in zip(mine[name], other[name], strict=True):
                assert (a.tokens, a.sequences) == (b.tokens, b.sequences), name
                for x, y in ((a.second_moment, b.second_moment), (a.mean, b.mean), (a.hessian, b.hessian)):
                    scale = tolerance * float(b.hessian.abs().max()) + 1e-12
                    assert float((x - y).abs().max()) <= scale, name


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_without_changes_activations_and_logits_are_the_model_s_own(family: str) -> None:
    model, windows = tiny_model(family), windows_of()
    driver = Driver(MemorySource(model), windows, batch_size=2)
    with torch.no_grad():
        whole = [model(b.ids, output_hidden_states=True, use_cache=False) for b in windows.batches(2)]
    for block in driver.blocks():
        held = driver._held
        for batch, expected in zip(held.batches, whole, strict=True):
            assert torch.equal(held.input(batch), expected.hidden_states[block.index])
        block.observe({"second_moment"})
        assert block.finish() == 0.0
    for ours, expected in zip(logits_of(driver), whole, strict=True):
        assert torch.equal(ours, expected.logits)


@needs_shared
@pytest.mark.parametrize("folder", [STORIES, TALES_MOE], ids=lambda folder: folder.name)
def test_trained_models_are_reproduced_from_their_files(folder: Path) -> None:
    windows = load_windows(
        str(STORIES_TEXT), tokenizer=AutoTokenizer.from_pretrained(folder), samples=6, length=128
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    driver = Driver(FolderSource(Checkpoint.open(folder)), windows, batch_size=4)
    for block in driver.blocks():
        block.finish()
    with torch.no_grad():
        for ours, batch in zip(logits_of(driver), windows.batches(4), strict=True):
            assert torch.equal(ours, model(batch.ids, use_cache=False).logits)


def seen_by_matrices(model: PreTrainedModel, block: Block, windows: Windows) -> Iterator[tuple[str, Tensor]]:
    """Every plain matrix of a block with the tokens it multiplies, by a hook on its own module."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for matrix in block.matrices:
        if matrix.expert is None:
            module = model.get_submodule(f"{block.prefix}.{matrix.name}")
            inputs = seen.setdefault(matrix.name, [])
            hook = lambda module, args, kept=inputs: kept.append(args[0].detach().flatten(0, -2))  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(windows.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return ((name, torch.cat(parts)) for name, parts in seen.items())


def require_naive(found: InputStatistics, x: Tensor, tolerance: float = 1e-5) -> None:
    x = x.double()
    assert found.tokens == len(x)
    torch.testing.assert_close(found.second_moment, x.square().sum(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.mean, x.sum(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.hessian, (x.T @ x).float(), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_what_each_matrix_multiplies(family: str) -> None:
    model, windows = tiny_model(family), windows_of()
    driver = Driver(MemorySource(model), windows, batch_size=len(windows))
    for found, block in zip(observe_all(driver), driver.source.anatomy.blocks, strict=True):
        sites = {matrix.name: matrix.input for matrix in block.matrices}
        for name, x in seen_by_matrices(model, block, windows):
            require_naive(found[sites[name]][0], x)
        assert set(found) == set(sites.values())
        assert all(one.sequences == len(windows) for several in found.values() for one in several)


@pytest.mark.parametrize("family", SPARSE)
def test_statistics_of_experts_are_those_of_tokens_routed_to_them(family: str) -> None:
    """By brute force: each token through each of its experts, with the matrices as (out, in)."""
    model, windows = tiny_model(family), windows_of()
    driver = Driver(MemorySource(model), windows, batch_size=2)
    block = driver.source.anatomy.blocks[-1]
    found = observe_all(driver)[-1]
    experts = model.get_submodule(block.prefix).mlp.experts
    calls: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        model(windows.ids, use_cache=False)
    handle.remove()
    parameters = model.get_submodule(block.prefix).state_dict()
    (hidden, routes, _), firsts = calls[0], block.readers("experts_input")
    for expert, first in enumerate(firsts):
        tokens = [token for token in range(len(hidden)) if expert in routes[token].tolist()]
        x = hidden[tokens]
        bias = parameters.get(first.parameter + "_bias", torch.zeros(1, 1).expand(len(firsts), 1))[expert]
        with torch.no_grad():
            activated = experts._apply_gate(x @ first.view(parameters).T + bias)
        require_naive(found["experts_input"][expert], x)
        require_naive(found["experts_hidden"][expert], activated)
    assert sum(one.tokens for one in found["experts_input"]) == routes.numel()


@pytest.mark.parametrize("family", [*DENSE, *SPARSE])
def test_batch_size_and_order_do_not_matter(family: str) -> None:
    model, windows = tiny_model(family), windows_of(6)
    one = observe_all(Driver(MemorySource(model), windows, batch_size=1))
    require_close(observe_all(Driver(MemorySource(model), windows, batch_size=4)), one, 1e-6)
    reordered = Windows.of(windows.ids[torch.tensor([3, 0, 5, 1, 4, 2])])
    require_close(observe_all(Driver(MemorySource(model), reordered, batch_size=4)), one, 1e-6)


def padded(windows: Windows, lengths: list[int], left: bool) -> Windows:
    """The first `length` tokens of each window, pushed to one side of a row with other tokens as padding."""
    ids = windows.ids.flip(0).roll(7, 1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        where = slice(ids.shape[1] - length, None) if left else slice(length)
        ids[row, where] = windows.ids[row, :length]
        mask[row, where] = True
    return Windows.of(ids, mask)


def added(parts: list[Found]) -> Found:
    """Statistics of several runs as if of one."""
    total = parts[0]
    for part in parts[1:]:
        for mine, other in zip(total, part, strict=True):
            for name in mine:
                for a, b in zip(mine[name], other[name], strict=True):
                    a.tokens, a.sequences = a.tokens + b.tokens, a.sequences + b.sequences
                    a.second_moment, a.mean = a.second_moment + b.second_moment, a.mean + b.mean
                    a.hessian = a.hessian + b.hessian
    return total


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt_neox", "qwen3_moe", "gpt_oss"])
def test_padding_never_counts(family: str, left: bool) -> None:
    model, windows, lengths = tiny_model(family), windows_of(3), [24, 9, 17]
    driver = Driver(MemorySource(model), padded(windows, lengths, left), batch_size=2)
    ours = observe_all(driver)
    alone = [Windows.of(windows.ids[row : row + 1, :length]) for row, length in enumerate(lengths)]
    require_close(ours, added([observe_all(Driver(MemorySource(model), one)) for one in alone]), 2e-6)
    logits = torch.cat([part.flatten(0, 1) for part in logits_of(driver)])[driver.windows.mask.flatten()]
    with torch.no_grad():
        expected = torch.cat([model(one.ids, use_cache=False).logits[0] for one in alone])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_changed_blocks_feed_the_next_while_matrices_see_the_dense_block(family: str) -> None:
    """Statistics of every block equal those of a model whose earlier blocks are changed and itself is not."""
    model, windows = tiny_model(family), windows_of()
    changing, reference = copy.deepcopy(model), copy.deepcopy(model)
    source = MemorySource(changing)
    for block in Driver(source, windows).blocks():
        found = block.observe(ALL)
        sites = {matrix.name: matrix.input for matrix in block.block.matrices}
        for name, x in seen_by_matrices(reference, block.block, windows):
            require_naive(found[sites[name]][0], x)
        own = reference.get_submodule(block.block.prefix).state_dict()
        before = {name: tensor.clone() for name, tensor in own.items()}
        for matrix in block.block.matrices:
            matrix.view(block.parameters)[:, ::2] = 0
            matrix.view(own)[:, ::2] = 0
        error = block.finish()
        assert 0 < error < 1
        assert error == pytest.approx(block_error(reference, block.block, before, windows), rel=1e-4)


def block_error(model: PreTrainedModel, block: Block, dense: dict[str, Tensor], windows: Windows) -> float:
    """Relative squared error of the output of a changed block against that with its dense parameters."""
    outputs = []
    handle = model.get_submodule(block.prefix).register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    changed = {
        name: tensor.clone() for name, tensor in model.get_submodule(block.prefix).state_dict().items()
    }
    with torch.no_grad():
        for parameters in (changed, dense, changed):
            model.get_submodule(block.prefix).load_state_dict(parameters)
            model(windows.ids, use_cache=False)
    handle.remove()
    return float((outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum())


def test_an_unfinished_block_is_an_error_and_every_block_is_stored(tmp_path: Path) -> None:
    source = FolderSource(Checkpoint.open(save_tiny("llama", tmp_path)))
    driver = Driver(source, windows_of())
    blocks = driver.blocks()
    assert not any(tensor.is_meta for tensor in next(blocks).parameters.values())
    with pytest.raises(RuntimeError, match="block 0 was not finished"):
        next(blocks)
    assert all(parameter.is_meta for parameter in source.model.model.layers.parameters())
    with pytest.raises(RuntimeError, match="after the last block"):
        driver.logits(0)


def test_a_pass_without_activations_only_opens_blocks() -> None:
    driver = Driver(MemorySource(tiny_model("llama")), windows_of())
    for block in driver.blocks(forward=False):
        with pytest.raises(RuntimeError, match="observes nothing"):
            block.observe({"mean"})
        assert block.finish() is None
    with pytest.raises(RuntimeError, match="logits"):
        driver.logits(0)


def test_the_last_block_need_not_run_where_nobody_reads_its_outputs() -> None:
    model, windows = tiny_model("llama"), windows_of()
    whole, lean = (Driver(MemorySource(copy.deepcopy(model)), windows, batch_size=2) for _ in range(2))
    errors: list[list[float | None]] = [[], []]
    for driver, outputs, found in zip((whole, lean), (True, False), errors, strict=True):
        for block in driver.blocks(outputs=outputs):
            block.observe({"mean"}, record_output=block.index != 0)
            block.block.matrices[0].view(block.parameters)[0] = 0
            found.append(block.finish())
    assert errors[0] == errors[1]
    assert errors[0][0] is None
    assert len(logits_of(whole)) == 3
    with pytest.raises(RuntimeError, match="logits"):
        lean.logits(0)


def test_embeddings_are_not_held_while_blocks_are_pruned(tmp_path: Path) -> None:
    source = FolderSource(Checkpoint.open(save_tiny("llama", tmp_path)))
    windows = Windows.of(torch.arange(24).view(2, 12))
    embedding = source.trunk.get_submodule(source.anatomy.embedding)
    for block in Driver(source, windows).blocks(outputs=False):
        assert embedding.weight.is_meta
        block.finish()
    driver = Driver(source, windows)
    for block in driver.blocks():
        block.finish()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(driver.logits(0), stock(windows.ids).logits)


def test_a_block_is_gone_before_the_next_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, held, left = FolderSource(Checkpoint.open(save_tiny("llama", tmp_path))), [], []
    original = source.open

    def opening(index: int) -> Any:
        left.append(sum(reference() is not None for reference in held))
        return original(index)

    monkeypatch.setattr(source, "open", opening)
    for block in Driver(source, windows_of()).blocks():  # the name `block` outlives its turn
        held += [weakref.ref(tensor) for tensor in block.parameters.values()]
        block.finish()
    assert left == [0] * len(source.anatomy.blocks)


def test_a_gradient_is_no_matter_of_a_forward() -> None:
    driver = Driver(MemorySource(tiny_model("llama")), windows_of())
    for block in driver.blocks():
        assert block.observe({"gradient"}) == {}
        assert block.finish() == 0.0


def test_passes_may_be_repeated() -> None:
    driver = Driver(MemorySource(tiny_model("llama")), windows_of())
    require_close(observe_all(driver), observe_all(driver), 0.0)


def test_windows_the_model_cannot_take_are_refused_at_once() -> None:
    with pytest.raises(CalibrationError, match="vocabulary"):
        Driver(MemorySource(tiny_model("llama")), Windows.of(torch.tensor([[1, VOCAB]])))


def test_global_settings_are_left_alone() -> None:
    precision, state = torch.get_float32_matmul_precision(), torch.random.get_rng_state()
    model = tiny_model("llama").train()
    for block in Driver(MemorySource(model), windows_of()).blocks():
        assert torch.is_grad_enabled()
        block.observe(ALL)
        block.finish()
    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
