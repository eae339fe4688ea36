"""The real llama.cpp says the same as transformers, for every family and for blocks that differ.

Where llama-cpp-python is installed, or SECATEUR_LLAMA_PYTHON names an interpreter that has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.formats.catalogue import families

from .cut_models import save_cut
from .test_gguf import CHANGES

WORKER = Path(__file__).parents[2] / "benchmarks" / "gguf_worker.py"
PYTHON = os.environ.get("SECATEUR_LLAMA_PYTHON", sys.executable)
IDS = [(7 * place) % 300 + 1 for place in range(15)]  # within the sliding windows of the tiny models
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.executable == PYTHON and importlib.util.find_spec("llama_cpp") is None,
        reason="llama-cpp-python is not installed",
    ),
]


def both(model: Path, out: Path, silence: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Log-probabilities of `IDS` by llama.cpp and by transformers, the outputs of some matrices silenced."""
    secateur.export(model, out, dtype="f32")
    asked = json.dumps({"path": str(out), "ids": IDS, "new_tokens": 1})
    done = subprocess.run([PYTHON, str(WORKER)], input=asked, capture_output=True, text=True, check=True)
    here = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        for path in silence:
            here.get_submodule(path).weight.zero_()
        scores = here(torch.tensor([IDS])).logits[0, :-1].double().log_softmax(-1)
    return json.loads(done.stdout)["log_probabilities"], scores[range(len(IDS) - 1), IDS[1:]].tolist()


@pytest.mark.parametrize("family", sorted(families()))
def test_every_family_says_the_same(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=3, **CHANGES.get(family, {}))
    there, here = both(model, tmp_path / "a.gguf")
    assert there == pytest.approx(here, abs=5e-3)


@pytest.mark.parametrize("compensate", ["none", "bias"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_blocks_that_differ_say_the_same(family: str, compensate: str, tmp_path: Path) -> None:
    there, here = both(save_cut(family, tmp_path, compensate), tmp_path / "a.gguf")
    assert there == pytest.approx(here, abs=5e-3)


@pytest.mark.parametrize(
    "skipped", [{1: "self_attn"}, {0: "self_attn"}, {1: "mlp"}, {0: "mlp"}, {2: "self_attn"}, {2: "mlp"}]
)
def test_blocks_without_a_part_say_the_same(skipped: dict[int, str], tmp_path: Path) -> None:
    model = save_cut("llama", tmp_path)
    before = (model / "config.json").read_text()
    config = json.loads(before)
    last = {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    for index, part in skipped.items():
        config["per_layer_config"][str(index)]["skip"] = [part]
    (model / "config.json").write_text(json.dumps(config))
    silence = tuple(f"model.layers.{index}.{last[part]}" for index, part in skipped.items())
    there, here = both(model, tmp_path / "a.gguf", silence)
    assert there == pytest.approx(here, abs=5e-3)
