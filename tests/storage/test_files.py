"""Files with packed tensors: what their headers say, what they refuse, and how they are put together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from secateur.checkpoint.packing import METADATA_KEY, config_entry, metadata_of
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.safetensors_file import read_packed, read_tensors, save_tensors
from secateur.checkpoint.safetensors_header import read_header
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import CheckpointError
from secateur.storage.formats import FORMATS, Format, Packed, refused
from secateur.storage.packer import Packer

from .test_formats import keep_n_of_m, same_bits, with_zeros

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    return {
        "embed.weight": with_zeros((40, 32), torch.bfloat16, 0),
        "layers.0.up.weight": with_zeros((64, 50), torch.bfloat16, 0.6, 1),
        "layers.0.norm.weight": with_zeros((32,), torch.float32, 0),
        "layers.0.down.weight": keep_n_of_m(with_zeros((32, 64), torch.float16, 0, 2), 2, 4),
        "empty": torch.empty(0, 4),
    }


def packed_file(folder: Path) -> Path:
    mixed: dict[str, Tensor | Packed] = dict(tensors())
    mixed["layers.0.up.weight"] = Packed.of(tensors()["layers.0.up.weight"], "bitmask")
    mixed["layers.0.down.weight"] = Packed.of(tensors()["layers.0.down.weight"], "nm")
    save_tensors(folder / "model.safetensors", mixed)
    return folder / "model.safetensors"


def packed_folder(folder: Path, shard_bytes: int = 10**9) -> Path:
    """A checkpoint as the writer makes it."""
    folder.mkdir(exist_ok=True)
    source = folder / "source"
    source.mkdir()
    save_tensors(source / "model.safetensors", tensors())
    (source / "config.json").write_text('{"model_type": "llama"}')
    out = folder / "packed"
    with CheckpointWriter(out, Checkpoint.open(source), {}) as writer:
        whole = tensors()
        up = "layers.0.up.weight"
        writer.write("one", {up: Packed.of(whole.pop(up), "bitmask")}, {})
        down = "layers.0.down.weight"
        writer.write("two", {**whole, down: Packed.of(whole[down], "nm")}, {})
        writer.assemble(shard_bytes=shard_bytes)
        writer.finish()
    return out


def test_a_header_shows_the_tensors_that_are_stood_for(tmp_path: Path) -> None:
    header = read_header(packed_file(tmp_path))
    assert list(header) == list(tensors())
    for name, tensor in tensors().items():
        assert header[name].shape == tuple(tensor.shape)
        assert header[name].nbytes == tensor.nbytes
    assert [info.format for info in header.values()] == ["", "bitmask", "", "nm", ""]
    up = header["layers.0.up.weight"]
    kept = int((tensors()["layers.0.up.weight"] != 0).sum())
    assert up.stored_bytes == 64 * 7 + 2 * kept + 8 < up.nbytes
    assert header["embed.weight"].stored_bytes == header["embed.weight"].nbytes


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    path = packed_file(tmp_path)
    found = read_tensors(path, read_header(path).values())
    assert all(same_bits(found[name], tensor) for name, tensor in tensors().items())


def test_it_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    """The layout of the docs, read by the stock library."""
    with safe_open(packed_file(tmp_path), "pt") as file:
        said = json.loads(file.metadata()[METADATA_KEY])
        marker = file.get_tensor("layers.0.up.weight")
        mask = file.get_tensor("layers.0.up.weight.mask")
        names = {name for name in file.keys() if "down" in name}  # noqa: SIM118
    assert said == {"version": 1, "formats": {"layers.0.up.weight": "bitmask", "layers.0.down.weight": "nm"}}
    assert (marker.shape, marker.dtype) == ((64, 50, 0), torch.bfloat16)
    assert mask.shape == (64, 7)
    assert names == {f"layers.0.down.weight{part}" for part in ("", ".values", ".indices", ".crc32")}


def test_a_packed_tensor_can_be_read_as_it_is(tmp_path: Path) -> None:
    path = packed_file(tmp_path)
    packed = read_packed(path, read_header(path)["layers.0.down.weight"])
    assert packed.format == "nm"
    assert packed.parts["values"].shape == (32, 16, 2)


def test_ordinary_files_say_nothing_of_packing(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", tensors())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert not file.metadata()


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_checkpoint_of_packed_parts(tmp_path: Path, shard_bytes: int) -> None:
    checkpoint = Checkpoint.open(packed_folder(tmp_path, shard_bytes))
    assert len(checkpoint.shards) == (1 if shard_bytes > 3000 else 3)
    assert checkpoint.formats == {"layers.0.up.weight": "bitmask", "layers.0.down.weight": "nm"}
    assert checkpoint.shapes["layers.0.up.weight"] == (64, 50)
    found = checkpoint.read(tensors())
    assert all(same_bits(found[name], tensor) for name, tensor in tensors().items())
    assert checkpoint.dense_nbytes == sum(tensor.nbytes for tensor in tensors().values())
    assert checkpoint.nbytes < checkpoint.dense_nbytes
    assert checkpoint.config == {"model_type": "llama"}
    stored = json.loads((checkpoint.folder / "config.json").read_text())
    assert stored["quantization_config"] == config_entry(checkpoint.formats)
    for info in checkpoint.tensors.values():
        assert len({part.file for part in info.stored}) == 1


def test_the_index_names_what_lies_in_the_shards(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, 3000)
    index = json.loads((folder / INDEX).read_text())
    lying = {}
    for shard in set(index["weight_map"].values()):
        with safe_open(folder / shard, "pt") as file:
            lying |= dict.fromkeys(file.keys(), shard)
    assert lying == index["weight_map"]
    assert index["metadata"]["total_size"] == Checkpoint.open(folder).nbytes


def test_a_packed_source_is_written_dense_again(tmp_path: Path) -> None:
    """The same bytes as of a copy that was never packed, the order of the tensors included."""
    packed = packed_folder(tmp_path)
    for source, name in ((packed, "from packed"), (tmp_path / "source", "from dense")):
        checkpoint = Checkpoint.open(source)
        with CheckpointWriter(tmp_path / name, checkpoint, {}) as writer:
            writer.write("all", checkpoint.read(checkpoint.tensors), {})
            writer.finish()
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "from packed" / file).read_bytes() == (tmp_path / "from dense" / file).read_bytes()


def test_config_names_the_usual_format_once() -> None:
    formats = {"a": "bitmask", "b": "nm", "c": "bitmask"}
    assert config_entry(formats) == {
        "quant_method": "secateur", "version": 1, "format": "bitmask", "formats": {"b": "nm"},
    }  # fmt: skip


def rewrite(path: Path, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    """Change header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def said(header: dict[str, Any], **changes: Any) -> None:
    content = json.loads(header["__metadata__"][METADATA_KEY])
    header["__metadata__"][METADATA_KEY] = json.dumps({**content, **changes})


