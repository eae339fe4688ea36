"""Taylor terms against plain autograd through the whole model, masks, and a loss that is quadratic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur.anatomy.cut import residual_spaces
from secateur.anatomy.members import Member, Part, members, members_of, whole_members
from secateur.calibration.source import MemorySource
from secateur.calibration.taylor import MemberTerms, Taylor, _Collection, collect_taylor
from secateur.calibration.windows import Windows
from secateur.core.errors import NumericsError
from secateur.core.statistics import BACKWARD, Statistic

LENGTH = 12
SPACES = ("ffn", "heads", "kv_heads")
TERMS: frozenset[Statistic] = BACKWARD - {"gradient"}


def windows_of(count: int = 5) -> Windows:
    return Windows.of(torch.randint(0, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(0)))


def collect(
    model: PreTrainedModel,
    folder: Path,
    windows: Windows,
    terms: Sequence[Statistic] = tuple(TERMS),
    **options: Any,
) -> Taylor:
    source, spaces = MemorySource(model), options.pop("spaces", [SPACES] * model.config.num_hidden_layers)
    wanted = [members(block, own) for block, own in zip(source.anatomy.blocks, spaces, strict=True)]
    return collect_taylor(source, windows, terms=terms, wanted=wanted, scratch=folder, **options)


def gradients(model: PreTrainedModel, windows: Windows) -> list[dict[str, Tensor]]:
    """Of the mean loss of every window."""
    found = []
    for row, ids in enumerate(windows.ids):
        ids = ids if windows.mask is None else ids[windows.mask[row]]
        model.zero_grad()
        logits = model(ids[None], use_cache=False).logits
        functional.cross_entropy(logits[0, :-1], ids[1:]).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def by_autograd(
    model: PreTrainedModel, prefix: str, member: Member, found: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The definitions, element by element."""
    parameters, terms = dict(model.named_parameters()), dict.fromkeys(TERMS, torch.zeros(()).double())
    for part in member.parts:
        name = f"{prefix}.{part.parameter}".lstrip(".")
        weight, each = parameters[name].detach(), torch.stack([gradient[name] for gradient in found])
        mean, square = each.mean(0), each.square().mean(0)
        elements = {
            "taylor_vector": weight * mean,
            "taylor_first": (weight * mean).abs(),
            "taylor_sample": (weight * each).abs().mean(0),
            "taylor_second": (weight * square * weight).abs(),
            "taylor_mixed": (weight * mean - weight * square * weight / 2).abs(),
        }
        for term, values in elements.items():
            rows = values.double().movedim(part.dimension, 0)
            own = rows[part.start : part.start + part.count * part.unit]
            terms[term] = terms[term] + own.reshape(part.count, -1).sum(1)
    return terms


def require_close(own: list[MemberTerms], other: list[MemberTerms]) -> None:
    for a, b in zip(own, other, strict=True):
        for term, values in a.terms.items():
            torch.testing.assert_close(
                values, b.terms[term], rtol=1e-5, atol=1e-5 * float(values.abs().max())
            )


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "opt", "gemma2"])
def test_terms_are_those_of_autograd_through_the_whole_model(family: str, tmp_path: Path) -> None:
    model, windows = tiny_model(family), windows_of()
    found, taylor = gradients(model, windows), collect(model, tmp_path, windows)
    anatomy = MemorySource(model).anatomy
    for block, own in zip(anatomy.blocks, taylor.blocks, strict=True):
        assert {one.member.space for one in own} <= set(SPACES)
        assert len(own) >= 5 - (family in ("gpt2", "opt"))
        for one in own:
            for term, expected in by_autograd(model, block.prefix, one.member, found).items():
                scale = 1e-4 * float(expected.abs().max())
                torch.testing.assert_close(one.terms[term], expected, rtol=1e-4, atol=scale)
    with torch.no_grad():
        loss = model(windows.ids, labels=windows.ids, use_cache=False).loss
    assert taylor.loss == pytest.approx(float(loss), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("budget", [1, 1 << 30])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "granite", "gemma2"])
