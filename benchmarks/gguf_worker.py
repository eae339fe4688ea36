"""Runs a GGUF file in llama.cpp, for gguf.py and the tests. Needs llama-cpp-python, in whatever environment.

Reads one JSON object from stdin ({"path", "ids", "texts", "new_tokens", "repeats"}) and prints one: the
greedy continuation of `ids`, the log-probabilities of `ids`, `texts` as tokens, tokens per second.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    asked = json.loads(sys.stdin.read())
    model = llama_cpp.Llama(asked["path"], n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    ids, new_tokens = asked["ids"], asked["new_tokens"]
    tokens = greedy(model, ids, new_tokens)
    scores = [float(value) for value in log_probabilities(model, ids)]
    times = [timed(model, ids, new_tokens) for _ in range(asked.get("repeats", 0))]
    answer = {
        "version": llama_cpp.__version__,
        "greedy": tokens,
        "log_probabilities": scores,
        "texts": [
            model.tokenize(text.encode(), add_bos=True, special=True) for text in asked.get("texts", [])
        ],
        "prefill": statistics.median(time[0] for time in times) if times else None,
        "decode": statistics.median(time[1] for time in times) if times else None,
    }
    print(json.dumps(answer))


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The most likely continuation."""
    model.reset()
    model.eval(ids)
    found = [int(np.argmax(model.scores[model.n_tokens - 1]))]
    while len(found) < count:
        model.eval(found[-1:])
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    return found


def log_probabilities(model: Any, ids: list[int]) -> Any:
    """Of every token of `ids` after the first."""
    model.reset()
    model.eval(ids)
    scores = np.asarray(model.scores[: len(ids) - 1], dtype=np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    whole = np.log(np.exp(scores).sum(axis=1))
    return scores[np.arange(len(ids) - 1), ids[1:]] - whole


def timed(model: Any, ids: list[int], count: int) -> tuple[float, float]:
    """Tokens per second of reading `ids` and of writing `count` more.

    Seconds of processor time: with one thread that is wall clock, whatever else runs on the machine.
    """
    model.reset()
    start = time.process_time()
    model.eval(ids)
    middle = time.process_time()
    for token in ids[:count]:
        model.eval([token])
    return len(ids) / (middle - start), count / (time.process_time() - middle)


if __name__ == "__main__":
    main()