def rename(header: dict[str, Any], old: str, new: str) -> None:
    header[new] = header.pop(old)


def flip(part: str) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], data: bytearray) -> None:
        data[header[part]["data_offsets"][0] + 3] ^= 4

    return change


UP = "layers.0.up.weight"
WRONG_AT_ONCE: dict[str, tuple[Callable[[dict[str, Any], bytearray], Any], str]] = {
    "version": (lambda header, _: said(header, version=2), "layout version 2; expected version 1"),
    "format": (lambda header, _: said(header, formats={UP: "zip"}), f"'{UP}' is packed in format 'zip'"),
    "words": (lambda header, _: said(header, formats=[1]), "does not parse"),
    "no format": (lambda header, _: said(header, formats={UP: ["nm"]}), "is packed in format \"\\['nm'\\]\""),
    "no tensor": (lambda header, _: said(header, formats={"w": "nm"}), "'w' is damaged: w is missing"),
    "marker": (lambda header, _: rename(header, UP, "other"), f"'{UP}' is damaged: {UP} is missing"),
    "checksum": (lambda header, _: rename(header, f"{UP}.crc32", "other"), f"{UP}.crc32 is missing"),
    "shape": (lambda header, _: header[UP].update(shape=[0, 64, 50]), "whose last axis is not 0"),
    "cut short": (lambda _, data: data.__delitem__(slice(-10, None)), "is cut short"),
}
WRONG_WHEN_READ: dict[str, tuple[Callable[[dict[str, Any], bytearray], Any], str]] = {
    "mask": (flip(f"{UP}.mask"), f"'{UP}' is damaged: .*checksum"),
    "values": (flip(f"{UP}.values"), f"'{UP}' is damaged: .*checksum"),
    "part": (lambda header, _: rename(header, f"{UP}.mask", f"{UP}.musk"), f"{UP}.mask is missing"),
    "columns": (lambda header, _: header[UP].update(shape=[64, 70, 0]), f"'{UP}' is damaged: its mask is"),
    "fewer": (
        lambda header, _: header[UP].update(shape=[64, 49, 0]),
        f"'{UP}' is damaged: its mask has bits",
    ),
}


@pytest.mark.parametrize("case", WRONG_AT_ONCE)
def test_refused_from_the_header(case: str, tmp_path: Path) -> None:
    change, message = WRONG_AT_ONCE[case]
    path = packed_file(tmp_path)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


@pytest.mark.parametrize("case", WRONG_WHEN_READ)
def test_refused_when_read_and_before_anything_is_written(case: str, tmp_path: Path) -> None:
    change, message = WRONG_WHEN_READ[case]
    folder = packed_folder(tmp_path)
    rewrite(folder / "model.safetensors", change)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read([UP])
    with pytest.raises(CheckpointError, match=message):
        CheckpointWriter(tmp_path / "out", checkpoint, {})
    assert not (tmp_path / "out").exists()


