from __future__ import annotations

import pytest

from secateur.core.errors import RecipeError
from secateur.core.method import CORE
from secateur.core.pattern import Pattern
from secateur.report.effect import effect


@pytest.mark.parametrize("pattern", ["unstructured", "row", "matrix", "global", "2:4", "4:8"])
def test_zeros_in_a_dense_file_gain_nothing_by_themselves(pattern: str) -> None:
    words = effect(pattern, 0.5, bytes_before=1000, bytes_after=1000)
    assert "not smaller" in words
    assert "not faster" in words
    assert "1.00 kB before and after" in words
    assert "`secateur bench`" in words
    assert "docs/troubleshooting.md#why-is-it-not-faster" in words


@pytest.mark.parametrize(
    ("pattern", "runs"),
    [
        ("2:4", True),
        ("1:4", True),
        ("1:2", True),
        ("2:8", True),
        ("4:8", False),
        ("3:4", False),
        ("2:6", False),
    ],
)
def test_sparse_tensor_cores_are_promised_only_where_they_can_read_the_pattern(
    pattern: str, runs: bool
) -> None:
    assert ("can be faster" in effect(pattern, 0.5)) is runs


def test_structured_removal_is_smaller() -> None:
    words = effect("unstructured", 0.3, removes="FFN channels", bytes_before=10**9, bytes_after=7 * 10**8)
    assert "not smaller" not in words
    assert "1.00 GB before, 700 MB after" in words
    assert "FFN channels" in words


def test_a_sparse_format_names_itself() -> None:
    words = effect("unstructured", 0.7, storage="compressed rows", bytes_before=100, bytes_after=60)
    assert "compressed rows: 40.0% less on disk (100 bytes before, 60 bytes after)" in words
    assert "memory and the time of the dense model" in words
    assert "timed" not in words


@pytest.mark.parametrize("loaded", ["packed (compiled, AVX2)", "dense (no C++ compiler)"])
def test_what_packed_files_were_timed_as(loaded: str) -> None:
    words = effect("2:4", 0.5, storage="nm", bytes_before=100, bytes_after=60, loaded=loaded)
    assert f"timed {'kept ' if loaded.startswith('packed') else ''}{loaded}." in words


def test_nothing_removed_says_so() -> None:
    assert effect("unstructured", 0.0).startswith("Nothing was removed")


def test_a_parsed_pattern_does_as_well() -> None:
    assert effect(Pattern("n:m", 2, 4), 0.5) == effect("2:4", 0.5)
    with pytest.raises(RecipeError):
        effect("5:4", 0.5)


def test_zeros_in_a_file_that_an_earlier_stage_made_smaller_claim_no_sizes() -> None:
    words = effect("unstructured", 0.4, bytes_before=16_000_000, bytes_after=12_900_000)
    assert "not smaller and not faster" in words
    assert "MB" not in words


def test_a_sparse_core_pays_only_where_it_is_stored() -> None:
    product = effect("2:4", 0.5, removes=CORE, bytes_before=1000, bytes_after=1000)
    assert "no zeros: not smaller and not faster" in product
    factors = effect("2:4", 0.5, removes=CORE, bytes_before=1000, bytes_after=700)
    assert "in place of their product (1.00 kB before" in factors
    assert "neither is faster" in factors
    assert "in place of their product" in effect("2:4", 0.5, removes=CORE, storage="armor")
