"""What a run has finished so far, on disk, so that a killed run continues where it stood."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.checkpoint.durable import write_bytes
from secateur.core.errors import ResumeError

__all__ = ["Journal"]

FILE = "journal.json"
ABSENT = "absent"


@dataclass
class Journal:
    """The state of a run in `folder`; whoever changes it calls `save`.

    Attributes:
        folder: where `journal.json` lies.
        fingerprint: what the bits of the result depend on (model, recipe, calibration, code version).
        parts: finished parts in the order of their first write, with their records.
        notes: small results of phases that write no part.
        merged: the result is complete in the workspace; only moving and tidying are left.
    """

    folder: Path
    fingerprint: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    merged: bool = False

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """The journal in a folder, `None` where there is none. Raises `ResumeError` for a damaged one."""
        try:
            content = json.loads((folder / FILE).read_bytes())
            return cls(folder, **content)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ResumeError(
                f"{folder / FILE} does not parse ({error})", "", f"remove {folder.parent} and start again"
            ) from error

    def require(self, fingerprint: dict[str, Any]) -> None:
        """Raises `ResumeError` listing every key whose value differs from the run that was begun."""
        new, old = plain(fingerprint), self.fingerprint
        differing = [
            f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
            for key in {**old, **new}
            if key not in old or key not in new or old[key] != new[key]
        ]
        if differing:
            raise ResumeError(
                f"the unfinished run in {self.folder.parent} is another one ({', '.join(differing)})",
                "the same model, recipe and version",
                "repeat the first command (prune and recover: with --resume) or choose another folder",
            )

    def save(self) -> None:
        """Replace the file on disk as one step."""
        content = asdict(self)
        del content["folder"]
        write_bytes(self.folder / FILE, json.dumps(content, indent=1).encode())

    def remove(self) -> None:
        (self.folder / FILE).unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """What JSON makes of a value, so that fresh and resumed runs compare and see the same.

    Raises `TypeError` for what JSON cannot hold.
    """
    return json.loads(json.dumps(value))


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else ABSENT
