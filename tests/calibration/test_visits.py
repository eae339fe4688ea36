"""What other weights of one expert do to its block, from the tokens that visit it alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn

from secateur.calibration.driver import Driver, OpenBlock
from secateur.calibration.source import MemorySource
from secateur.calibration.visits import Visits, expert_errors, routing_error, visits
from secateur.calibration.windows import Windows
from secateur.quantise.experts import rounded_stack

FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss")
BITS = (1, 2, 3)


def padded_windows() -> Windows:
    ids = torch.randint(0, VOCAB, (5, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 16, dtype=torch.bool)
    mask[1, :6] = mask[4, :11] = False
    return Windows.of(ids, mask)


def experts_of(opened: OpenBlock) -> tuple[str, nn.Module, dict[str, Tensor]]:
    """Path, module and (n, out, in) stacks by name inside the module."""
    path = next(site.module for site in opened.block.sites.values() if site.kind == "experts_input")
    first = [matrix for matrix in opened.block.matrices if matrix.expert == 0]
    stacks = {}
    for matrix in first:
        stack = opened.parameters[matrix.parameter]
        stacks[matrix.parameter.removeprefix(f"{path}.")] = stack.mT if matrix.transposed else stack
    return path, opened.module.get_submodule(path), stacks


def naive(opened: OpenBlock, path: str, stacks: dict[str, Tensor], others: list[dict[str, Tensor]]) -> Tensor:
    """Whole blocks with one expert rounded, window by window."""
    module = opened.module.get_submodule(path)
    count = len(next(iter(stacks.values())))
    dense = [(batch, output.clone()) for batch, _, output in opened.outputs()]
    errors = torch.zeros(count, len(others), dtype=torch.float64)
    for level, other in enumerate(others):
        for expert in range(count):
            before = {name: getattr(module, name).detach().clone() for name in stacks}
            for name, stack in other.items():
                own = getattr(module, name).data
                own[expert] = stack[expert].T if own.shape != stack.shape else stack[expert]
            for (batch, expected), (_, _, output) in zip(dense, opened.outputs(), strict=True):
                change = (output - expected).double()
                if batch.windows.mask is not None:
                    change = change * batch.windows.mask[..., None]
                errors[expert, level] += change.square().sum((1, 2)).sqrt().sum()
            for name, own in before.items():
                getattr(module, name).data.copy_(own)
    return errors


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_whole_blocks(family: str) -> None:
    # square matrices would hide that gpt_oss stores them the other way round
    driver = Driver(MemorySource(tiny_model(family)), padded_windows(), batch_size=2)
    for opened in driver.blocks():
        if any(site.kind == "experts_input" for site in opened.block.sites.values()):
            path, module, stacks = experts_of(opened)
            others = [rounded_stack(stacks, bits, 16) for bits in BITS]
            own = {name: getattr(module, name).shape for name in stacks}
            laid = [
                {name: s.mT if s.shape != own[name] else s for name, s in other.items()} for other in others
            ]
            seen = list(visits(opened, path))
            found = expert_errors(module, [lambda one=one: one for one in laid], seen)
            torch.testing.assert_close(found, naive(opened, path, stacks, others), rtol=1e-4, atol=1e-6)
            assert bool((found[:, 0] > found[:, 2]).all())
        opened.finish()


def test_visits_leave_padding_out_and_know_their_windows() -> None:
    driver = Driver(MemorySource(tiny_model("mixtral")), padded_windows(), batch_size=2)
    for opened in driver.blocks():
        path, _, _ = experts_of(opened)
        seen = list(visits(opened, path))
        windows = torch.cat([one.windows for one in seen])
        assert windows.bincount().tolist() == [16, 10, 16, 16, 5]
        assert torch.cat([one.routes for one in seen]).shape == (63, 2)
        opened.finish()


def test_the_result_does_not_depend_on_the_batches() -> None:
    found = []
    for size in (1, 5):
        driver = Driver(MemorySource(tiny_model("mixtral")), padded_windows(), batch_size=size)
        for opened in driver.blocks():
            path, module, stacks = experts_of(opened)
            found.append(
                expert_errors(
                    module, [lambda stacks=stacks: rounded_stack(stacks, 1, 16)], list(visits(opened, path))
                )
            )
            opened.finish()
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_an_expert_that_nobody_visits_changes_nothing() -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    routes = torch.tensor([[0, 2]] * 6)
    seen = [Visits(rows, routes, torch.full((6, 2), 0.5), torch.zeros(6, dtype=torch.int64))]
    stacks = {name: one.detach() for name, one in experts.named_parameters()}
    errors = expert_errors(experts, [lambda: rounded_stack(stacks, 2, 16)], seen)
    assert errors[[1, 3], 0].tolist() == [0.0, 0.0]
    assert bool((errors[[0, 2], 0] > 0).all())


def test_routing_error_of_the_same_routes_is_nothing() -> None:
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    routes, gates = torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)
    seen = [Visits(rows, routes, gates, torch.zeros(6, dtype=torch.int64))]
    assert routing_error(experts, lambda r, g: (r, g), seen)[0] == 0
    nothing = routing_error(experts, lambda r, g: (r, 0 * g), seen)
    assert nothing[0] == nothing[1] > 0
