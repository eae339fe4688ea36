"""The compiled kernel computes what the unpacked weight does."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.errors import InputError
from secateur.runtime import kernel as runtime
from secateur.runtime.kernel import HIGHEST, Matrix, Path, linear, multiply, path_of

from .matrices import check_path, fenced, kernel_or_skip, packed, sparse, two_of_four, whole

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 7), (3, 8), (33, 16), (37, 31), (64, 40), (70, 100), (9, 129), (40, 24)]


@pytest.fixture(scope="module")
def kernel() -> ctypes.CDLL:
    return kernel_or_skip()


def paths(kernel: ctypes.CDLL) -> list[Path]:
    return [path for path in Path if path <= kernel.secateur_path()]


def check(kernel: ctypes.CDLL, weight: Tensor, matrix: Matrix, rows: int, seed: int = 0) -> None:
    for path in paths(kernel):
        check_path(kernel, weight, matrix, rows, path, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_shapes(kernel: ctypes.CDLL, shape: tuple[int, int], sparsity: float, dtype: torch.dtype) -> None:
    weight = sparse(*shape, sparsity, dtype)
    for rows in range(1, 10):
        check(kernel, weight, packed(weight), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 16), (37, 24), (64, 40), (33, 128)])
def test_two_of_four(kernel: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = two_of_four(*shape, dtype)
    for rows in (1, 3, 8, 9):
        check(kernel, weight, packed(weight, "nm"), rows)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 200),
    sparsity=st.floats(0, 1),
    batch=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_matrix(rows: int, columns: int, sparsity: float, batch: int, seed: int) -> None:
    weight = sparse(rows, columns, sparsity, torch.bfloat16, seed)
    check(kernel_or_skip(), weight, packed(weight), batch, seed)


def test_every_float16(kernel: ctypes.CDLL) -> None:
    """Subnormal, infinite and not a number too: the product with a unit vector is the number itself."""
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(-1, 16)
    x = torch.eye(16)
    for path in paths(kernel):
        for column in range(16):
            lone = torch.zeros_like(weight)
            lone[:, column] = weight[:, column]
            found = multiply(kernel, packed(lone), x[column, None], path)[0]
            torch.testing.assert_close(found, lone[:, column].float(), rtol=0, atol=0, equal_nan=True)


def test_infinite_neighbours_do_not_leak(kernel: ctypes.CDLL) -> None:
    """A row whose last code stands alone is read together with values of the next row."""
    weight = sparse(40, 40, 0.5, torch.bfloat16)
    weight[5] = float("inf")
    for format, dense in (("bitmask", weight), ("nm", two_of_four(40, 40, torch.bfloat16))):
        if format == "nm":
            dense[5, ::2], dense[5, 1::2] = float("inf"), 0
        x = torch.ones(1, 40)
        for path in paths(kernel):
            found = multiply(kernel, packed(dense, format), x, path)
            assert found.isfinite().sum() == 39, (format, path)


def test_nothing_is_read_behind_codes_and_values(kernel: ctypes.CDLL) -> None:
    for columns in (33, 40, 520):
        weight = sparse(40, columns, 0.6, torch.bfloat16)
        check(kernel, weight, fenced(packed(weight)), 9)
        weight = two_of_four(40, columns // 8 * 8, torch.bfloat16)
        check(kernel, weight, fenced(packed(weight, "nm")), 9)


def test_zero_times_infinity_is_that_of_a_dense_layer(kernel: ctypes.CDLL) -> None:
    weight = sparse(40, 32, 0.5, torch.bfloat16)
    x = torch.ones(1, 32)
    x[0, 9] = float("inf")
    dense = torch.nn.functional.linear(x, weight.float())
    for path in paths(kernel):
        found = multiply(kernel, packed(weight), x, path)
        assert found.isnan().equal(dense.isnan())
        assert found.isinf().equal(dense.isinf())


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_linear(kernel: ctypes.CDLL, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of the threshold, in several tiles, with a bias and axes before the last."""
    monkeypatch.setattr(runtime, "TILE", 300)
    monkeypatch.setattr(runtime, "TILE_ROWS", 4)
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    weight, bias = sparse(21, 50, 0.5, stored), torch.linspace(-1, 1, 21).to(dtype)
    inputs = torch.randn(rows, 1, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    for own in (None, bias):
        found = linear(kernel, packed(weight), inputs, own)
        wide = None if own is None else own.double()
        expected = torch.nn.functional.linear(inputs.double(), weight.double(), wide)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)


def test_views_and_no_rows(kernel: ctypes.CDLL) -> None:
    weight = sparse(20, 48, 0.5, torch.bfloat16)
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0)).T
    torch.testing.assert_close(linear(kernel, packed(weight), x), x @ weight.float().T, rtol=1e-5, atol=1e-5)
    assert linear(kernel, packed(weight), x[:0]).shape == (0, 20)


def test_a_variable_names_the_highest_path(kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Path(kernel.secateur_path())
    monkeypatch.delenv(HIGHEST, raising=False)
    assert path_of(kernel) == best
    for path in Path:
        monkeypatch.setenv(HIGHEST, path.label)
        assert path_of(kernel) == min(path, best)
    monkeypatch.setenv(HIGHEST, "avx")
    with pytest.raises(InputError, match="portable, avx2, avx512, avx512-bf16"):
        multiply(kernel, packed(sparse(4, 8, 0.5, torch.bfloat16)), torch.ones(1, 8))


def test_the_path_is_that_of_the_variable(kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both add in an order of their own."""
    matrix, x = packed(sparse(8, 1000, 0.5, torch.bfloat16)), torch.linspace(-1, 3, 1000)[None]
    if kernel.secateur_path() == Path.PORTABLE:
        pytest.skip("one path")
    slow, quick = (multiply(kernel, matrix, x, path) for path in (Path.PORTABLE, Path.AVX2))
    assert not slow.equal(quick)
    for path, expected in ((Path.PORTABLE, slow), (Path.AVX2, quick)):
        monkeypatch.setenv(HIGHEST, path.label)
        assert multiply(kernel, matrix, x).equal(expected)


def test_threads_change_no_bit(kernel: ctypes.CDLL) -> None:
    """Nor do callers in other threads."""
    weight = sparse(700, 256, 0.6, torch.bfloat16)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    matrix, before = packed(weight), torch.get_num_threads()
    expected = multiply(kernel, matrix, x)
    try:
        torch.set_num_threads(2)
        assert multiply(kernel, matrix, x).equal(expected)
        assert whole(kernel, matrix).equal(weight)
        found: list[Tensor] = []
        callers = [
            threading.Thread(target=lambda: found.append(multiply(kernel, matrix, x))) for _ in range(3)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(found) == 3
        assert all(one.equal(expected) for one in found)
    finally:
        torch.set_num_threads(before)
