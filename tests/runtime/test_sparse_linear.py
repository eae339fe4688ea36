"""A sparse layer in a model of plain torch says what the dense one does, in fewer bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from secateur.core.errors import CheckpointError, InputError, RecipeError
from secateur.runtime import SparseLinear
from secateur.runtime.compiled import matrix_of
from secateur.runtime.packed_linear import PackedLinear
from secateur.storage.formats import Packed

from .matrices import sparse, two_of_four

FORMATS = {"bitmask": sparse(24, 64, 0.6, torch.bfloat16), "nm": two_of_four(24, 64, torch.bfloat16)}


def linear(weight: Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_takes_the_place_of_a_dense_layer(format: str, bias: bool) -> None:
    dense = linear(FORMATS[format], bias)
    packed = SparseLinear(dense, format)
    for shape in ((64,), (3, 64), (2, 9, 64)):
        x = torch.randn(shape).bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(packed(x), dense(x))
    assert packed.packed_bytes < 0.58 * dense.weight.nbytes
    assert packed.bias is dense.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_of_any_dtype(dtype: torch.dtype) -> None:
    dense = linear(sparse(16, 40, 0.7, dtype))
    with torch.no_grad():
        torch.testing.assert_close(SparseLinear(dense)(x := torch.randn(2, 40).to(dtype)), dense(x))


def test_is_computed_by_the_kernel(computed: list[int]) -> None:
    packed = SparseLinear(linear(FORMATS["bitmask"]))
    with torch.no_grad():
        packed(torch.ones(2, 3, 64).bfloat16())
    assert computed == [6]


def test_a_cast_changes_what_is_computed_in_and_not_the_weight() -> None:
    """As bytes of another dtype the values would be other numbers."""
    dense = linear(FORMATS["bitmask"])
    packed = SparseLinear(dense)
    values = packed.parts["values"].clone()
    model = nn.Sequential(packed, nn.ReLU()).float()
    assert packed.parts["values"].equal(values)
    x = torch.randn(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense.float()(x).relu())
    assert packed.bfloat16().materialize().weight.equal(FORMATS["bitmask"])


def test_materialize_gives_the_dense_layer_back() -> None:
    dense = linear(FORMATS["nm"]).eval()
    again = SparseLinear(dense, "nm").materialize()
    assert type(again) is nn.Linear
    assert again.weight.equal(dense.weight)
    assert again.bias is dense.bias
    assert again.weight.requires_grad
    assert not again.training
    few_bits = PackedLinear(Packed.of(torch.randn(8, 64), "low-bit", bits=4), torch.empty(0))
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(few_bits.materialize()(x), few_bits(x), rtol=1e-4, atol=1e-4)


def test_state_dict_has_the_weight(tmp_path: Path) -> None:
    """Saved and read into a layer that computed from another mask before."""
    first, second = sparse(16, 64, 0.0, torch.bfloat16), sparse(16, 64, 0.0, torch.bfloat16, seed=1)
    first[:, ::2], second[:, 1::2] = 0, 0
    saved, other = SparseLinear(linear(first)), SparseLinear(linear(second))
    x = torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        other(x)
        torch.save(saved.state_dict(), tmp_path / "layer.pt")
        other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
        assert other(x).equal(saved(x))
        assert copy.deepcopy(other)(x).equal(saved(x))


def test_state_dict_of_another_number_of_weights(tmp_path: Path) -> None:
    """A new process has no weight to make the layer of: zeros do."""
    saved = SparseLinear(linear(FORMATS["bitmask"]))
    empty = SparseLinear(linear(torch.zeros(24, 64, dtype=torch.bfloat16)))
    empty(x := torch.randn(2, 64).bfloat16())
    empty.load_state_dict(saved.state_dict())
    with torch.no_grad():
        assert empty(x).equal(saved(x))


@pytest.mark.parametrize(
    ("format", "wrong"),
    [
        ("bitmask", {"0.packed_mask": torch.full((24, 8), 255, dtype=torch.uint8)}),
        ("bitmask", {"0.packed_values": torch.ones(7, dtype=torch.bfloat16)}),
        ("nm", {"0.packed_values": torch.ones(24, 8, 2, dtype=torch.bfloat16)}),
    ],
)
def test_parts_that_are_no_weight_are_refused(format: str, wrong: dict[str, Tensor]) -> None:
    """Loaded as they are, a product would read behind the values."""
    packed = SparseLinear(linear(FORMATS[format]), format)
    x = torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        before = packed(x)
        with pytest.raises(CheckpointError, match=r"'0\.weight' is damaged"):
            nn.Sequential(packed).load_state_dict(wrong, strict=False)
        assert packed(x).equal(before)


def test_parts_that_move_stay_in_the_state_dict() -> None:
    packed = SparseLinear(linear(FORMATS["nm"]), "nm")
    before = set(packed.state_dict())
    packed.move_parts("cpu")
    assert set(packed.state_dict()) == before
    assert "packed_values" in before


def jvp(layer: nn.Module, x: Tensor, along: Tensor) -> Tensor:
    return torch.func.jvp(layer, (x,), (along,))[1]


def dual(layer: nn.Module, x: Tensor, along: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, along))).tangent
    return tangent


def vmap(layer: nn.Module, x: Tensor, along: Tensor) -> Tensor:
    return torch.func.vmap(layer)(x) + along.sum()


def traced(layer: nn.Module, x: Tensor, along: Tensor) -> Tensor:
    return torch.jit.trace(layer, x)(along)


def recorded(layer: nn.Module, x: Tensor, along: Tensor) -> Tensor:
    return make_fx(layer)(x)(along)


def compiled(layer: nn.Module, x: Tensor, along: Tensor) -> Tensor:
    return torch.compile(layer, backend="eager", fullgraph=True)(x) + along.sum()


@pytest.mark.filterwarnings("ignore")  # that jit is on its way out
@pytest.mark.parametrize(
    ("format", "transform"),
    [
        *((format, transform) for format in FORMATS for transform in (jvp, dual, vmap, recorded, compiled)),
        ("bitmask", traced),  # torch cannot trace places of two bits, and says so
    ],
)
def test_transformations_of_torch(format: str, transform: Callable[..., Tensor]) -> None:
    """They know nothing of the kernel: the weight is unpacked, by what they do know."""
    dense = linear(FORMATS[format]).float()
    packed = SparseLinear(linear(FORMATS[format]), format).float()
    packed.bias = dense.bias
    x, along = torch.randn(3, 64), torch.randn(3, 64)
    with torch.no_grad():
        packed(x)
        torch.testing.assert_close(transform(packed, x, along), transform(dense, x, along))


@pytest.mark.parametrize("format", FORMATS)
def test_other_widths_are_refused_like_those_of_a_dense_layer(format: str) -> None:
    packed = SparseLinear(linear(FORMATS[format]), format)
    for shape in ((2, 63), (2, 128), (0, 63), (1,)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="in_features=64"):
            packed(torch.ones(shape).bfloat16())


def test_only_the_bias_is_trained() -> None:
    packed = SparseLinear(linear(FORMATS["bitmask"]))
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    packed(x).float().square().sum().backward()
    assert packed.bias is not None
    assert packed.bias.grad is not None
    assert x.grad is not None
    assert [name for name, own in packed.named_parameters() if own.requires_grad] == ["bias"]


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match=r"0\.0% zeros"):
        SparseLinear(nn.Linear(64, 64))
    for other in (nn.Conv2d(1, 1, 1), nn.MultiheadAttention(8, 2).out_proj):
        with pytest.raises(InputError, match=type(other).__name__):
            SparseLinear(other)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="rounds"):
        SparseLinear(linear(FORMATS["bitmask"]), "low-bit")
    with pytest.raises(RecipeError, match="bitmask"):
        SparseLinear(linear(FORMATS["bitmask"]), "bitmsk")
    with pytest.raises(InputError):
        SparseLinear(linear(FORMATS["bitmask"]), "nm")


def test_nothing_is_prepared_for_a_dtype_that_the_kernel_lacks() -> None:
    packed = SparseLinear(linear(sparse(8, 32, 0.7, torch.float32)))
    assert matrix_of(packed, "bitmask", packed.parts) is None
