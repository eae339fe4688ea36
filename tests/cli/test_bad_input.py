"""Bad input: one clear line, exit code 2, nothing half-written, the source never touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_tokenizer
from transformers import BertConfig, BertModel

from secateur.cli.app import run

TEXT = "The gardener cut the old branches of the apple tree.\n" * 60


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("pristine") / "model", max_shard_size="100KB")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


DEFAULTS = {"--method": "wanda", "--samples": "4", "--length": "16", "--evaluation-windows": "0"}


def prune(model: Path | str, out: Path, text: Path | str, *more: str) -> list[str]:
    defaults = [word for name, value in DEFAULTS.items() if name not in more for word in (name, value)]
    return [
        "prune",
        str(model),
        "-o",
        str(out),
        "--calibration",
        str(text),
        "--no-measure-speed",
        *defaults,
        *more,
    ]


def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str], *fragments: str) -> str:
    """The command ends with 2 and one line that holds every fragment."""
    code = run(arguments)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert code == 2, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for fragment in fragments:
        assert fragment in lines[0], lines[0]
    return lines[0]


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["--sparsity", "1.0"], ["sparsity 1", "below 1"]),
        (["--sparsity", "-0.1"], ["sparsity -0.1"]),
        (["--sparsity", "50"], ["sparsity 50", "0.5"]),
        ([], ["no sparsity", "--sparsity 0.5"]),
        (["--pattern", "2:0"], ["2:0", "N:M"]),
        (["--pattern", "5:4"], ["5:4"]),
        (["--pattern", "2:5"], ["64 inputs", "multiple of 5"]),
        (["--pattern", "2:4", "--sparsity", "0.6"], ["0.6", "2:4"]),
        (["--pattern", "rwo", "--sparsity", "0.5"], ["rwo", "'row'"]),
        (["--method", "wandaa", "--sparsity", "0.5"], ["wandaa", "did you mean 'wanda'"]),
        (["--method", "sparsegpt", "--sparsity", "0.5", "-O", "blocksise=64"], ["blocksise", "blocksize"]),
        (["--method", "sparsegpt", "--sparsity", "0.5", "-O", "blocksize=-1"], ["blocksize", "-1"]),
        (["--sparsity", "0.5", "-O", "novalue"], ["novalue", "name=value"]),
        (["--sparsity", "0.5", "--allocation", "owll"], ["owll", "did you mean 'owl'"]),
        (["--sparsity", "0.5", "--device", "cuda:99"], ["cuda:99"]),
        (["--sparsity", "0.5", "--device", "tpu"], ["tpu"]),
        (["--sparsity", "0.5", "--dtype", "int3"], ["int3"]),
        (["--sparsity", "0.5", "--length", "100000"], ["100000", "256"]),
        (["--sparsity", "0.5", "--samples", "0"], ["samples", "0"]),
        (["--sparsty", "0.5"], ["--sparsty", "--sparsity"]),
        (["--method", "alps", "--sparsity", "0.5", "--pattern", "global"], ["global", "alps"]),
    ],
)
def test_wrong_request(
    more: list[str],
    fragments: list[str],
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = digest(model)
    refuse(prune(model, tmp_path / "out", text, *more), capsys, *fragments)
    assert not (tmp_path / "out").exists()
    assert digest(model) == before


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def remove_shard(model: Path) -> None:
    shards(model)[1].unlink()


def cut_shard(model: Path) -> None:
    path = shards(model)[1]
    path.write_bytes(path.read_bytes()[:-100])


def empty_shard(model: Path) -> None:
    shards(model)[0].write_bytes(b"")


def damage_header(model: Path) -> None:
    shards(model)[0].write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def wrong_index(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.nothing.weight"] = shards(model)[0].name
    path.write_text(json.dumps(index))


def nan_weight(model: Path) -> None:
    for path in shards(model):
        tensors = load_file(path)
        name = next((name for name in tensors if name.endswith("up_proj.weight")), None)
        if name:
            tensors[name][0, 0] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
            return


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_weights(model: Path) -> None:
    for path in [*shards(model), model / "model.safetensors.index.json"]:
        path.unlink()


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def larger_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] |= {f"extra{i}": len(tiny_tokenizer()) + i for i in range(8)}
    path.write_text(json.dumps(values))


FROM_HEADERS: list[tuple[Callable[[Path], None], list[str]]] = [
    (remove_shard, ["model-00002"]),
    (cut_shard, ["model-00002"]),
    (empty_shard, ["model-00001"]),
    (damage_header, ["model-00001"]),
    (wrong_index, ["model.layers.0.nothing.weight"]),
    (change_config(quantization_config={"quant_method": "gptq", "bits": 4}), ["quantis"]),
    (change_config(model_type="nosuchmodel"), ["model type"]),
    (change_config(hidden_size=128), ["shape"]),
    (change_config(num_attention_heads=6), ["refused by transformers", "not a multiple"]),
    (no_config, ["config.json"]),
    (no_weights, ["safetensors"]),
]


@pytest.mark.parametrize(("damage", "fragments"), FROM_HEADERS)
def test_inspect_refuses_as_prune_does(
    damage: Callable[[Path], None], fragments: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    refuse(["inspect", str(model)], capsys, *fragments)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        *FROM_HEADERS,
        (nan_weight, ["up_proj.weight"]),
        (no_tokenizer, ["tokenizer"]),
        (larger_tokenizer, ["328", "320"]),
    ],
)
def test_damaged_model(
    damage: Callable[[Path], None],
    fragments: list[str],
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(model)
    before = digest(model)
    refuse(prune(model, tmp_path / "out", text, "--sparsity", "0.5"), capsys, *fragments)
    assert digest(model) == before
    assert not (tmp_path / "out" / "config.json").exists()


def test_encoder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    refuse(prune(tmp_path / "bert", tmp_path / "out", text, "--sparsity", "0.5"), capsys, "bert", "decoder")
    refuse(["inspect", str(tmp_path / "bert")], capsys, "bert", "decoder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "./missing-folder"])
def test_model_that_is_not_there(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(prune(name, tmp_path / "out", text, "--sparsity", "0.5"), capsys, name.removeprefix("./"))


@pytest.mark.parametrize(
    ("name", "content", "more", "fragments"),
    [
        ("missing.txt", None, [], ["missing.txt"]),
        ("empty.txt", b"", [], ["empty"]),
        ("short.txt", b"Too short.", [], ["token", "window"]),
        ("latin.txt", "Gärtner ".encode("latin-1") * 400, [], ["UTF-8"]),
        ("rows.jsonl", b'{"body": "a", "head": "b"}\n' * 9, ["--column", "text"], ["text", "body", "head"]),
        ("rows.jsonl", b'{"body": "a", "head": "b"}\n' * 9, [], ["body", "head"]),
        ("rows.jsonl", b'{"text": ', [], ["rows.jsonl"]),
        ("rows.parquet", b"not parquet at all", [], ["rows.parquet"]),
    ],
)
def test_bad_calibration(
    name: str,
    content: bytes | None,
    more: list[str],
    fragments: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refuse(prune(model, tmp_path / "out", tmp_path / name, "--sparsity", "0.5", *more), capsys, *fragments)
    assert not (tmp_path / "out").exists()


def test_output_is_not_empty(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refuse(prune(model, out, text, "--sparsity", "0.5"), capsys, "out", "empty")
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_output_is_the_input(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(model)
    refuse(prune(model, model, text, "--sparsity", "0.5"), capsys, "model")
    assert digest(model) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_output_is_read_only(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    refuse(prune(model, place / "out", text, "--sparsity", "0.5"), capsys, "locked")


def test_too_little_disk(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuse(prune(model, tmp_path / "out", text, "--sparsity", "0.5"), capsys, "disk")
    assert not (tmp_path / "out").exists()


def test_zero_sparsity_gives_the_same_weights(model: Path, text: Path, tmp_path: Path) -> None:
    assert run(prune(model, tmp_path / "out", text, "--sparsity", "0", "--json")) == 0
    before = {name: t for path in shards(model) for name, t in load_file(path).items()}
    after = {name: t for path in shards(tmp_path / "out") for name, t in load_file(path).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_json_errors_are_json(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prune(model, tmp_path / "out", text, "--sparsity", "2", "--json")) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    refuse(["prnue", "seedling"], capsys, "prune")


def test_recipe_with_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: seedling\nmethod: wanda\nsparsty: 0.5\n")
    refuse(["prune", "-o", str(tmp_path / "out"), "--recipe", str(recipe)], capsys, "sparsty", "sparsity")


@pytest.mark.parametrize(("command", "resumed"), [("prune", True), ("recover", True), ("export", False)])
def test_an_interrupted_command_says_how_to_go_on(
    command: str, resumed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.cli.app.app", interrupt)
    assert run([command, "model"]) == 130
    told = capsys.readouterr().err
    assert "run the same command again" in told
    assert ("--resume" in told) == resumed
