"""What tests of packed layers share."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.runtime import compiled

from .matrices import kernel_or_skip


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of x of every call of the kernel."""
    kernel_or_skip()
    rows: list[int] = []

    def watched(kernel: Any, matrix: Any, inputs: Any, bias: Any) -> Any:
        rows.append(inputs.numel() // inputs.shape[-1])
        return real(kernel, matrix, inputs, bias)

    real = compiled.linear
    monkeypatch.setattr(compiled, "linear", watched)
    return rows
