"""What transformers learns at `import secateur`: models whose blocks differ in size, and packed weights."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = [
    "CODE",
    "HEAD_SIZE",
    "MODEL_TYPE",
    "OWN_HEADS",
    "PACKED_CODE",
    "REMOTE_CODE",
    "register_when_needed",
]

MODEL_TYPE = "secateur"
REMOTE_CODE = "modeling_secateur.py"
"""The file of this room that is also written beside checkpoints whose blocks differ."""
OWN_HEADS, HEAD_SIZE = "own_heads", "head_size"
"""Keys of models whose class derives the width of a head: what the loading code has to know of their
attention, and that width."""
CODE = "after `import secateur`, or with trust_remote_code=True"
"""What loading such a model takes."""
PACKED_CODE = "after `import secateur`"
"""What loading packed weights takes."""
AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_QUANTIZER = "transformers.quantizers.auto"
Register = Callable[[ModuleType], None]


def register_when_needed() -> None:
    """Let the auto classes of transformers know the model type `secateur`, and its quantizers the packed
    weights: now if they are there, else as soon as they are imported, since importing them takes seconds,
    which `import secateur` should not."""
    waiting = dict(_REGISTER)
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)(sys.modules[name])
    if waiting and not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(waiting))


def _register_models(module: ModuleType) -> None:
    module.CONFIG_MAPPING.register(MODEL_TYPE, _Config, exist_ok=True)


def _register_quantizer(module: ModuleType) -> None:
    importlib.import_module("secateur.loading.quantizer")  # registers itself


_REGISTER: dict[str, Register] = {AUTO_CONFIG: _register_models, AUTO_QUANTIZER: _register_quantizer}


class _Config:
    """Stands for the config classes of all families until one is asked for."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from secateur.loading.modeling_secateur import SecateurConfig

        return SecateurConfig.from_dict(config_dict, **kwargs)


class _Watch(importlib.abc.MetaPathFinder):
    """Waits for some modules, lets them be loaded as usual, and registers."""

    def __init__(self, waiting: dict[str, Register]) -> None:
        self._waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        register = self._waiting.pop(name, None)
        if register is None:
            return None
        if not self._waiting:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, register)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, register: Register) -> None:
        self._loader, self._register = loader, register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._register(module)
