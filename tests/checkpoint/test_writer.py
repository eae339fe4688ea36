"""Parts in, an ordinary checkpoint out; refusals leave nothing behind and never touch the source."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import OutputError, ResumeError

from .samples import INDEX, MakeCheckpoint, digests, in_child, small_tensors, was_killed

NOBODY = 65534


def copy_through(
    source: Path, out: Path, *, parts: int = 3, extra: Any = None, **assembly: Any
) -> Checkpoint:
    """Write a checkpoint's own tensors in several parts."""
    checkpoint = Checkpoint.open(source)
    writer = CheckpointWriter(out, checkpoint, {})
    names = list(checkpoint.tensors)
    for part in range(parts):
        writer.write(f"part {part}", checkpoint.read(names[part::parts]), {})
    writer.assemble(**assembly)
    writer.finish(extra=extra)
    return Checkpoint.open(out)


@pytest.mark.parametrize("parts", [1, 3])
def test_an_unchanged_model_keeps_its_bytes(make_checkpoint: MakeCheckpoint, tmp_path: Path, parts: int):
    source = make_checkpoint()
    before = digests(source)
    copy_through(source, tmp_path / "deep" / "out", parts=parts)
    after = digests(tmp_path / "deep" / "out")
    assert digests(source) == before
    assert after.pop("config.json") != before.pop("config.json")  # the same content, indented
    assert after == before


