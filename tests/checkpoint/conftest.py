"""Small checkpoints written by the `safetensors` package, and the trained models of the shared folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from .samples import INDEX, MakeCheckpoint, small_tensors


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Writes a checkpoint folder: one file, or `shards` files with an index."""

    def make(
        folder: Path | None = None,
        tensors: dict[str, Tensor] | None = None,
        shards: int = 1,
        **config: object,
    ) -> Path:
        folder = folder or tmp_path / "source"
        tensors = small_tensors() if tensors is None else tensors
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "b": 1, "a": 2, **config}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "LICENSE").write_text("free")
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            own = dict(list(tensors.items())[number::shards])
            save_file(own, folder / name, {"format": "pt"})
            weight_map.update(dict.fromkeys(own, name))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return make


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: flushing to a disk hundreds of times takes seconds."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    folder = Path("/dev/shm") / f"secateur-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["stories260k", "tales-moe"])
def trained(request: pytest.FixtureRequest) -> Path:
    """A trained model: grouped-query Llama in float32, mixture of experts in float16."""
    beside = Path(__file__).parents[3] / "shared"
    folder = Path(os.environ.get("SECATEUR_SHARED", beside)) / "models" / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; SECATEUR_SHARED names the folder of the shared models")
    return folder
