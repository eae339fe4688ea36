"""What a student is trained on beside the next token: the predictions and hidden states of a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["block_outputs", "divergence", "hidden_distance"]


def divergence(student: Tensor, teacher: Tensor, at: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the next-token distributions at temperature T, in nats, mean over the
    positions (adapt-pruner, section 2).

    Args:
        student, teacher: logits, (B, T, vocabulary).
        at: (B, T) bool, the positions that count.
    """
    ours, theirs = (
        (logits[at.to(logits.device)].float() / temperature).log_softmax(-1) for logits in (student, teacher)
    )
    each = functional.kl_div(ours, theirs.to(ours.device), log_target=True, reduction="none").sum(-1)
    return temperature**2 * each.mean()


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], at: Tensor, kind: str) -> Tensor:
    """Mean over blocks and tokens of the distance of hidden states, (B, T, d) each.

    Args:
        at: (B, T) bool, the tokens that count.
        kind: `cosine`, 1 - cos; or `mse`, the squared difference relative to the teacher's square.
    """
    distances = []
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = (hidden[at.to(hidden.device)].float().to(ours.device) for hidden in (ours, theirs))
        if kind == "cosine":
            distances.append((1 - functional.cosine_similarity(a, b, dim=-1)).mean())
        else:
            distances.append((a - b).square().sum() / b.square().sum().clamp(min=1e-12))
    return torch.stack([distance.to(distances[0].device) for distance in distances]).mean()


@contextmanager
def block_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The hidden states that these blocks give while the model runs inside, in their order."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
