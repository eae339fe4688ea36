"""From what the user calls a model to a folder on this machine."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from secateur.core.errors import CheckpointError

__all__ = ["SEEDLING", "locate"]

SEEDLING = "seedling"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "LICEN*",
    "NOTICE*",
]
# Patterns match across folders. The same weights often lie in other formats or precisions beside the
# ones that transformers reads.
HUB_LEFT_OUT = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "*/*.py", "consolidated*", "adapter_*"]


def locate(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: itself, the bundled `"seedling"`, or the download of a hub id.

    Args:
        model: folder, hub id (`owner/name`), or `"seedling"` (a folder of that name is `"./seedling"`).
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such folder, no such repository, or no way to reach the hub.
    """
    if model == SEEDLING:
        return _bundled()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} with the local folder {folder}", "a hub id")
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file", "the folder of a checkpoint", f"try {folder.parent}")
    if isinstance(model, Path) or not HUB_ID.fullmatch(model):
        raise CheckpointError(f"there is no folder {folder}", "a checkpoint folder, a hub id or 'seedling'")
    return _download(model, revision)


def _bundled() -> Path:
    folder = Path(str(importlib.resources.files("secateur"))) / SEEDLING
    if not folder.is_dir():
        raise CheckpointError(
            "this installation lacks the bundled model 'seedling'", "", "reinstall secateur or name a folder"
        )
    return folder


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEFT_OUT
            )
        )
    except Exception as error:  # whatever HTTP library the hub client of the day brings
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{model!r} is no folder here, and the hub gave no such model ({reason.rstrip('.')})",
            "a checkpoint folder, a hub id or 'seedling'",
            "check the spelling, the network and, for gated models, `hf auth login`",
        ) from error
