"""Commands on packed folders: what they write is smaller, what they read is the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

import secateur
from secateur.checkpoint.reader import Checkpoint
from secateur.cli.app import run
from secateur.core.errors import RecipeError
from secateur.recipe import Recipe, read_recipe
from secateur.report.model import Report

from .models import save_packed, save_sparse, stored
from .test_loading import load, logits

QUICK: dict[str, Any] = {"evaluation_windows": 0, "measure_speed": False, "check_loading": False}
FLAGS = ["--evaluation-windows", "0", "--no-measure-speed", "--no-check-loading"]


def same_tensors(one: Path, other: Path) -> bool:
    first, second = stored(one), stored(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """seedling at half its weights, dense and packed by the same run."""
    folder = tmp_path_factory.mktemp("half")
    for name, format in (("dense", "dense"), ("packed", "bitmask")):
        secateur.prune("seedling", folder / name, method="magnitude", sparsity=0.5, format=format, **QUICK)
    return folder / "dense", folder / "packed"


def test_half_of_seedling(half: tuple[Path, Path]) -> None:
    dense, packed = (Checkpoint.open(folder) for folder in half)
    names = packed.formats
    assert len(names) == 42  # every matrix of every block
    whole = sum(dense.tensors[name].nbytes for name in names)
    now = sum(packed.tensors[name].stored_bytes for name in names)
    weights = sum(dense.tensors[name].numel for name in names)
    assert now == weights // 2 * 2 + weights // 8 + 8 * len(names) <= 0.57 * whole
    assert packed.nbytes == dense.nbytes - whole + now
    assert packed.dense_nbytes == dense.nbytes
    report = Report.load(half[1])
    assert report.bytes_after == packed.nbytes < report.bytes_before == dense.nbytes
    assert report.storage is not None
    assert (report.storage.tensors_packed, report.storage.tensors_plain) == (42, 14)
    assert "stored as bitmask" in report.effect
    assert report.loads_in["vllm"].startswith("no: weights are packed")
    assert Report.load(half[0]).storage is None


def test_seventy_percent_of_seedling(tmp_path: Path) -> None:
    out = tmp_path / "out"
    secateur.prune("seedling", out, method="magnitude", sparsity=0.7, format="bitmask", **QUICK)
    packed = Checkpoint.open(out)
    infos = [packed.tensors[name] for name in packed.formats]
    assert len(infos) == 42
    assert sum(info.stored_bytes for info in infos) <= 0.37 * sum(info.nbytes for info in infos)


def test_same_logits(half: tuple[Path, Path]) -> None:
    expected = logits(load(half[0]))
    assert logits(load(half[1])).equal(expected)
    found = logits(load(half[1], "packed"))
    assert found.dtype == torch.float16  # products may be summed in another order, and rounded otherwise
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.02)


def test_dense_files_come_back(half: tuple[Path, Path], tmp_path: Path) -> None:
    facts = secateur.export(half[1], tmp_path / "back", format="dense")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (half[0] / file).read_bytes()
    assert facts["bytes"] == Checkpoint.open(half[0]).nbytes


def test_export_packs_as_prune_does(half: tuple[Path, Path], tmp_path: Path) -> None:
    facts = secateur.export(half[0], tmp_path / "out", format="bitmask")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (half[1] / file).read_bytes()
    assert facts["tensors_packed"] == 42
    assert "42 tensors are packed; 14 stay as they are, which is no larger" in facts["notes"]


def test_export_of_a_model_without_zeros(tmp_path: Path) -> None:
    facts = secateur.export("seedling", tmp_path / "out", format="bitmask")
    assert facts["notes"] == ["nothing would become smaller: these are ordinary files"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert same_tensors(tmp_path / "out", Path(secateur.__file__).parent / "seedling")


def test_two_of_four(tmp_path: Path) -> None:
    out = tmp_path / "out"
    secateur.prune("seedling", out, method="magnitude", pattern="2:4", format="nm", **QUICK)
    packed = Checkpoint.open(out)
    infos = [packed.tensors[name] for name in packed.formats]
    assert len(infos) == 42
    values, kept = sum(info.nbytes for info in infos), sum(info.numel for info in infos)
    assert sum(info.stored_bytes for info in infos) == values // 2 + kept // 8 + 8 * 42 <= 0.57 * values


@pytest.mark.parametrize(("family", "packed", "columns"), [("gpt2", 8, 8), ("gpt_oss", 12, 4)])
def test_two_of_four_of_matrices_that_are_stored_transposed(
    family: str, packed: int, columns: int, tmp_path: Path
) -> None:
    """Groups are along the inputs of a matrix, however it lies in the file; what was cut comes back."""
    model = save_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    for name in ("nm", "dense"):
        secateur.prune(
            model, tmp_path / name, method="magnitude", pattern="2:4", format=name, **QUICK
        )  # fmt: skip
    small = Checkpoint.open(tmp_path / "nm")
    kinds = list(small.formats.values())
    assert (len(kinds), kinds.count("nm-columns")) == (packed, columns)
    infos = [small.tensors[name] for name in small.formats]
    assert all(info.stored_bytes == info.nbytes * 9 // 16 + 8 for info in infos)
    planned = secateur.plan(model, method="magnitude", pattern="2:4", format="nm")["bytes_after"]
    assert small.nbytes == planned + 8 * packed
    secateur.export(tmp_path / "nm", tmp_path / "back", format="dense")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "dense" / file).read_bytes()
    expected = logits(load(tmp_path / "dense", dtype=torch.float32))
    for mode in ("dense", "packed"):
        found = logits(load(tmp_path / "nm", mode, dtype=torch.float32))
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if mode == "dense" else 1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_other_families_come_back(family: str, tmp_path: Path) -> None:
    dense = save_sparse(family, tmp_path / "dense")
    secateur.export(save_packed(dense, tmp_path / "packed"), tmp_path / "back", format="dense")
    assert same_tensors(dense, tmp_path / "back")


def test_a_trained_mixture(shared: Path, tmp_path: Path) -> None:
    for name, format in (("dense", "dense"), ("packed", "bitmask")):
        secateur.prune(
            shared / "models" / "tales-moe", tmp_path / name, method="magnitude", sparsity=0.5,
            format=format, **QUICK,
        )  # fmt: skip
    assert Checkpoint.open(tmp_path / "packed").nbytes < 0.65 * Checkpoint.open(tmp_path / "dense").nbytes
    assert logits(load(tmp_path / "packed")).equal(logits(load(tmp_path / "dense")))


def test_inspect(half: tuple[Path, Path]) -> None:
    dense, packed = (secateur.inspect(folder) for folder in half)
    assert packed["formats"] == {"bitmask": 42}
    assert dense["formats"] == {}
    assert packed["bytes"] < packed["dense_bytes"] == dense["bytes"] == dense["dense_bytes"]
    for key in ("parameters", "spaces", "block_kinds", "tensors", "dtypes"):
        assert packed[key] == dense[key]
    assert packed["loads_in"]["transformers"] == "yes: after `import secateur`, weights are packed (bitmask)"


def test_inspect_shows_both_sizes(half: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(half[1])]) == 0
    shown = capsys.readouterr().out
    assert "42 in bitmask; 2.89 MB unpacked" in shown


def test_commands_need_no_torch_to_inspect(half: tuple[Path, Path]) -> None:
    probe = "import sys, secateur; secateur.inspect(sys.argv[1]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", probe, str(half[1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_evaluate(half: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little garden.\n" * 100)
    dense, packed = (
        secateur.evaluate(folder, text=str(text), windows=4, length=32)["perplexity"] for folder in half
    )
    assert packed == dense


def test_pruning_goes_on_from_packed_weights(half: tuple[Path, Path], tmp_path: Path) -> None:
    for source, name in zip(half, ("one", "two"), strict=True):
        secateur.prune(source, tmp_path / name, method="magnitude", sparsity=0.7, **QUICK)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "two" / "config.json").read_text())


def test_recovery_reads_and_writes_packed_weights(half: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little garden.\n" * 200)
    given = {"text": str(text), "how": "refit", "teacher": "seedling", "tokens": 512, "length": 32, **QUICK}
    secateur.recover(half[0], tmp_path / "dense", **given)
    secateur.recover(half[1], tmp_path / "packed", format="bitmask", **given)
    packed = Checkpoint.open(tmp_path / "packed")
    assert len(packed.formats) == 42
    secateur.export(tmp_path / "packed", tmp_path / "back", format="dense")
    assert same_tensors(tmp_path / "back", tmp_path / "dense")


def test_only_the_last_stage_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.pipeline import chain

    monkeypatch.setattr(chain, "rmtree", lambda folder: None)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: seedling\nmethod: magnitude\nformat: bitmask\nevaluation_windows: 0\nmeasure_speed: false\n"
        "check_loading: false\nstages:\n- sparsity: 0.3\n- sparsity: 0.6\n"
    )
    chain.prune_chain(read_recipe(recipe), tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").formats
    assert not Checkpoint.open(tmp_path / "out.stages" / "1").formats


@pytest.mark.reopens
def test_the_result_is_opened_in_a_fresh_process(tmp_path: Path) -> None:
    settings = {**QUICK, "check_loading": True}
    report = secateur.prune(
        "seedling", tmp_path / "out", method="magnitude", sparsity=0.5, format="bitmask", **settings
    )
    said = report.loads_in["transformers"]
    assert said == "yes: after `import secateur` (LlamaForCausalLM, opened and run in a fresh process)"


KILLED = """
import os, signal, sys
import secateur.checkpoint.writer as w
original, left = w.CheckpointWriter.write, int(sys.argv.pop(1))
def write(self, *arguments):
    global left
    original(self, *arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
w.CheckpointWriter.write = write
from secateur.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
@pytest.mark.parametrize("command", ["prune", "export"])
def test_killed_and_resumed(command: str, half: tuple[Path, Path], tmp_path: Path) -> None:
    """Ends in the bytes of the run that was left alone."""
    out = tmp_path / "out"
    arguments = ["export", str(half[0]), "--format", "bitmask", "-o", str(out)]
    if command == "prune":
        arguments = ["prune", "seedling", "--method", "magnitude", "--sparsity", "0.5", "-o", str(out)]
        arguments += ["--format", "bitmask", "--resume", *FLAGS]
    child = subprocess.run([sys.executable, "-c", KILLED, "3", *arguments], capture_output=True)
    assert child.returncode == -9
    assert not (out / "model.safetensors").exists()
    assert run(arguments) == 0
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (half[1] / file).read_bytes()


def test_parts_of_a_run_are_packed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk never holds the dense result."""
    from secateur.checkpoint.writer import CheckpointWriter

    sizes = []
    original = CheckpointWriter.assemble

    def assemble(self: CheckpointWriter, **more: Any) -> Path:
        sizes.extend(path.stat().st_size for path in (self._parts).glob("*"))
        return original(self, **more)

    monkeypatch.setattr(CheckpointWriter, "assemble", assemble)
    secateur.prune("seedling", tmp_path / "out", method="magnitude", sparsity=0.5, format="bitmask", **QUICK)
    assert sum(sizes) < 0.7 * Checkpoint.open("seedling").nbytes


def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str], *fragments: str) -> None:
    code = run(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    assert all(fragment in lines[0] for fragment in fragments), lines[0]


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["--format", "zip"], ["unknown format 'zip'", "known: bitmask, dense, nm"]),
        (["--format", "bitmas"], ["did you mean 'bitmask'?"]),
        (["--format", "nm-columns"], ["unknown format 'nm-columns'", "known: bitmask, dense, nm"]),
        (["--format", "nm"], ["format nm with pattern unstructured", "use --format bitmask"]),
    ],
)
def test_formats_that_do_not_fit(
    more: list[str], fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    refuse(
        ["prune", "seedling", "-o", str(out), "--method", "magnitude", "--sparsity", "0.5", *more],
        capsys,
        *fragments,
    )
    assert not out.exists()
    with pytest.raises(RecipeError):
        Recipe(model="seedling", method="magnitude", sparsity=0.5, format=more[-1]).validated()


def damaged(folder: Path, tmp_path: Path, part: str) -> tuple[Path, str]:
    """A copy with one bit of one part changed, and the name of the tensor."""
    name = "model.layers.4.mlp.down_proj.weight"
    copy = Path(shutil.copytree(folder, tmp_path / "damaged"))
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{name}.{part}"].view(-1).view(torch.uint8)[100] ^= 2
    said = {"secateur": json.dumps({"version": 1, "formats": Checkpoint.open(folder).formats})}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt", **said})
    return copy, name


@pytest.mark.parametrize("part", ["mask", "values"])
@pytest.mark.parametrize("command", ["prune", "export", "gguf", "evaluate"])
def test_damage_is_refused_with_the_name(
    command: str, part: str, half: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "gguf":
        pytest.importorskip("gguf")
    folder, name = damaged(half[1], tmp_path, part)
    out = tmp_path / "out"
    arguments = {
        "prune": ["prune", str(folder), "-o", str(out), "--method", "magnitude", "--sparsity", "0.6", *FLAGS],
        "export": ["export", str(folder), "-o", str(out), "--format", "dense"],
        "gguf": ["export", str(folder), "-o", str(out), "--format", "gguf"],
        "evaluate": ["evaluate", str(folder), "--windows", "2", "--length", "16"],
    }[command]
    refuse(arguments, capsys, f"packed tensor '{name}' is damaged")
    assert not out.exists()


def test_damage_is_refused_when_loaded(half: tuple[Path, Path], tmp_path: Path) -> None:
    folder, name = damaged(half[1], tmp_path, "mask")
    for mode in ("dense", "packed"):
        with pytest.raises(secateur.InputError, match=name):
            load(folder, mode)


def test_a_file_cut_short(
    half: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(half[1], tmp_path / "copy"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    refuse(["export", str(copy), "--format", "dense", "-o", str(tmp_path / "out")], capsys, "is cut short")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "settings", "format"),
    [
        ("magnitude", {"sparsity": 0.6}, "bitmask"),
        ("magnitude", {"pattern": "2:4"}, "bitmask"),
        ("magnitude", {"pattern": "2:4"}, "nm"),
        ("magnitude", {"sparsity": 0.6}, "dense"),
    ],
)
def test_plan_knows_the_bytes(method: str, settings: dict[str, Any], format: str, tmp_path: Path) -> None:
    planned = secateur.plan("seedling", method=method, format=format, **settings)
    secateur.prune("seedling", tmp_path / "out", method=method, format=format, **settings, **QUICK)
    written = Checkpoint.open(tmp_path / "out")
    found = written.nbytes - 8 * len(written.formats)
    assert planned["bytes_after"] == pytest.approx(found, rel=1e-3)
    assert planned["loads_in"]["transformers"].startswith(
        "yes: same class" if format == "dense" else "yes: after `import secateur`"
    )


def test_the_card_says_how_to_load_it(half: tuple[Path, Path]) -> None:
    dense, packed = ((folder / "README.md").read_text() for folder in half)
    assert "import secateur\nfrom transformers" in packed
    assert "secateur export FOLDER --format dense" in packed
    assert "import secateur" not in dense
    assert "42 tensors packed, 14 as they are" in (half[1] / "report.html").read_text()


def test_a_result_without_zeros_says_so(tmp_path: Path) -> None:
    report = secateur.prune(
        "seedling", tmp_path / "out", method="magnitude-structure", sparsity=0.3, format="bitmask", **QUICK
    )
    assert report.storage is not None
    assert report.storage.tensors_packed == 0
    assert report.warnings[-1] == "Nothing would become smaller in format bitmask: these are ordinary files."
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
