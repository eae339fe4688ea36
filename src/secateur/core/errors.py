"""What can go wrong, one class a kind. A message says what was seen, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AnatomyError",
    "CalibrationError",
    "CheckpointError",
    "ExportError",
    "InputError",
    "MissingExtraError",
    "NumericsError",
    "OutputError",
    "RecipeError",
    "ResumeError",
    "SecateurError",
    "did_you_mean",
]


class SecateurError(Exception):
    """Anything secateur refuses or fails at; the command line ends with `exit_code`."""

    exit_code = 1


class InputError(SecateurError):
    """The user's input cannot be used. One line: what was seen, what was expected, what to do."""

    exit_code = 2

    def __init__(self, seen: str, expected: str = "", remedy: str = "") -> None:
        self.seen, self.expected, self.remedy = seen, expected, remedy
        parts = [seen, f"expected {expected}" if expected else "", remedy]
        super().__init__("; ".join(part.rstrip(".") for part in parts if part))


class RecipeError(InputError):
    """A method, option, sparsity, pattern or allocation that does not exist or does not fit."""


class CheckpointError(InputError):
    """Model files that are missing, cut short, damaged, quantised or at odds with their index."""


class AnatomyError(InputError):
    """A model whose structure is not known well enough to cut into it."""


class CalibrationError(InputError):
    """Text that is missing, empty, too short or not what its format says."""


class OutputError(InputError):
    """An output folder that cannot be written, is not empty, or is the input itself."""


class ExportError(InputError):
    """A model or tokenizer that the format asked for cannot hold."""


class ResumeError(InputError):
    """A journal that belongs to another run."""


class MissingExtraError(InputError):
    """An optional dependency that the request needs."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{package} is not installed", f"it for {purpose}", f"run: pip install 'secateur[{extra}]'"
        )


class NumericsError(SecateurError):
    """A computation that has no finite answer even after the documented fallbacks."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'wanda'?` or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word.lower(), names, n=2, cutoff=0.55)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "known: " + ", ".join(names)
