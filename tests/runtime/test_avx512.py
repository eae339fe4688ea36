"""The AVX-512 paths compute what the unpacked weight does, by emulation: SIMDe in place of the instructions.

Needs its headers (Debian: libsimde-dev) and g++. Processors with AVX-512 run the real ones in `test_kernel`.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path as File

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.runtime import build
from secateur.runtime.kernel import Path, multiply

from .matrices import check_path, fenced, packed, sparse, two_of_four, whole

EMULATION = File(__file__).with_name("emulated_avx512.h")
INCLUDE = File("/usr/include/simde/x86/avx512.h")
DTYPES = [torch.bfloat16, torch.float16]
PATHS = [Path.AVX512, Path.AVX512_BF16]
SHAPES = [(1, 1), (33, 16), (37, 31), (9, 32), (6, 33), (40, 100), (12, 511), (12, 512), (7, 513), (9, 1100)]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not INCLUDE.is_file() or shutil.which("g++") is None:
        pytest.skip("needs g++ and the headers of SIMDe")
    library = tmp_path_factory.mktemp("emulated") / "kernel.so"
    flags = ("-O0" if flag == "-O3" else flag for flag in build.COMPILE)
    subprocess.run(
        ["g++", *flags, "-w", "-shared", "-include", EMULATION, build.SOURCE, "-o", library],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return build._open(library)


@pytest.fixture(autouse=True)
def emulated(kernel: ctypes.CDLL) -> Iterator[None]:
    """Every test here has values expanded by the emulation, not on another path."""
    count = ctypes.c_int64.in_dll(kernel, "emulated_expansions")
    before = count.value
    yield
    assert count.value > before


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_shapes(kernel: ctypes.CDLL, sparsity: float, dtype: torch.dtype, path: Path) -> None:
    """Columns that fill no chunk of 32 and no span of 512, empty rows and full ones."""
    for shape in SHAPES:
        weight = sparse(*shape, sparsity, dtype)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9):
            check_path(kernel, weight, packed(weight), rows, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(13, 8), (37, 24), (40, 64), (9, 520), (7, 1032)])
def test_two_of_four(kernel: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype, path: Path) -> None:
    weight = two_of_four(*shape, dtype)
    for rows in (1, 3, 8, 9):
        check_path(kernel, weight, packed(weight, "nm"), rows, path)


def test_any_matrix(kernel: ctypes.CDLL) -> None:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 80), columns=st.integers(1, 700), sparsity=st.floats(0, 1),
        batch=st.integers(1, 9), path=st.sampled_from(PATHS), dtype=st.sampled_from(DTYPES),
    )  # fmt: skip
    def holds(rows: int, columns: int, sparsity: float, batch: int, path: Path, dtype: torch.dtype) -> None:
        weight = sparse(rows, columns, sparsity, dtype, seed=rows)
        check_path(kernel, weight, packed(weight), batch, path, seed=columns)

    holds()


@pytest.mark.parametrize("path", PATHS)
def test_nothing_leaks_from_other_rows(kernel: ctypes.CDLL, path: Path) -> None:
    """A row is read together with values of the next one."""
    anywhere, groups = sparse(40, 40, 0.5, torch.bfloat16), two_of_four(40, 40, torch.bfloat16)
    anywhere[5] = anywhere[20] = float("inf")
    groups[5, ::2] = groups[20, ::2] = float("inf")
    groups[5, 1::2] = groups[20, 1::2] = 0
    for weight, format in ((anywhere, "bitmask"), (groups, "nm")):
        found = multiply(kernel, packed(weight, format), torch.ones(1, 40), path)
        assert found.isfinite().sum() == 38, format
        assert whole(kernel, packed(weight, format), path).equal(weight)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_read_behind_codes_and_values(kernel: ctypes.CDLL, path: Path) -> None:
    for columns in (33, 40, 520):
        weight = sparse(40, columns, 0.6, torch.bfloat16)
        check_path(kernel, weight, fenced(packed(weight)), 9, path)
        weight = two_of_four(40, columns // 8 * 8, torch.bfloat16)
        check_path(kernel, weight, fenced(packed(weight, "nm")), 9, path)


@pytest.mark.parametrize("path", PATHS)
def test_every_place_of_two_of_four(kernel: ctypes.CDLL, path: Path) -> None:
    """All 36 codes of two groups, each in every byte of a span."""
    pairs = [(a, b) for b in range(4) for a in range(b)]
    codes = [(*one, *(4 + place for place in two)) for one in pairs for two in pairs]
    weight = torch.zeros(36, 72, 8, dtype=torch.bfloat16)
    for row in range(36):
        for byte in range(72):
            weight[row, byte, list(codes[(row + byte) % 36])] = torch.arange(1.0, 5.0).bfloat16()
    weight = weight.view(36, 576)
    check_path(kernel, weight, packed(weight, "nm"), 2, path)
