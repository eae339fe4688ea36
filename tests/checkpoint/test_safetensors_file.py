"""The file format against the `safetensors` package, in both directions, and against damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from secateur.checkpoint.safetensors_file import read_tensors, save_tensors, torch_dtype
from secateur.checkpoint.safetensors_header import ITEMSIZES, TensorInfo, encode_header, read_header
from secateur.core.errors import CheckpointError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
LAYOUTS = st.dictionaries(
    st.text(max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(ITEMSIZES)), SHAPES),
    max_size=6,
)
in_one_folder = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _tensors(layout: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 3).abs().to(torch_dtype(dtype))
        for name, (dtype, shape) in layout.items()
    }


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(_same_bits(left[name], right[name]) for name in left)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (left, right)))


@given(layout=LAYOUTS)
@in_one_folder
def test_what_we_write_the_package_reads(quick_folder: Path, layout):
    tensors = _tensors(layout)
    save_tensors(quick_folder / "a", tensors)
    assert _same(load_file(quick_folder / "a"), tensors)


@given(layout=LAYOUTS)
@in_one_folder
def test_what_the_package_writes_we_read(quick_folder: Path, layout):
    tensors = _tensors(layout)
    (quick_folder / "a").write_bytes(save(tensors, {"format": "pt"}))
    header = read_header(quick_folder / "a")
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == layout
    assert _same(read_tensors(quick_folder / "a", header.values()), tensors)


@given(layout=LAYOUTS, data=st.data())
@in_one_folder
def test_damage_is_an_error_of_ours_or_harmless(quick_folder: Path, layout, data):
    content = bytearray(save(_tensors(layout)))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        harmless = False
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        harmless = True
    (quick_folder / "a").write_bytes(content)
    try:
        header = read_header(quick_folder / "a")
    except CheckpointError:
        return
    assert harmless
    assert read_tensors(quick_folder / "a", header.values()).keys() == header.keys()


def test_strides_and_views_are_written_as_seen(tmp_path: Path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"transposed": base.T, "slice": base[1:3, ::2], "expanded": base[:1].expand(3, 6)}
    save_tensors(tmp_path / "a", {**tensors, "parameter": torch.nn.Parameter(base)})
    found = load_file(tmp_path / "a")
    assert torch.equal(found.pop("parameter"), base)
    assert _same(found, tensors)


def test_each_tensor_owns_its_memory(tmp_path: Path):
    save_tensors(tmp_path / "a", {"a": torch.zeros(4), "b": torch.ones(4)})
    found = read_tensors(tmp_path / "a", read_header(tmp_path / "a").values())
    found["a"].fill_(5)
    assert found["a"].untyped_storage().nbytes() == 16
    assert torch.equal(load_file(tmp_path / "a")["a"], torch.zeros(4))
    assert torch.equal(found["b"], torch.ones(4))


def _file(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def _entry(start: int, stop: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{", b"", "does not parse"),
        (b"[1]", b"", "does not parse"),
        (b'{"a": 1, "a": 2}', b"", "'a' appears twice"),
        (b"[" * 100_000, b"", "does not parse"),
        ({"a": {"dtype": "F32"}}, b"", "does not parse"),
        ({"a": _entry(0, 12)}, bytes(12), "12 bytes for shape"),
        ({"a": _entry(0, 8, shape=(-1, -2))}, bytes(8), "shape or offsets"),
        ({"a": _entry(4, 12)}, bytes(12), "a gap or an overlap"),
        ({"a": _entry(0, 8), "b": _entry(4, 12)}, bytes(12), "a gap or an overlap"),
        ({"a": _entry(0, 8)}, bytes(7), "cut short"),
        ({"a": _entry(0, 8)}, bytes(9), "1 bytes more"),
        ({"a": _entry(0, 8, dtype="F4")}, bytes(8), "has dtype F4"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, header, data, says):
    with pytest.raises(CheckpointError, match=says):
        read_header(_file(tmp_path / "a", header, data))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04 a zip, not safetensors", "damaged"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, says: str):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_header(tmp_path / "a")


def test_a_file_cut_after_opening_is_an_error(tmp_path: Path):
    save_tensors(tmp_path / "a", {"a": torch.zeros(100)})
    header = read_header(tmp_path / "a")
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(header["a"].stop - 1)
    with pytest.raises(CheckpointError, match="cut short"):
        read_tensors(tmp_path / "a", header.values())


def test_header_ends_on_eight_bytes():
    for length in range(1, 20):
        assert len(encode_header([("x" * length, "float32", (2,))], {"format": "pt"})) % 8 == 0


@pytest.mark.parametrize("name", ITEMSIZES)
def test_bytes_of_an_element(name: str):
    assert torch_dtype(name).itemsize == ITEMSIZES[name]
    assert str(torch_dtype(name)) == f"torch.{name}"
    info = TensorInfo("w", name, (1,), "a", 0, ITEMSIZES[name])
    assert info.is_floating_point == torch_dtype(name).is_floating_point
