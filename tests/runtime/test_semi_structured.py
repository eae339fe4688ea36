"""2:4 on CUDA devices: what is chosen, with another clock and device in place of the real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secateur.runtime import facts, products, semi_structured
from secateur.runtime.semi_structured import Choices, convert, fits

from .matrices import linear_of, two_of_four

SHAPE = (64, 128)
WEIGHT = two_of_four(*SHAPE, torch.bfloat16)


class Clock:
    """Says how long dense, semi-structured and unpacked products take, over and over."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, work: Callable[[], Tensor]) -> float:
        assert work().shape == (3, SHAPE[0])
        self.calls += 1
        return self.seconds[(self.calls - 1) % 3]


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense copies stand for semi-structured tensors, on the CPU."""
    monkeypatch.setattr(semi_structured, "convert", Tensor.clone)
    monkeypatch.setattr(products, "fits", lambda *_: True)


def choose(choices: Choices) -> Tensor | None:
    return choices.sparse(SHAPE, torch.ones(3, SHAPE[1]).bfloat16(), lambda: WEIGHT)


def told_of(choices: Choices) -> str | None:
    return choices.told(SHAPE, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("seconds", "taken", "told"),
    [
        ((1.0, 0.5, 2.0), True, "64 x 128 semi-structured, 2.00 times the speed of dense"),
        ((1.0, 4.0, 8.0), True, "64 x 128 semi-structured, 0.25 times the speed of dense"),
        ((1.0, 4.0, 3.0), False, "64 x 128 unpacked, which is quicker"),
    ],
)
def test_the_quicker_way_is_taken_and_told(
    seconds: tuple[float, ...], taken: bool, told: str, as_on_a_device: None
) -> None:
    clock = Clock(*seconds)
    choices = Choices(clock)
    assert told_of(choices) is None
    for _ in range(2):  # measured once
        assert (choose(choices) is not None) == taken
    assert clock.calls == 3
    assert told_of(choices) == f"2:4 of {told}"


def test_another_shape_or_dtype_is_measured_anew(as_on_a_device: None) -> None:
    clock = Clock(1.0, 0.5, 2.0)
    choices = Choices(clock)
    choose(choices)
    choices.sparse(SHAPE, torch.ones(3, 128).half(), WEIGHT.half)
    choices.sparse((64, 64), torch.ones(3, 64).bfloat16(), lambda: WEIGHT[:, :64])
    assert clock.calls == 9
    assert len(choices.known) == 3


def test_what_is_not_taken_is_not_unpacked_to_be_asked_again(as_on_a_device: None) -> None:
    choices = Choices(Clock(1.0, 4.0, 3.0))
    choose(choices)
    assert choices.sparse(SHAPE, torch.ones(1, 128).bfloat16(), lambda: pytest.fail("unpacked")) is None


def test_a_refusal_of_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it refuses by itself."""
    choices = Choices(Clock(1.0, 0.5, 2.0))
    assert choose(choices) is None
    told = told_of(choices)
    assert told is not None
    assert "unpacked, torch says: " in told
    assert "cpu is not supported" in told


@pytest.fixture
def torch_without_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library whose layout torch writes in Python, which works on the CPU."""
    tensor = torch.sparse.SparseSemiStructuredTensor
    if not hasattr(tensor, "_validate_device_dim_dtype_shape"):
        pytest.skip("another version of torch")
    monkeypatch.setattr(tensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(tensor, "_validate_device_dim_dtype_shape", lambda *_: None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_drops_nothing(dtype: torch.dtype, torch_without_its_check: None) -> None:
    weight = two_of_four(*SHAPE, dtype)
    weight[3], weight[5, ::4] = 0, 0  # groups with fewer than two
    sparse = convert(linear_of(weight, "nm").unpacked())
    assert sparse.shape == SHAPE
    assert sparse.values().numel() == weight.numel() // 2
    assert sparse.to_dense().equal(weight)


def test_what_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    device, capability = torch.device("cuda", 0), (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert fits((4096, 11008), torch.float16, device)
    assert not fits((4096, 11008), torch.float32, device)
    assert not fits((4096, 11008), torch.float16, torch.device("cpu"))
    assert not fits((4080, 11008), torch.float16, device)
    assert not fits((4096, 11040), torch.float16, device)
    assert not fits((0, 64), torch.float16, device)
    capability = (7, 5)
    assert not fits((4096, 11008), torch.float16, device)


@pytest.mark.parametrize(("sparse", "quicker"), [(0.5, True), (4.0, False)])
def test_a_layer(sparse: float, quicker: bool, as_on_a_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHOICES", Choices(Clock(1.0, sparse, 2.0)))
    compiled: list[int] = []
    real = products.compiled
    monkeypatch.setattr(products, "compiled", lambda *both: compiled.append(1) or real(*both))
    layer = linear_of(WEIGHT, "nm")
    layer.bias = torch.nn.Parameter(torch.ones(64).bfloat16(), requires_grad=False)
    inputs = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for _ in range(2):
        expected = torch.nn.functional.linear(inputs.float(), WEIGHT.float(), layer.bias.float())
        torch.testing.assert_close(layer(inputs).float(), expected, rtol=0.02, atol=0.05)
    assert bool(compiled) != quicker
    told = facts.kernel_of(layer)
    assert told is not None
    assert ("64 x 128 semi-structured" in told) == quicker
    other = linear_of(two_of_four(8, 64, torch.bfloat16), "nm")  # of a shape that was not asked
    told = facts.kernel_of(torch.nn.Sequential(layer, other))
    assert told is not None
    assert told.split("; ")[1].startswith(("compiled", "none, packed weights are unpacked"))


def test_new_parts_are_noticed(as_on_a_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHOICES", Choices(Clock(1.0, 0.5, 2.0)))
    layer, inputs = linear_of(WEIGHT, "nm"), torch.ones(3, 128).bfloat16()
    before = layer(inputs)
    layer.packed_values = layer.packed_values * 2
    assert layer(inputs).equal(before * 2)


def test_gradients_and_other_dtypes_do_not_come_here(
    as_on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CHOICES", Choices(Clock(1.0, 0.5, 2.0)))
    linear_of(WEIGHT, "nm")(torch.ones(3, 128).bfloat16().requires_grad_()).sum().backward()
    linear_of(WEIGHT, "nm", torch.float32)(torch.ones(3, 128))
    assert not products.CHOICES.known
