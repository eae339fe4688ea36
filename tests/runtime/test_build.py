"""The kernel is built once, by whoever comes first; without a compiler everything works."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.cli.app import run
from secateur.core.errors import InputError
from secateur.runtime import build

from .matrices import kernel_or_skip, linear_of, sparse


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a process that has not looked for the kernel; builds are quick."""
    monkeypatch.setattr(build, "COMPILE", tuple("-O0" if flag == "-O3" else flag for flag in build.COMPILE))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._loaded.cache_clear()
    yield tmp_path / "secateur"
    build._loaded.cache_clear()


@pytest.fixture
def no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "packed"
    secateur.prune(
        "seedling", folder, method="magnitude", sparsity=0.5, format="bitmask", evaluation_windows=0,
        measure_speed=False, check_loading=False,
    )  # fmt: skip
    return folder


def test_built_once_and_used_from_the_cache(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.shutil.which("g++") is None:
        pytest.skip("no compiler")
    assert build.library() is not None, build.why_missing()
    assert build.why_missing() is None
    (kept,) = fresh.iterdir()  # nothing else is left there
    build._loaded.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.library() is not None
    assert kept == build.kept_file()


def test_a_damaged_file_is_not_loaded(no_compiler: None, fresh: Path) -> None:
    fresh.mkdir()
    build.kept_file().write_bytes(b"cut short")
    assert build.library() is None
    assert "compiler" in (build.why_missing() or "")


@pytest.mark.parametrize("left", [0, 4000, -1])
def test_a_file_that_was_cut_short_is_built_anew(fresh: Path, left: int) -> None:
    """Loading it as it is would kill the process."""
    if build.shutil.which("g++") is None:
        pytest.skip("no compiler")
    assert build.library() is not None
    whole = build.kept_file().read_bytes()
    build.kept_file().unlink()  # a new file: the old one is in use
    build.kept_file().write_bytes(whole[:left])
    build._loaded.cache_clear()
    assert build.library() is not None
    assert len(build.kept_file().read_bytes()) == len(whole)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", nowhere)
    build._loaded.cache_clear()
    assert build.library() is None
    assert "XDG_CACHE_HOME" in (build.why_missing() or "")
    build._loaded.cache_clear()


def test_an_unknown_path_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_KERNEL", "avx3")
    with pytest.raises(InputError, match="SECATEUR_KERNEL=avx3"):
        secateur.prune("seedling", tmp_path / "out", method="magnitude", sparsity=0.5, format="bitmask")
    assert not (tmp_path / "out").exists()


def test_two_builds_at_once(fresh: Path) -> None:
    """Each in a folder of its own, whatever a killed build has left."""
    if build.shutil.which("g++") is None:
        pytest.skip("no compiler")
    (fresh / "build-killed").mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(build._build, [fresh / "kernel.so"] * 2))
    assert sorted(file.name for file in fresh.iterdir()) == ["build-killed", "kernel.so"]
    build._open(fresh / "kernel.so")


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert build.library() is None
    assert "fails" in (build.why_missing() or "")
    assert not list(fresh.iterdir())


def test_a_cache_that_cannot_be_written(fresh: Path) -> None:
    fresh.write_text("a file where the folder should be")
    if build.shutil.which("g++") is None:
        pytest.skip("no compiler")
    assert build.library() is None
    assert "cannot be kept" in (build.why_missing() or "")


def test_without_a_compiler_weights_are_unpacked(no_compiler: None) -> None:
    weight = sparse(20, 30, 0.5, torch.bfloat16)
    x = torch.randn(2, 30).bfloat16()
    with torch.no_grad():
        assert linear_of(weight)(x).equal(torch.nn.functional.linear(x, weight))


def test_bench_says_once_that_there_is_none(
    no_compiler: None, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = ["bench", str(half), "--against", str(half), "--repeats", "1", "--new-tokens", "2"]
    assert run([*bench, "--prompt-tokens", "4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("no C++ compiler") == 1
    assert "kernel: none" in told


def test_bench_of_packed_weights(half: Path) -> None:
    quick: dict[str, Any] = {"repeats": 1, "new_tokens": 2, "prompt_tokens": 4}
    kernel_or_skip()
    kept = secateur.bench(half, against="seedling", **quick)
    assert kept["kernel"].startswith("compiled")
    assert kept["weight_bytes"] < 0.5 * kept["weight_bytes_against"]  # against float32
    dense = secateur.bench(half, packed=False, **quick)
    assert dense["kernel"] is None
    assert dense["weight_bytes"] == kept["weight_bytes_against"]
