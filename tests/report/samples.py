"""Reports as real runs write them, with every number different from every other."""

from __future__ import annotations

import random
from typing import Any

from secateur.report.effect import effect
from secateur.report.model import MEASUREMENTS, Report

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SPEEDS = {
    "prefill_tokens_per_second_before": 1843.27,
    "prefill_tokens_per_second_after": 1851.94,
    "decode_tokens_per_second_before": 21.418,
    "decode_tokens_per_second_after": 21.173,
}
QUALITY = {
    "perplexity_before": 6.1362,
    "perplexity_after": 9.4047,
    "kl_divergence": 0.41873,
    "top1_agreement": 0.73416,
}


def layer_rows(blocks: int, seed: int = 0, fallbacks: bool = False) -> list[dict[str, Any]]:
    """Seven matrices a block; loss grows with depth, sparsity is spread as OWL would."""
    draw = random.Random(seed)
    rows = []
    for block in range(blocks):
        wanted = round(0.5 + 0.06 * draw.uniform(-1, 1), 4)
        for index, (matrix, (out, inputs)) in enumerate(SHAPES.items()):
            loss = 10 ** (-3.4 + 1.5 * block / blocks + 1.1 * (index * 3 % 7) / 7 + draw.gauss(0, 0.07))
            row = {"block": block, "matrix": matrix, "rows": out, "columns": inputs, "loss": round(loss, 7)}
            row |= {"sparsity_requested": wanted, "sparsity": round(wanted - draw.uniform(0, 2e-4), 6)}
            row |= {"seconds": round(draw.uniform(0.2, 3), 3), "fallbacks": []}
            if fallbacks and (block * 7 + index) % 23 == 5:
                row["fallbacks"] = ["damping raised from 0.01 to 0.1 because the Hessian was singular"]
            rows.append(row)
    return rows


def values(depth: int = 5, **changes: Any) -> dict[str, Any]:
    """The keys of a report of an unstructured run of `depth` blocks with everything measured."""
    draw = random.Random(depth)
    size = 2 * 218_112_000 * depth + 1_050_673_152
    facts: dict[str, Any] = {
        "model": "meta-llama/Llama-3.1-8B",
        "family": "llama",
        "method": "sparsegpt",
        "pattern": "unstructured",
        "allocation": "owl",
        "options": {"damping": 0.01, "block_size": 128},
        "sparsity_requested": 0.5,
        "sparsity": 0.499934,
        "parameters_before": size // 2,
        "parameters_after": size // 2,
        "nonzero_parameters_before": size // 2 - 17,
        "nonzero_parameters_after": size // 2 - 109_056_117 * depth,
        "bytes_before": size,
        "bytes_after": size + 312,
        **QUALITY,
        **SPEEDS,
        "peak_memory_bytes": 2_913_443_840,
        "seconds": 3127.4,
        "protocol": {
            "text": "wikitext-2 test",
            "text_sha256": "9c1185a5c5e9fc54612808977ee8f548b2258d31ddadef707ba62c166051b9e3",
            "split": "test",
            "window": 2048,
            "stride": 2047,
            "windows": 141,
            "dtype": "bfloat16",
            "tokenizer_sha256": "3f4b6ad0cf1ddc1cbb9e3d2b4e63c21ae0e4b54ed1e5dc1c2f1e2a6f1f2c9f10",
        },
        "calibration": {
            "source": "self",
            "windows": 128,
            "length": 2046,
            "sha256": "c0ffee51a9f0b8a7e6c5d4b3a29180706f5e4d3c2b1a09f8e7d6c5b4a3928171",
        },
        "seed": 20251,
        "versions": {"secateur": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        "machine": {"cpu": "AMD EPYC 9554", "cores": 19, "memory_bytes": 67_443_445_760, "gpu": None},
        "date": "2026-03-14T15:09:26+00:00",
        "command": "secateur prune meta-llama/Llama-3.1-8B -o llama-sparse --method sparsegpt --sparsity 0.5 "
        "--allocation owl --calibration self --samples 128 --length 2046 --seed 20251 -O damping=0.01",
        "fingerprint": "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8",
        "effect": effect("unstructured", 0.499934, bytes_before=size, bytes_after=size + 312),
        "layers": layer_rows(depth),
        "blocks": [
            {
                "block": b,
                "loss": round(10 ** (-3.4 + 1.9 * b / depth), 7),
                "seconds": round(draw.uniform(8, 20), 2),
            }
            for b in range(depth)
        ],
    }
    return facts | changes


def sample(depth: int = 5, **changes: Any) -> Report:
    """A valid report; a measurement changed to None gets a reason."""
    facts = values(depth, **changes)
    reasons = {key: f"no {key} today" for key in MEASUREMENTS if facts.get(key) is None}
    return Report.model_validate({"not_measured": reasons, **facts})
