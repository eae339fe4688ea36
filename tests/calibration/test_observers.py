"""Sums against the same sums in float64, in one step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.calibration.observers import Gram, Moments

CPU = torch.device("cpu")


def rows(tokens: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, columns, generator=generator) + 0.3).to(dtype)


@settings(deadline=None, max_examples=30)
@given(
    columns=st.sampled_from([1, 5, 255, 256, 257, 300, 600]),
    batches=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    hessian=st.booleans(),
)
def test_moments_are_plain_sums(columns: int, batches: list[int], dtype: torch.dtype, hessian: bool) -> None:
    parts = [rows(tokens, columns, seed, dtype) for seed, tokens in enumerate(batches)]
    moments = Moments(columns, {"second_moment", "mean", *(["hessian"] if hessian else [])}, CPU)
    for part in parts:
        moments.add(part)
    found, x = moments.take(7), torch.cat(parts).double()
    assert (found.tokens, found.sequences, found.columns) == (len(x), 7, columns)
    assert found.second_moment.dtype == found.mean.dtype == torch.float64
    torch.testing.assert_close(found.second_moment, x.square().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.mean, x.sum(0), rtol=1e-5, atol=1e-5)
    assert (found.hessian is not None) == hessian
    if hessian:
        torch.testing.assert_close(found.hessian, (x.T @ x).float(), rtol=1e-5, atol=1e-4)
        assert torch.equal(found.hessian, found.hessian.T)


@pytest.mark.parametrize("needs", [set(), {"mean"}, {"second_moment"}, {"hessian"}])
def test_only_what_is_asked_for_is_there(needs: set[str]) -> None:
    moments = Moments(4, needs, CPU)
    moments.add(rows(3, 4))
    found = moments.take(1)
    assert (found.mean is not None) == ("mean" in needs)
    assert (found.second_moment is not None) == bool(needs & {"second_moment", "hessian"})
    assert (found.hessian is not None) == ("hessian" in needs)


def test_long_sums_keep_small_contributions() -> None:
    """A million additions of 1 to 1e8 in float32 would be lost."""
    gram = Gram(2, CPU)
    gram.add(torch.tensor([[1e4, 0.0]]))
    for _ in range(64):
        gram.add(torch.ones(1, 2))
    assert gram.diagonal().tolist() == [1e8 + 64, 64.0]


def test_memory_of_a_gram_is_half_of_the_matrix() -> None:
    gram = Gram(4096, CPU)
    assert sum(panel.nbytes for panel in gram.sums) < 0.54 * 4096 * 4096 * 8


def test_activity_is_the_squared_mean_of_each_sequence_summed() -> None:
    x = torch.tensor([[1.0, -2], [3, 2], [-5, 0], [2, 2], [2, 2], [2, 2]])
    moments = Moments(2, {"activity"}, CPU)
    moments.add(x[:2], torch.tensor([2]))
    moments.add(x[2:], torch.tensor([1, 3]))
    assert moments.take(3).activity.tolist() == [2**2 + 5**2 + 2**2, 2**2 + 0 + 2**2]  # type: ignore[union-attr]


def test_activity_needs_whole_sequences() -> None:
    with pytest.raises(ValueError, match="whole sequences"):
        Moments(2, {"activity"}, CPU).add(torch.ones(3, 2))
