"""Tasks from local files, run by the real harness; most of this needs the `[eval]` extra."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.core.errors import InputError, MissingExtraError
from secateur.evaluation.tasks import _find, run_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)"
)

ENDINGS = [
    ("Once upon a", [" time", " dog", " red"], 0),
    ("Lily went to the park to", [" of", " play", " was"], 1),
    ("Tom was very", [" the", " and", " happy"], 2),
    ("Her mom said, \"Thank", [" she", " you", " big"], 1),
]  # fmt: skip
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: '{data}'}}
  cache_dir: '{cache}'
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{text}}}}'
doc_to_choice: choices
doc_to_target: {target}
target_delimiter: ''
metric_list: [{{metric: acc}}]
"""
GROUP = "group: endings\ntask: [right_endings, wrong_endings]\n"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks that differ in which ending counts as right, a group of both, and one without data."""
    folder, data = tmp_path / "tasks", tmp_path / "endings.jsonl"
    folder.mkdir()
    rows = [
        {"text": text, "choices": choices, "right": right, "wrong": (right + 1) % 3}
        for text, choices, right in ENDINGS
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    for target in ("right", "wrong"):
        values = {"name": f"{target}_endings", "target": target, "data": data, "cache": tmp_path / "cache"}
        (folder / f"{target}.yaml").write_text(TASK.format(**values))
    values = {"name": "lost", "target": "right", "data": tmp_path / "lost.jsonl", "cache": tmp_path}
    (folder / "lost.yaml").write_text(TASK.format(**values))
    (folder / "group.yaml").write_text(GROUP)
    return folder


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'secateur\[eval\]'"):
        run_tasks(tiny_model("llama"), tiny_tokenizer(), ["anything"])


@needs_harness
def test_a_trained_model_knows_how_stories_go_on(shared, tasks, capfd):
    folder = shared / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    capfd.readouterr()
    found = run_tasks(model, tokenizer, ["right_endings", "wrong_endings"], task_folder=tasks)
    assert capfd.readouterr().out == ""
    assert json.loads(json.dumps(found)) == found
    assert found["right_endings"] == {"acc": 1.0, "acc_stderr": 0.0, "samples": 4}
    assert found["wrong_endings"]["acc"] == 0.0


@needs_harness
def test_groups_patterns_and_limits(tasks):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    by_group = run_tasks(model, tokenizer, ["endings"], task_folder=tasks, limit=3)
    by_pattern = run_tasks(model, tokenizer, ["*_endings"], task_folder=tasks, limit=3, batch_size=1)
    assert by_pattern == {name: by_group[name] for name in ("right_endings", "wrong_endings")}
    assert by_pattern["right_endings"]["samples"] == 3


@needs_harness
def test_nothing_of_the_caller_changes(tasks):
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer()
    tokenizer.pad_token = None
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_tasks(model, tokenizer, ["right_endings"], task_folder=tasks, limit=1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert model.training
    assert tokenizer.pad_token is None
    tokenizer.pad_token = tokenizer.eos_token


@needs_harness
def test_a_typo_gets_a_suggestion(tasks):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with pytest.raises(InputError, match="did you mean 'right_endings'"):
        _find(manager, ["right_ending"])
    with pytest.raises(InputError, match="lm-eval ls tasks"):
        _find(manager, ["xyzzy"])


@needs_harness
def test_data_that_are_not_there(tasks):
    with pytest.raises(InputError, match=r"task lost does not run \(.*lost\.jsonl"):
        run_tasks(tiny_model("llama"), tiny_tokenizer(), ["lost"], task_folder=tasks)


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"tasks": []}, "at least one task"),
        ({"limit": 0}, "limit 0"),
        ({"task_folder": Path("no-such")}, "no folder no-such"),
    ],
)
def test_requests_that_make_no_sense(arguments, complaint):
    with pytest.raises(InputError, match=complaint):
        run_tasks(tiny_model("llama"), tiny_tokenizer(), **{"tasks": ["lost"], **arguments})
