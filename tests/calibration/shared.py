"""Models and texts beside the checkout; tests that need them are skipped where they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("SECATEUR_SHARED") or Path(__file__).resolve().parents[3] / "shared")
STORIES = SHARED / "models" / "stories260k"
TALES_MOE = SHARED / "models" / "tales-moe"
STORIES_TEXT = SHARED / "data" / "tinystories" / "calibration.txt"

needs_shared = pytest.mark.skipif(
    not STORIES.is_dir(), reason=f"no models and texts in {SHARED}; set SECATEUR_SHARED"
)