@pytest.mark.parametrize("shard_bytes", [1, 300, 10_000])
def test_shards_hold_everything_once(make_checkpoint: MakeCheckpoint, tmp_path: Path, shard_bytes: int):
    out = tmp_path / "out"
    result = copy_through(make_checkpoint(shards=3), out, shard_bytes=shard_bytes)
    expected = small_tensors()
    found = result.read(expected)
    assert result.tensors.keys() == expected.keys()
    assert result.shards == sorted(path.name for path in out.glob("*.safetensors"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for shard in result.shards:
        held = [tensor for tensor in result.tensors.values() if tensor.file == shard]
        assert sum(tensor.nbytes for tensor in held) <= shard_bytes or len(held) == 1
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    if shard_bytes == 10_000:
        assert result.shards == ["model.safetensors"]
        assert not (out / INDEX).exists()
    else:
        total = json.loads((out / INDEX).read_text())["metadata"]["total_size"]
        assert total == result.nbytes


def test_changed_dtypes_stay_aligned(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = make_checkpoint(tensors={"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(2)})
    checkpoint = Checkpoint.open(source)
    writer = CheckpointWriter(tmp_path / "out", checkpoint, {})
    writer.write(
        "all", {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(1), "c": torch.ones(2).half()}, {}
    )
    writer.write("new", {"mask": torch.ones(5, dtype=torch.int64)}, {})
    writer.finish()
    result = Checkpoint.open(tmp_path / "out")
    assert all(tensor.start % tensor.itemsize == 0 for tensor in result.tensors.values())
    assert list(load_file(tmp_path / "out" / "model.safetensors")["mask"]) == [1] * 5


def test_config_and_extra_files(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = make_checkpoint(name="ü")
    (source / "README.md").write_text("the original")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    updates, extra = {"a": [3], "new": None}, {"report.json": "{}", "plot.png": b"\x89"}
    copy_through(source, tmp_path / "out", config_updates=updates, extra=extra)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert list(config.items()) == [
        ("model_type", "llama"),
        ("b", 1),
        ("a", [3]),
        ("name", "ü"),
        ("new", None),
    ]
    assert set(digests(tmp_path / "out")) == {
        "LICENSE",
        "additional_chat_templates/rag.jinja",
        "config.json",
        "model.safetensors",
        "plot.png",
        "report.json",
        "tokenizer.json",
    }


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 1_000_000])
def test_transformers_loads_the_result(trained: Path, tmp_path: Path, shard_bytes: int):
    before = digests(trained)
    result = copy_through(trained, tmp_path / "out", shard_bytes=shard_bytes)
    assert (len(result.shards) == 1) == (shard_bytes > result.nbytes)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Once upon a time", return_tensors="pt").input_ids
    logits = [_logits(folder, ids) for folder in (trained, tmp_path / "out")]
    assert torch.equal(*logits)
    assert digests(trained) == before


@torch.no_grad()
def _logits(folder: Path, ids: Tensor) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


# --- parts, notes, resuming ---------------------------------------------------------------------------


@pytest.fixture
def source(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return Checkpoint.open(make_checkpoint())


def test_parts_come_back_in_another_run(source: Checkpoint, tmp_path: Path):
    tensors = {"b": torch.arange(6).view(2, 3).T, "a": torch.ones(2).bfloat16()}
    first = CheckpointWriter(tmp_path / "out", source, {"seed": 0})
    first.write("one/../*", tensors, {"loss": 0.1, "shape": (1, 2)})
    first.note("allocation", {"0": 0.1 + 0.2})
    (first.workspace / "gradients").write_bytes(b"kept")
    first.close()
    second = CheckpointWriter(tmp_path / "out", source, {"seed": 0}, resume=True)
    assert second.parts == first.parts == {"one/../*": {"loss": 0.1, "shape": [1, 2]}}
    assert second.notes == first.notes == {"allocation": {"0": 0.1 + 0.2}}
    assert (second.workspace / "gradients").read_bytes() == b"kept"
    found = second.read("one/../*")
    assert list(found) == ["b", "a"]
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_part_can_be_written_again(source: Checkpoint, tmp_path: Path):
    writer = CheckpointWriter(tmp_path / "out", source, {})
    writer.write("a", {"x": torch.zeros(1)}, {"try": 1})
    writer.write("b", {"y": torch.zeros(1)}, {})
    writer.write("a", {"x": torch.ones(1)}, {"try": 2})
    assert list(writer.parts.items()) == [("a", {"try": 2}), ("b", {})]
    assert writer.read("a")["x"] == 1
    assert writer.read("b")["y"] == 0


def test_a_record_that_is_no_json_writes_nothing(source: Checkpoint, tmp_path: Path):
    writer = CheckpointWriter(tmp_path / "out", source, {})
    before = digests(tmp_path / "out")
    with pytest.raises(TypeError):
        writer.write("a", {"x": torch.zeros(1)}, {"loss": torch.zeros(1)})
    with pytest.raises(KeyError):
        writer.read("a")
    assert digests(tmp_path / "out") == before


def test_resume_begins_where_nothing_was_begun(source: Checkpoint, tmp_path: Path):
    assert CheckpointWriter(tmp_path / "out", source, {}, resume=True).parts == {}


def test_another_recipe_does_not_resume(source: Checkpoint, tmp_path: Path):
    CheckpointWriter(tmp_path / "out", source, {"sparsity": 0.5}).note("a", 1)
    before = digests(tmp_path / "out")
    with pytest.raises(ResumeError, match=r"sparsity: 0\.5 -> 0\.6"):
        CheckpointWriter(tmp_path / "out", source, {"sparsity": 0.6}, resume=True)
    assert digests(tmp_path / "out") == before


def test_an_unfinished_run_is_not_overwritten(source: Checkpoint, tmp_path: Path):
    CheckpointWriter(tmp_path / "out", source, {})
    with pytest.raises(OutputError, match="unfinished run; add --resume"):
        CheckpointWriter(tmp_path / "out", source, {})


def test_a_finished_run_is_not_overwritten(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = make_checkpoint()
    copy_through(source, tmp_path / "out")
    before = digests(tmp_path / "out")
    for resume in (False, True):
        with pytest.raises(OutputError, match="not empty"):
            CheckpointWriter(tmp_path / "out", Checkpoint.open(source), {}, resume=resume)
    assert digests(tmp_path / "out") == before


def test_an_incomplete_checkpoint_does_not_finish(source: Checkpoint, tmp_path: Path):
    writer = CheckpointWriter(tmp_path / "out", source, {})
    names = list(source.tensors)
    writer.write("a", source.read(names[1:]), {})
    with pytest.raises(ValueError, match=f"1 tensors were never written, the first is '{names[0]}'"):
        writer.finish()
    writer.write("b", source.read(names[:2]), {})
    with pytest.raises(ValueError, match=f"'{names[1]}' was written in two parts"):
        writer.finish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".secateur"]
    writer.write("b", source.read(names[:1]), {})
    writer.finish()
    assert Checkpoint.open(tmp_path / "out").tensors.keys() == source.tensors.keys()


def test_finish_twice_is_finish_once(source: Checkpoint, tmp_path: Path):
    writer = CheckpointWriter(tmp_path / "out", source, {})
    writer.write("a", source.read(source.tensors), {})
    writer.finish()
    before = digests(tmp_path / "out")
    writer.finish()
    assert digests(tmp_path / "out") == before


# --- places that cannot take a result -----------------------------------------------------------------


def test_not_the_source_itself_nor_inside(source: Checkpoint, tmp_path: Path):
    before = digests(source.folder)
    (tmp_path / "link").symlink_to(source.folder)
    for out in (source.folder, source.folder / "deep" / "out", tmp_path / "link", tmp_path / "link" / "out"):
        with pytest.raises(OutputError, match="the source"):
            CheckpointWriter(out, source, {})
    assert digests(source.folder) == before
    assert not (source.folder / "deep").exists()


def test_not_a_folder_with_files(source: Checkpoint, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"not empty \(it holds thesis.tex\)"):
        CheckpointWriter(tmp_path / "out", source, {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_not_a_file(source: Checkpoint, tmp_path: Path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match="is a file"):
            CheckpointWriter(out, source, {})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_not_without_permission(make_checkpoint: MakeCheckpoint, quick_folder: Path):
    source = Checkpoint.open(make_checkpoint(quick_folder / "source"))
    closed = quick_folder / "closed"
    closed.mkdir(mode=0o555)

    def refused() -> None:
        if os.geteuid() == 0:  # the superuser may write everywhere
            os.setuid(NOBODY)
        for out in (closed, closed / "out"):
            with pytest.raises(OutputError, match="cannot be written"):
                CheckpointWriter(out, source, {})

    assert not was_killed(in_child(refused))
    assert not list(closed.iterdir())


def test_not_on_a_disk_that_is_too_small(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    """A sparse source of as many bytes as are free: half of what writing it needs."""
    folder = make_checkpoint()
    free = shutil.disk_usage(tmp_path).free // 2 * 2
    raw = json.dumps({"w": {"dtype": "BF16", "shape": [free // 2], "data_offsets": [0, free]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + free)
    with pytest.raises(OutputError, match=r"GB are free .*; expected .* GB"):
        CheckpointWriter(tmp_path / "out" / "deep", Checkpoint.open(folder), {})
    assert not (tmp_path / "out").exists()
    CheckpointWriter.check(tmp_path / "out", Checkpoint.open(folder), result_bytes=free // 3)
