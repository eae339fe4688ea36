"""Values of a configuration: of transformers' object, or of `config.json` where that is enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateur.anatomy.family import Family, load_family

__all__ = ["ConfigFile", "Lookup", "NotStatedError", "longest_input", "values_of"]

Lookup = Callable[[str], Any]
"""The value of a config key, `None` for a key that is not there."""

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")
DEFAULT_LENGTH = 2048
FOREIGN = ("is_encoder_decoder", "text_config", "text_encoder", "decoder", "generator", "per_layer_config")
"""Keys with which transformers reads a config of any type as something else than one plain decoder."""


class NotStatedError(Exception):
    """What `config.json` leaves open: only transformers can tell."""


class ConfigFile:
    """`config.json` as its configuration class would read it, as far as the family file tells.

    Args:
        config: the content of the file.

    Attributes:
        model_type: as in the file.
        family: its family file.

    Raises:
        NotStatedError: no family file, one that does not describe whole models, or a config of another kind.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.model_type = str(config.get("model_type"))
        self.family = _family(self.model_type)
        foreign = [key for key in FOREIGN if config.get(key)]
        foreign += [key for key in self.family.foreign if key in config]
        if foreign:
            raise NotStatedError(f"the config has {foreign[0]}")

    def value(self, key: str) -> Any:
        """The value of a key, under whichever of its names.

        Raises:
            NotStatedError: neither the file nor the family file has it, or one key has two values.
        """
        names = {key, self.family.aliases.get(key, key)}
        names |= {name for name, other in self.family.aliases.items() if other == key}
        stated = [self._config[name] for name in names if name in self._config]
        default = next((self.family.defaults[name] for name in names if name in self.family.defaults), None)
        if any(value != stated[0] for value in stated):
            raise NotStatedError(f"the config has several values of {key}")
        if stated and stated[0] is None and default is not None:
            raise NotStatedError(f"{key} is null")
        if not stated and not names & self.family.defaults.keys():
            raise NotStatedError(f"the config has no {key}")
        return stated[0] if stated else default

    def size(self, key: str) -> int | None:
        """`value` of a key that holds a number. Raises `NotStatedError` also for anything else."""
        value = self.value(key)
        if value is not None and type(value) is not int:
            raise NotStatedError(f"{key} is {value!r}")
        return value

    @property
    def architecture(self) -> str:
        """The model class named first. Raises `NotStatedError` when there is none."""
        named = self._config.get("architectures")
        if not isinstance(named, list) or not named or not isinstance(named[0], str):
            raise NotStatedError("the config names no architecture")
        return named[0]


def _family(model_type: str) -> Family:
    family = load_family(model_type)
    if family is None:
        raise NotStatedError(f"no family file for {model_type!r}")
    if not family.outer:
        raise NotStatedError(f"the family file of {model_type!r} leaves out what is outside the blocks")
    return family


def values_of(config: object) -> Lookup:
    """The values of a configuration object."""
    return lambda key: getattr(config, key, None)


def longest_input(lookup: Lookup) -> int:
    """The longest window that a model accepts, in tokens."""
    for key in LENGTH_KEYS:
        value = lookup(key)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_LENGTH
