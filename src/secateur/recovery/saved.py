"""The state of a training in one file: what trains, its moments, the best so far, and a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.checkpoint.safetensors_file import read_tensors, save_tensors
from secateur.checkpoint.safetensors_header import read_header

__all__ = ["TrainingState"]

RECORD = "record"


class TrainingState:
    """Saves and restores; killed while it saves, the file holds the state before.

    Args:
        path: of the file.
        parameters: what trains, by name.
        optimizer: whose parameters are these, in this order.
    """

    def __init__(self, path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        self.path, self.parameters, self.optimizer = path, parameters, optimizer
        self._best: dict[str, Tensor] = {}

    def hold_best(self) -> None:
        """The weights as they are now are the best."""
        self._best = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def take_best(self) -> None:
        """Go back to the best weights."""
        self._restore(self._best)

    def save(self, record: dict[str, Any]) -> None:
        """Write everything, with a JSON record, as one step."""
        tensors = {f"now.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"moments.{index}.{key}": tensor for key, tensor in moments.items()}
        text = bytearray(json.dumps(record).encode())
        tensors[RECORD] = torch.frombuffer(text, dtype=torch.uint8)
        save_tensors(self.path, tensors)

    def load(self) -> dict[str, Any] | None:
        """Go back to what was saved; the record, or None where nothing was."""
        if not self.path.exists():
            return None
        tensors = read_tensors(self.path, read_header(self.path).values())
        record: dict[str, Any] = json.loads(tensors[RECORD].numpy().tobytes())
        self._best = _below(tensors, "best.")
        self._restore(_below(tensors, "now."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, "moments.").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return record

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