def test_the_stream_is_felt_outside_the_blocks_too(family: str, budget: int, tmp_path: Path) -> None:
    """Tied or not, with positions, with embeddings that are scaled; in one chunk or one a window."""
    model, windows = tiny_model(family), windows_of()
    source = MemorySource(model)
    spaces = residual_spaces(source.anatomy)
    outer = members_of(source.anatomy.outer_axes, spaces)
    assert len(outer) == (3 if family in ("llama", "granite", "gpt2", "opt") else 2)
    taylor = collect_taylor(
        source,
        windows,
        terms=TERMS,
        wanted=[members(block, spaces) for block in source.anatomy.blocks],
        outer=outer,
        scratch=tmp_path,
        budget_bytes=budget,
    )
    found = gradients(model, windows)
    for one in taylor.outer:
        for term, expected in by_autograd(model, "", one.member, found).items():
            scale = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(one.terms[term], expected, rtol=1e-4, atol=scale)
    assert not any(parameter.requires_grad for parameter in source.model.parameters())


def test_a_block_as_a_whole_is_the_sum_over_all_its_tensors(tmp_path: Path) -> None:
    model, windows = tiny_model("deepseek_v3"), windows_of()
    source = MemorySource(model)
    wanted = [whole_members(block) for block in source.anatomy.blocks]
    taylor = collect_taylor(source, windows, terms=TERMS, wanted=wanted, scratch=tmp_path)
    found = gradients(model, windows)
    for block, own in zip(source.anatomy.blocks, taylor.blocks, strict=True):
        for one in own:
            if one.member.parts[0].parameter.endswith("e_score_correction_bias"):
                assert not any(values.any() for values in one.terms.values())  # a buffer feels nothing
                continue
            expected = by_autograd(model, block.prefix, one.member, found)
            scale = 1e-4 * float(expected["taylor_first"])
            for term in TERMS:
                torch.testing.assert_close(one.terms[term], expected[term], rtol=1e-4, atol=scale)


def test_rows_bring_their_biases_and_fused_matrices_their_segments() -> None:
    biased = members(MemorySource(tiny_model("qwen2")).anatomy.blocks[0], ["kv_heads"])
    assert [one.module for one in biased] == ["self_attn.k_proj", "self_attn.v_proj"]
    assert [len(one.parts) for one in biased] == [2, 2]
    fused = members(MemorySource(tiny_model("phi3")).anatomy.blocks[0], SPACES)
    assert [(one.module, one.space) for one in fused if one.module == "self_attn.qkv_proj"] == [
        ("self_attn.qkv_proj", "heads"),
        ("self_attn.qkv_proj", "kv_heads"),
        ("self_attn.qkv_proj", "kv_heads"),
    ]


@pytest.mark.parametrize("sequences", [1, 2])
def test_chunks_do_not_matter_and_leave_nothing_behind(sequences: int, tmp_path: Path) -> None:
    model, windows = tiny_model("qwen2"), windows_of()
    budget = 4 * LENGTH * model.config.hidden_size * (model.config.num_hidden_layers + 1) * sequences
    whole = collect(model, tmp_path, windows)
    parts = collect(model, tmp_path, windows, budget_bytes=budget)
    for own, other in zip(parts.blocks, whole.blocks, strict=True):
        require_close(own, other)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert not list(tmp_path.iterdir())


def test_sequences_together_say_the_same_as_one_by_one(tmp_path: Path) -> None:
    """Only single sequences need passes of their own; padding must not weigh a sequence."""
    mask = torch.ones(5, LENGTH, dtype=torch.bool)
    mask[1, 7:] = mask[3, 4:] = False
    model, windows = tiny_model("llama"), windows_of()
    windows = Windows.of(windows.ids, mask)
    together = collect(model, tmp_path, windows, ["taylor_first"])
    single = collect(model, tmp_path, windows, ["taylor_first", "taylor_second"])
    found = gradients(model, windows)
    prefix = MemorySource(model).anatomy.blocks[1].prefix
    for own, other in zip(together.blocks[1], single.blocks[1], strict=True):
        torch.testing.assert_close(
            own.terms["taylor_first"], other.terms["taylor_first"], rtol=1e-4, atol=1e-9
        )
        expected = by_autograd(model, prefix, own.member, found)["taylor_first"]
        torch.testing.assert_close(own.terms["taylor_first"], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("module", "space"), [("mlp.down_proj", "ffn"), ("self_attn.o_proj", "heads")])
