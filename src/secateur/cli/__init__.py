"""The command line: one small file a command, everything heavy imported when a command runs."""

from __future__ import annotations

import sys

from secateur.cli.app import run

__all__ = ["main"]


def main() -> None:
    """Entry point of the `secateur` command."""
    sys.exit(run(sys.argv[1:]))
