"""One model in a process of its own, for packed.py: what it takes in memory and how fast it is at batch 1.

    python packed_worker.py FOLDER {dense,packed} NEW_TOKENS PROMPT_TOKENS

Prints one JSON object: seconds of loading, resident memory once every weight was used, tokens per second of
decoding after a short prompt, and of reading a prompt (none for PROMPT_TOKENS 0).
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
from secateur.runtime.facts import kernel_of, weight_bytes

SHORT, WARM_UP = 8, 3


def main(folder: str, mode: str, new_tokens: int, prompt_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    model = loaded(folder, mode)
    seconds = time.perf_counter() - started
    with torch.inference_mode():
        decode = decoded(model, new_tokens)
        resident = resident_bytes()
        prefill = prefilled(model, prompt_tokens) if prompt_tokens else None
    return {
        "load_seconds": seconds,
        "kernel": kernel_of(model),
        "weight_bytes": weight_bytes(model),
        "resident_bytes": resident,
        "decode": decode,
        "prefill": prefill,
        "threads": torch.get_num_threads(),
    }


def loaded(folder: str, mode: str, dtype: str = "auto") -> PreTrainedModel:
    """By default in the dtype of the file."""
    how = {"quantization_config": secateur.SecateurQuantizationConfig(mode="packed")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the folder has a configuration of its own
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, **(how if mode == "packed" else {})
        ).eval()


def decoded(model: PreTrainedModel, new_tokens: int) -> float:
    """Tokens per second after a short prompt and some tokens that do not count."""
    output = model(input_ids=prompt(model, SHORT), use_cache=True)
    for step in range(WARM_UP + new_tokens):
        if step == WARM_UP:
            started = time.perf_counter()
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return new_tokens / (time.perf_counter() - started)


def prefilled(model: PreTrainedModel, prompt_tokens: int) -> float:
    """Tokens per second of a prompt in one pass."""
    ids = prompt(model, prompt_tokens)
    started = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return prompt_tokens / (time.perf_counter() - started)


def prompt(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator)


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