def test_config_and_files_must_agree(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    entry = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {**entry, "version": 3}})
    )
    with pytest.raises(CheckpointError, match="layout version 3"):
        Checkpoint.open(folder)
    source = tmp_path / "source"
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    with pytest.raises(CheckpointError, match="tells of packed tensors and its files of none"):
        Checkpoint.open(source)


def test_metadata_of_nothing() -> None:
    assert metadata_of({}) == {}


def test_a_format_of_ones_own(tmp_path: Path) -> None:
    """What an entry point of another package would bring."""

    class Signs(Format):
        id = "signs"
        parts = ("positive",)

        @classmethod
        def pack(cls, weight: Tensor, **_: Any) -> dict[str, Tensor]:
            return {"positive": weight > 0}

        @classmethod
        def unpack(cls, parts: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return (parts["positive"].to(dtype) * 2 - 1).view(shape)

        @classmethod
        def check(cls, parts: Any, name: str, shape: tuple[int, ...]) -> None:
            if tuple(parts["positive"].shape) != shape:
                raise refused(name, "another shape")

    FORMATS.register("signs")(Signs)
    try:
        weight = torch.tensor([[1.0, -1], [-1, -1]])
        save_tensors(tmp_path / "a.safetensors", {"w": Packed.of(weight, "signs"), "v": weight})
        header = read_header(tmp_path / "a.safetensors")
        assert header["w"].stored_bytes == 4 + 8
        assert read_tensors(tmp_path / "a.safetensors", [header["w"]])["w"].equal(weight)
    finally:
        FORMATS._entries.pop("signs")
    with pytest.raises(CheckpointError, match=r"'w' is packed in format 'signs'; expected .*bitmask"):
        read_header(tmp_path / "a.safetensors")


class TestPacker:
    def test_only_what_becomes_smaller(self) -> None:
        packed = Packer("bitmask")({**tensors(), "sparse": with_zeros((256, 256), torch.bfloat16, 0.5)})
        assert list(packed) == [*tensors(), "sparse"]
        assert [name for name, tensor in packed.items() if isinstance(tensor, Packed)] == [
            "layers.0.up.weight",
            "layers.0.down.weight",
            "sparse",
        ]

    def test_nm_leaves_other_patterns(self) -> None:
        weights = {
            "a": keep_n_of_m(with_zeros((128, 128), torch.bfloat16, 0), 2, 4),
            "b": with_zeros((128, 128), torch.bfloat16, 0.3),
            "c": with_zeros((127, 127), torch.bfloat16, 0.9),
        }
        packed = Packer("nm")(weights)
        assert [isinstance(packed[name], Packed) for name in "abc"] == [True, False, False]

    @pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 16)])
    def test_nm_finds_the_axis_of_its_groups(self, keep: int, of: int) -> None:
        """With few weights left there are groups along both axes: those that take fewer bytes count."""
        rows = keep_n_of_m(with_zeros((128, 512), torch.bfloat16, 0), keep, of)
        found = Packer("nm")({"rows": rows, "columns": rows.T.contiguous()})
        assert [tensor.format for tensor in found.values() if isinstance(tensor, Packed)] == [
            "nm",
            "nm-columns",
        ]
        assert found["rows"].nbytes == found["columns"].nbytes
        assert same_bits(found["columns"].unpack(), rows.T.contiguous())  # type: ignore[union-attr]

    @pytest.mark.parametrize(("zeros", "expected"), [(0.9, True), (0.0, False)])
    def test_experts_all_or_none(self, zeros: float, expected: bool) -> None:
        """They become one tensor in memory, stand-ins of some and weights of others do not."""
        experts = {
            f"mlp.experts.{index}.up.weight": with_zeros((64, 64), torch.bfloat16, zeros if index else 0.0)
            for index in range(8)
        }
        packed = Packer("bitmask")(experts)
        assert {isinstance(tensor, Packed) for tensor in packed.values()} == {expected}

    def test_biases_of_experts_and_experts_in_one_tensor_are_judged_alone(self) -> None:
        sparse, full = (with_zeros((4, 64, 64), torch.bfloat16, zeros) for zeros in (0.9, 0.0))
        names = ["experts.up_proj", "experts.up_proj_bias", "experts.0.up.weight", "experts.0.up.bias"]
        tensors = dict(
            zip((f"mlp.{name}" for name in names), (sparse, full[0], sparse[0], full[0, 0]), strict=True)
        )
        packed = Packer("bitmask")(tensors)
        assert [isinstance(tensor, Packed) for tensor in packed.values()] == [True, False, True, False]

    def test_what_is_packed_stays(self) -> None:
        own = Packed.of(keep_n_of_m(with_zeros((128, 128), torch.bfloat16, 0), 2, 4), "nm")
        assert Packer("bitmask")({"w": own})["w"] is own
