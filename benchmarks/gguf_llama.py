"""GGUF files of dense and pruned models in the real llama.cpp: same tokens as torch? How fast?

    pip install llama-cpp-python          # here, or in another environment
    python benchmarks/gguf_llama.py [--python OTHER/bin/python] [--model FOLDER ...] > docs/evidence/gguf.md

Each model is exported as float32 (what can be compared exactly), f16 and q8_0. The greedy continuation and
the log-probabilities of a text are compared with transformers in float32; llama.cpp keeps its KV cache in
float16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.evaluation.memory import machine_facts

WORKER = Path(__file__).with_name("gguf_worker.py")
TEXT = "Once upon a time there was a little garden. A girl named Lily went there every day with her dog. "
TEXTS = ["Hello  world!\n\n  It's 1234 o'clock.", "naïve café → 你好 🙂", " leading and trailing ", TEXT]
NEW_TOKENS, REPEATS, SEED = 48, 7, 0


def flap(spread: str, compensate: str) -> dict[str, Any]:
    """Settings of a run."""
    return {"method": "flap", "options": {"spread": spread, "compensate": compensate}}


CUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "flap, the same share in every block": flap("uniform", "none"),
    "flap, one ranking, blocks that differ": flap("global", "none"),
    "flap, one ranking, biases added": flap("global", "bias"),
    "blockpruner, attention or feed-forward away": {"method": "blockpruner"},
}
SPARSITY = 0.3
DTYPES = ("f32", "f16", "q8_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter with llama-cpp-python")
    parser.add_argument("--model", nargs="*", default=["seedling"])
    arguments = parser.parse_args()
    rows, version = [], ""
    with tempfile.TemporaryDirectory() as place:
        for model in arguments.model:
            for cut, settings in CUTS.items():
                folder = pruned(model, settings, Path(place) / f"{len(rows)}")
                for row in tried(folder, arguments.python):
                    version = row.pop("version")
                    rows.append({"model": Path(model).name, "cut": cut, **row})
    print(page(rows, version))


def pruned(model: str, settings: dict[str, Any], out: Path) -> str | Path:
    """The model as it is, or pruned into a folder."""
    if not settings:
        return model
    calibration = {"samples": 32, "length": 128}
    secateur.prune(
        model, out, **settings, sparsity=SPARSITY, calibration=calibration, seed=SEED, evaluation_windows=0,
        measure_speed=False, check_loading=False,
    )  # fmt: skip
    return out


def tried(folder: str | Path, python: str) -> list[dict[str, Any]]:
    """A row a dtype: what llama.cpp says, against what transformers says."""
    path = secateur.inspect(folder)["folder"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = tokenizer(TEXT * 4).input_ids[:128]
    greedy, scores = reference(model, ids)
    rows = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as place:
            facts = secateur.export(folder, Path(place) / "model.gguf", dtype=dtype)
            asked = {
                "path": facts["out"], "ids": ids, "texts": TEXTS, "new_tokens": NEW_TOKENS, "repeats": REPEATS
            }  # fmt: skip
            answer = run_worker(python, asked)
        differences = torch.tensor(answer["log_probabilities"]) - scores
        rows.append(
            {
                "architecture": facts["architecture"],
                "dtype": dtype,
                "bytes": facts["bytes"],
                "same": matching(answer["greedy"], greedy),
                "difference": float(differences.abs().max()),
                "texts": answer["texts"] == [tokenizer(text).input_ids for text in TEXTS],
                **{key: answer[key] for key in ("prefill", "decode", "version")},
            }
        )
    return rows


def reference(model: Any, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation and log-probabilities, by transformers."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1].double()
        longer = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return longer[0, len(ids) :].tolist(), logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def run_worker(python: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp answers, in its own environment."""
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"llama.cpp refused {asked['path']}:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def matching(one: list[int], other: list[int]) -> int:
    """Tokens that agree before the first that does not."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((place for place, (left, right) in pairs if left != right), len(one))


def page(rows: list[dict[str, Any]], version: str) -> str:
    """The table as Markdown."""
    cpu = machine_facts()["cpu"]
    head = f"""# GGUF files in llama.cpp

Written by `python benchmarks/gguf_llama.py` on {cpu}, one thread, llama-cpp-python {version};
sparsity {SPARSITY}, seed {SEED}, calibrated on the model's own text.

- *Same tokens*: of {NEW_TOKENS} greedy tokens, those before the first where transformers in float32 differs.
- *Difference*: the largest between log-probabilities of 128 tokens; llama.cpp has its KV cache in float16.
- *Tokenizer*: whether four awkward texts become the same tokens.
- *Prefill*, *decode*: tokens per second of processor time, 128 in and {NEW_TOKENS} out, median of {REPEATS}.

| model | pruned | architecture | matrices | file | same tokens | difference | tokenizer | prefill | decode |
|---|---|---|---|---:|---:|---:|---|---:|---:|
"""
    return head + "".join(map(line, rows))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [
        row["model"],
        row["cut"],
        row["architecture"],
        row["dtype"],
        f"{row['bytes'] / 1e6:.2f} MB",
        f"{row['same']}/{NEW_TOKENS}",
        f"{row['difference']:.4f}",
        "same" if row["texts"] else "differs",
        f"{row['prefill']:,.0f}",
        f"{row['decode']:,.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
