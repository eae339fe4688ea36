"""Tensor to parts and back: every bit, the documented bytes, and what is refused."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.errors import CheckpointError, InputError, RecipeError
from secateur.storage.bitmask import Bitmask, row_offsets
from secateur.storage.bits import PIECE, gather, spread
from secateur.storage.formats import FORMATS, Packed
from secateur.storage.nm import GroupsInColumns, GroupsOfM

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECIAL = (0.0, -0.0, float("inf"), float("nan"), 1e-40)


def with_zeros(shape: tuple[int, ...], dtype: torch.dtype, zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return weight.masked_fill_(torch.rand(shape, generator=generator) < zeros, 0)


def keep_n_of_m(weight: Tensor, keep: int, of: int) -> Tensor:
    groups = weight.view(-1, of)
    order = groups.abs().argsort(-1)
    return groups.scatter(-1, order[:, : of - keep], 0).view(weight.shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    zeros=st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.0)),
    seed=st.integers(0, 10**6),
)
def test_bitmask_round_trip(rows: int, columns: int, dtype: torch.dtype, zeros: float, seed: int) -> None:
    weight = with_zeros((rows, columns), dtype, zeros, seed)
    if rows > 2:
        weight[1], weight[2] = 0, 1  # an empty row, a full row
        weight[0, : len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)[:columns]
    packed = Packed.of(weight, "bitmask")
    assert same_bits(Packed.read("x", "bitmask", packed.stored("x")).unpack(), weight)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    groups=st.integers(1, 9),
    pattern=st.sampled_from(((1, 2), (1, 4), (2, 4), (4, 8), (3, 16))),
    dtype=st.sampled_from(DTYPES),
    more_zeros=st.sampled_from((0.0, 0.4, 1.0)),
    seed=st.integers(0, 10**6),
)
def test_nm_round_trip(
    rows: int, groups: int, pattern: tuple[int, int], dtype: torch.dtype, more_zeros: float, seed: int
) -> None:
    keep, of = pattern
    weight = keep_n_of_m(with_zeros((rows, groups * of), dtype, more_zeros, seed), keep, of)
    if rows:
        weight[0, :of] = 0
        weight[0, of - 1] = -0.0
    for meta in ({}, {"of": of, "keep": keep}):
        packed = Packed.of(weight, "nm", **meta)
        assert same_bits(Packed.read("x", "nm", packed.stored("x")).unpack(), weight)


@pytest.mark.parametrize("shape", [(24,), (3, 5, 16), (2, 2, 2, 8)])
@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_any_number_of_axes(format: str, shape: tuple[int, ...]) -> None:
    weight = keep_n_of_m(with_zeros(shape, torch.bfloat16, 0.2), 2, 4)
    assert same_bits(Packed.of(weight, format).unpack(), weight)


@pytest.mark.parametrize("shape", [(16, 16), (16, 6), (4, 5), (3, 8, 5)])
def test_groups_in_columns_are_those_of_the_transposed_tensor(shape: tuple[int, ...]) -> None:
    weight = keep_n_of_m(with_zeros(shape, torch.bfloat16, 0.2).mT.contiguous(), 2, 4).mT.contiguous()
    packed = Packed.of(weight, "nm-columns", of=4, keep=2)
    rows = Packed.of(weight.mT, "nm", of=4, keep=2)
    assert all(packed.parts[name].equal(part) for name, part in rows.parts.items())
    assert same_bits(Packed.read("x", "nm-columns", packed.stored("x")).unpack(), weight)
    swapped = GroupsInColumns.swapped(packed)
    assert swapped.shape == weight.mT.shape
    assert same_bits(swapped.unpack(), weight.mT.contiguous())


def test_groups_in_columns_need_columns() -> None:
    with pytest.raises(InputError, match="1 axes"):
        Packed.of(torch.ones(8), "nm-columns")
    parts = GroupsOfM.pack(keep_n_of_m(with_zeros((6, 8), torch.float32, 0), 2, 4))
    GroupsInColumns.check(parts, "w", (8, 6))
    with pytest.raises(CheckpointError, match="'w' is damaged: its values of"):
        GroupsInColumns.check(parts, "w", (6, 8))
    with pytest.raises(CheckpointError, match="'w' is damaged: groups in columns need two axes"):
        GroupsInColumns.check(parts, "w", (48,))


def test_the_largest_groups() -> None:
    weight = torch.zeros(2, 510)
    weight[:, ::255] = 1
    assert Packed.of(weight, "nm", of=255, keep=1).unpack().equal(weight)
    with pytest.raises(InputError, match="at most 128"):
        Packed.of(torch.ones(2, 255), "nm", of=255, keep=128)
    with pytest.raises(InputError, match="at most 255"):
        Packed.of(torch.ones(2, 256), "nm", of=256)


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_values_of_another_dtype_are_refused(format: str) -> None:
    """Their bytes are those that were written; as numbers they would be others."""
    stored = Packed.of(with_zeros((6, 8), torch.float16, 0.6), format).stored("w")
    stored["w.values"] = stored["w.values"].view(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"'w' is damaged: w.values is torch.bfloat16"):
        Packed.read("w", format, stored)


def test_strided_weights() -> None:
    weight = with_zeros((16, 12), torch.float32, 0.5).T
    assert same_bits(Packed.of(weight, "bitmask").unpack(), weight)


def test_bytes_of_a_bitmask_as_documented() -> None:
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, 0, 0, 4, 0]])
    parts = Bitmask.pack(weight)
    assert parts["mask"].tolist() == [[0b00001001, 1], [0b10000000, 0]]
    assert parts["values"].tolist() == [1, 2, 3, 4]
    assert row_offsets(parts["mask"]).tolist() == [0, 3, 4]


def test_rows_begin_where_the_set_bits_of_those_before_end() -> None:
    masks = torch.arange(256, dtype=torch.uint8).view(128, 2)
    counts = [byte.bit_count() + (byte + 1).bit_count() for byte in range(0, 256, 2)]
    assert row_offsets(masks).diff().tolist() == counts
    assert row_offsets(torch.empty(0, 3, dtype=torch.uint8)).tolist() == [0]


def test_bytes_of_two_of_four_as_documented() -> None:
    weight = torch.tensor([[0.0, 5, 0, 7, 1, 2, 0, 0, 0, 0, 0, 9]])
    parts = GroupsOfM.pack(weight, of=4, keep=2)
    assert parts["values"].tolist() == [[[5, 7], [1, 2], [0, 9]]]
    places = (1, 3, 0, 1, 0, 3)
    expected = sum(place << (2 * number) for number, place in enumerate(places))
    assert parts["indices"].tolist() == [expected & 255, expected >> 8]


def test_a_zero_inside_a_given_mask_is_stored() -> None:
    weight = with_zeros((5, 11), torch.bfloat16, 0.5)
    mask = (weight != 0) | (torch.rand(5, 11, generator=torch.Generator().manual_seed(1)) < 0.3)
    weight[mask.nonzero()[0][0], mask.nonzero()[0][1]] = 0.0
    parts = Bitmask.pack(weight, mask=mask)
    assert len(parts["values"]) == int(mask.sum()) > int((weight != 0).sum())
    assert same_bits(Bitmask.unpack(parts, (5, 11), torch.bfloat16), weight)
    with pytest.raises(InputError, match="leaves out weights"):
        Bitmask.pack(weight, mask=torch.zeros(5, 11, dtype=torch.bool))


@pytest.mark.parametrize(("zeros", "most"), [(0.5, 0.57), (0.7, 0.37)])
def test_bitmask_takes_the_bytes_it_promises(zeros: float, most: float) -> None:
    weight = with_zeros((256, 384), torch.bfloat16, 0)
    weight.view(-1)[torch.randperm(weight.numel())[: round(zeros * weight.numel())]] = 0
    packed = Packed.of(weight, "bitmask")
    kept = weight.numel() - round(zeros * weight.numel())
    assert packed.nbytes == 2 * kept + weight.numel() // 8
    stored = sum(tensor.nbytes for tensor in packed.stored("x").values())
    assert stored == packed.nbytes + 8 <= most * weight.nbytes


def test_two_of_four_takes_nine_bits_of_sixteen() -> None:
    weight = keep_n_of_m(with_zeros((64, 256), torch.bfloat16, 0), 2, 4)
    packed = Packed.of(weight, "nm")
    assert packed.parts["values"].shape == (64, 64, 2)
    assert packed.nbytes * 16 == weight.nbytes * 9


@pytest.mark.parametrize(("pattern", "size"), [((1, 4), 4), ((2, 4), 4), ((4, 8), 8), ((1, 16), 16)])
def test_nm_finds_the_size_of_its_groups(pattern: tuple[int, int], size: int) -> None:
    weight = keep_n_of_m(with_zeros((32, 128), torch.bfloat16, 0), *pattern)
    assert GroupsOfM.pack(weight)["values"].shape == (32, 128 // size, pattern[0])


def test_nm_refuses_what_it_cannot_hold() -> None:
    weight = with_zeros((4, 12), torch.float32, 0)
    with pytest.raises(InputError, match="a group of 4 with 4 weights"):
        GroupsOfM.pack(weight, of=4, keep=2)
    for size in (8, 512):
        with pytest.raises(InputError, match=f"12 columns in groups of {size}"):
            GroupsOfM.pack(weight, of=size)
    with pytest.raises(InputError, match="13 columns"):
        GroupsOfM.pack(with_zeros((4, 13), torch.float32, 0.9))


def test_only_floating_weights() -> None:
    with pytest.raises(InputError, match=r"torch\.int32"):
        Packed.of(torch.zeros(4, 4, dtype=torch.int32), "bitmask")


def test_unknown_format() -> None:
    with pytest.raises(RecipeError, match="did you mean 'bitmask'"):
        FORMATS.get("bitmsk")


def broken_bitmask() -> dict[str, dict[str, Tensor]]:
    parts = Bitmask.pack(with_zeros((4, 12), torch.float32, 0.5))
    more, beyond = parts["mask"].clone(), parts["mask"].clone()
    more[0, 0] ^= 1
    beyond[2, 1] |= 16
    return {
        "counts": {**parts, "mask": more},
        "bits beyond column 12": {**parts, "mask": beyond},
        "its mask is": {**parts, "mask": parts["mask"][:3]},
        "values and": {**parts, "values": parts["values"][:-1]},
    }


@pytest.mark.parametrize("message", broken_bitmask())
def test_a_mask_that_does_not_fit_is_refused(message: str) -> None:
    with pytest.raises(CheckpointError, match=f"'layer.weight' is damaged: .*{message}"):
        Bitmask.check(broken_bitmask()[message], "layer.weight", (4, 12))


def broken_nm() -> dict[str, dict[str, Tensor]]:
    parts = GroupsOfM.pack(keep_n_of_m(with_zeros((4, 16), torch.float32, 0), 2, 4))
    return {
        "do not ascend": {**parts, "indices": torch.zeros_like(parts["indices"])},
        "its indices of": {**parts, "indices": parts["indices"][1:]},
        "do not divide": {**parts, "values": parts["values"][:, :3]},
        "rows": {**parts, "values": parts["values"][:3]},
    }


@pytest.mark.parametrize("message", broken_nm())
def test_indices_that_do_not_fit_are_refused(message: str) -> None:
    with pytest.raises(CheckpointError, match=f"'layer.weight' is damaged: .*{message}"):
        GroupsOfM.check(broken_nm()[message], "layer.weight", (4, 16))


def test_places_beyond_a_group_are_refused() -> None:
    """Groups of 6 leave two of the eight places of three bits unused."""
    parts = GroupsOfM.pack(keep_n_of_m(with_zeros((2, 12), torch.float32, 0), 2, 6), of=6, keep=2)
    GroupsOfM.check(parts, "w", (2, 12))
    parts["indices"] = torch.tensor([0b00111000, 0b10001110, 0b11100011], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="within groups of 6"):
        GroupsOfM.check(parts, "w", (2, 12))


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_any_changed_byte_is_found(format: str) -> None:
    packed = Packed.of(keep_n_of_m(with_zeros((4, 16), torch.bfloat16, 0), 2, 4), format)
    for part, tensor in packed.parts.items():
        stored = packed.stored("w")
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[prod(tensor.shape) // 2] ^= 1
        stored[f"w.{part}"] = changed
        with pytest.raises(CheckpointError, match="'w' is damaged"):
            Packed.read("w", format, stored)


def test_a_missing_part_is_named() -> None:
    stored = Packed.of(with_zeros((4, 16), torch.bfloat16, 0.5), "bitmask").stored("w")
    del stored["w.values"]
    with pytest.raises(CheckpointError, match=r"w\.values is missing"):
        Packed.read("w", "bitmask", stored)


def test_tensors_of_several_pieces() -> None:
    """Spreading goes piece by piece; a row lies in two of them."""
    weight = with_zeros((701, 1003), torch.bfloat16, 0.5)
    assert weight.numel() > 2 * PIECE
    assert same_bits(Packed.of(weight, "bitmask").unpack(), weight)
    weight = keep_n_of_m(with_zeros((701, 1004), torch.float16, 0.1), 2, 4)
    assert same_bits(Packed.of(weight, "nm").unpack(), weight)


def test_gather_is_what_indexing_gives() -> None:
    weight = with_zeros((9, 31), torch.float32, 0.5)
    mask = weight > 0.3
    assert gather(weight, mask).equal(weight[mask])
    assert gather(weight.T, mask.T).equal(weight.T[mask.T])
    assert spread(weight[mask], mask).equal(weight.masked_fill(~mask, 0))
    assert gather(weight, torch.zeros_like(mask)).shape == (0,)
