"""Commands that need no tensors start without the libraries that take seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import sys
{work}
print(*sorted({{"torch", "transformers", "scipy"}} & sys.modules.keys()), file=sys.stderr)
"""
COMMAND = """
from secateur.cli.app import run
assert run(sys.argv[1:]) == 0
"""
COMPLETION = """
from secateur.cli.app import app
assert "--sparsity" in app.generate_completion(prog_name="secateur", shell="bash")
"""


def imported(work: str, *arguments: str) -> list[str]:
    """Which of the heavy libraries a fresh process has after its work."""
    command = [sys.executable, "-c", PROBE.format(work=work), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


@pytest.mark.parametrize(
    "command",
    [
        "inspect seedling",
        "inspect seedling --json",
        "methods",
        "methods sparsegpt --json",
        "--help",
        "prune --help",
    ],
)
def test_commands_without_tensors(command: str) -> None:
    assert imported(COMMAND, *command.split()) == []


def test_completion() -> None:
    assert imported(COMPLETION) == []


def test_the_probe_sees_what_is_imported() -> None:
    assert imported("import torch") == ["torch"]
