"""Does a checkpoint load where it will be used? Asked in a fresh process, which imports secateur for packed
weights alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from secateur.loading import CODE, PACKED_CODE

__all__ = ["WHOLE_BYTES", "reopen"]

SCRIPT = Path(__file__).with_name("_reopen.py")
WHOLE_BYTES = 1_000_000_000
"""Up to this size a model is loaded and run on a few tokens; above it, built without weights."""
MOST_SECONDS = 600


def reopen(folder: Path, *, own_code: bool, packed: bool = False, nbytes: int, free_bytes: int) -> str:
    """`yes: ...` or `no: ...`, with what was done.

    Args:
        folder: a checkpoint.
        own_code: its config names code beside the weights, which is run then.
        packed: it has packed weights, which transformers reads after `import secateur`.
        nbytes: of its weights in memory.
        free_bytes: memory that may be used.
    """
    whole = nbytes <= min(WHOLE_BYTES, free_bytes // 3)
    answer = _asked(folder, own_code and not packed, whole, packed)
    done = "opened and run in a fresh process" if whole else "built without weights in a fresh process"
    if answer["problem"]:
        return f"no: {answer['problem']} ({done})"
    seen = f"{answer['class']}, {done}"
    if packed:
        return f"yes: {PACKED_CODE} ({seen})"
    return f"yes: {CODE} ({seen})" if own_code else f"yes: {seen}"


def _asked(folder: Path, own_code: bool, whole: bool, packed: bool) -> dict[str, str]:
    source = SCRIPT.read_text(encoding="utf-8")
    flags = [str(int(flag)) for flag in (own_code, whole, packed)]
    command = [sys.executable, "-c", source, str(folder.resolve()), *flags]
    with tempfile.TemporaryDirectory(prefix="secateur-") as place:
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_MODULES_CACHE": place}
        try:
            child = subprocess.run(
                command, cwd=place, env={**os.environ, **quiet, "CUDA_VISIBLE_DEVICES": ""},
                capture_output=True, text=True, timeout=MOST_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"class": "", "problem": f"it did not open within {MOST_SECONDS} seconds"}
    try:
        return dict(json.loads(child.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"class": "", "problem": f"its process ended with status {child.returncode}"}
