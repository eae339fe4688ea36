"""What the tests of this room share."""

from __future__ import annotations

import hashlib
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MakeCheckpoint = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def small_tensors() -> dict[str, Tensor]:
    """Several dtypes, a scalar, an empty tensor, and names out of numeric order."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.embed_tokens.weight": normal(16, 8).bfloat16(),
        "model.layers.0.mlp.weight": normal(8, 12).bfloat16(),
        "model.layers.0.norm.weight": normal(8),
        "model.layers.1.mlp.weight": normal(8, 12).bfloat16(),
        "model.layers.10.mlp.weight": normal(4, 3).half(),
        "model.layers.2.mlp.weight": normal(4, 3).half(),
        "model.counter": torch.tensor(7),
        "model.empty": torch.empty(0, 4),
        "model.mask": torch.tensor([True, False, True]),
    }


def digests(folder: Path) -> dict[str, str]:
    """Each file below a folder with the SHA-256 of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_child(work: Callable[[], None]) -> int:
    """Start a process; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def was_killed(child: int) -> bool:
    """Wait for a process; any end other than success or SIGKILL fails the test."""
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0
    return killed
