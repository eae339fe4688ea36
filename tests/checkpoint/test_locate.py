"""Folder, hub id or the bundled model."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from secateur.checkpoint.locate import HUB_FILES, HUB_LEFT_OUT, locate
from secateur.core.errors import CheckpointError


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub client's own offline mode, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~") == tmp_path


def test_a_cached_model_needs_no_network(offline: Path):
    cached = offline / "models--owner--name"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert locate("owner/name") == snapshot


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("owner/name", "no folder here, and the hub gave no such model"),
        ("gpt2", "no folder here, and the hub gave no such model"),
        ("./missing", "there is no folder missing"),
        ("/missing/folder", "there is no folder /missing/folder"),
        ("a/b/c", "there is no folder a/b/c"),
        (Path("owner/name"), "there is no folder owner/name"),
    ],
)
def test_what_cannot_be_found_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        locate(tmp_path / "model.safetensors")


def test_a_revision_belongs_to_a_hub_id(tmp_path: Path):
    with pytest.raises(CheckpointError, match="'main' with the local folder"):
        locate(tmp_path, "main")


def test_the_word_seedling_is_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "seedling").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("./seedling").resolve() == tmp_path / "seedling"
    bundled = Path(str(importlib.resources.files("secateur"))) / "seedling"
    if bundled.is_dir():
        assert locate("seedling") == bundled
    else:
        with pytest.raises(CheckpointError, match="lacks the bundled model"):
            locate("seedling")


def test_only_what_is_needed_is_downloaded():
    wanted = [
        "additional_chat_templates/rag.jinja",
        "config.json",
        "LICENSE",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    others = [
        ".gitattributes",
        "README.md",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "metal/model.bin",
        "onnx/config.json",
        "original/model.safetensors",
        "original/tokenizer.model",
        "pytorch_model.bin",
        "q4.gguf",
    ]
    found = filter_repo_objects(wanted + others, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEFT_OUT)
    assert list(found) == wanted