def test_the_signed_sum_is_the_gradient_of_a_mask(module: str, space: str, tmp_path: Path) -> None:
    model, windows = tiny_model("llama"), windows_of()
    layer = model.get_submodule(f"model.layers.1.{module}")
    own = next(
        one
        for one in collect(model, tmp_path, windows, ["taylor_vector"]).blocks[1]
        if one.member.module == module
    )
    count = len(own.terms["taylor_vector"])
    mask = torch.ones(count, 1, requires_grad=True)
    hook = layer.register_forward_pre_hook(
        lambda _, args: (args[0].unflatten(-1, (count, -1)).mul(mask).flatten(-2),)
    )
    logits = model(windows.ids, use_cache=False).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows.ids[:, 1:].flatten()).backward()
    hook.remove()
    assert mask.grad is not None
    expected = mask.grad.squeeze(1).double()
    torch.testing.assert_close(
        own.terms["taylor_vector"], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


def test_blocks_below_the_lowest_wanted_are_not_differentiated(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    steps: list[int] = []

    class Counting:
        def task(self, title: str, total: int) -> Any:
            steps.append(total)
            return Counted()

    class Counted:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc: object) -> None:
            return

        def advance(self, count: int = 1, note: str = "") -> None:
            steps[0] -= count

    spaces: list[Sequence[str]] = [(), (), ["ffn"], ()]
    taylor = collect(model, tmp_path, windows_of(), progress=Counting(), spaces=spaces)
    assert [len(own) for own in taylor.blocks] == [0, 0, 3, 0]
    assert steps == [0]
    whole = collect(model, tmp_path, windows_of(), spaces=[["ffn"]] * 4)
    require_close(taylor.blocks[2], whole.blocks[2])


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        collect(model, tmp_path, windows_of())


def reduced(weight: Tensor, each: Tensor, tmp_path: Path) -> dict[Statistic, Tensor]:
    """Terms of single weights, one unit each, from the gradients of samples."""
    member = Member("w", "ffn", (Part("w", 0, 0, len(weight), 1),))
    run = _Collection([[member]], set(TERMS), len(each), tmp_path, None)
    opened: Any = SimpleNamespace(
        parameters={"w": weight},
        each=lambda names: ({"w": gradient.clone()} for gradient in each),
    )
    run.add(0, opened, first=True, last=True)
    return run.finished()[0][0].terms


def test_a_quadratic_loss_is_deleted_as_predicted(tmp_path: Path) -> None:
    """L = mean (x w - y)^2 / 2 with independent features: deleting w_i costs -g_i w_i + w_i H_ii w_i / 2. At
    the optimum with noise of variance s^2, A is s^2 H: the second order ranks as the truth does."""
    generator = torch.Generator().manual_seed(0)
    count, samples = 12, 20_000
    inputs, _ = torch.linalg.qr(torch.randn(samples, count, generator=generator).double())
    inputs = inputs * samples**0.5 * torch.linspace(0.3, 2, count)  # exactly independent
    truth = torch.randn(count, generator=generator).double()
    targets = inputs @ truth + torch.randn(samples, generator=generator).double()
    hessian = inputs.T @ inputs / samples
    weight = torch.linalg.solve(hessian, inputs.T @ targets / samples)

    def loss(w: Tensor) -> Tensor:
        return (inputs @ w - targets).square().mean() / 2

    def deleted(w: Tensor) -> Tensor:
        one = w.repeat(count, 1) * (1 - torch.eye(count).double())
        return torch.stack([loss(row) for row in one]) - loss(w)

    moved = weight + 0.05
    each = (inputs @ moved - targets)[:, None] * inputs
    exact = deleted(moved)
    terms = reduced(moved, each, tmp_path)
    second = moved.square() * hessian.diagonal() / 2
    torch.testing.assert_close(exact, second - terms["taylor_vector"], rtol=1e-6, atol=1e-9)
    at_optimum = reduced(weight, (inputs @ weight - targets)[:, None] * inputs, tmp_path)
    variance = (inputs @ weight - targets).square().mean()
    torch.testing.assert_close(
        at_optimum["taylor_second"] / variance / 2, deleted(weight), rtol=0.1, atol=1e-4
    )
    assert torch.equal(at_optimum["taylor_second"].argsort(), deleted(weight).argsort())
