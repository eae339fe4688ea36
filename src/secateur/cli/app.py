"""The commands, and how errors reach the user: one line on stderr, exit 2 for bad input, 1 otherwise."""

from __future__ import annotations

import logging
import os
import sys

import cyclopts

import secateur
from secateur.core.errors import SecateurError

__all__ = ["app", "run"]

app = cyclopts.App(
    name="secateur",
    help="Prune a model and prove what it cost. MODEL is a local folder, a hub id, or 'seedling' "
    "(the small real model that comes with secateur).",
    version=f"secateur {secateur.__version__}",
    help_format="plaintext",
)
COMMANDS = {
    "inspect": "what a model is made of: headers only, instant at any size",
    "methods": "the catalogue of methods and allocations",
    "plan": "memory, time and effect of a run before a weight is read",
    "prune": "a checkpoint in, a pruned checkpoint and its report out",
    "recover": "train or refit a pruned model: same shapes and zeros, better values",
    "evaluate": "perplexity, divergence from the dense model, tasks",
    "bench": "prefill and decode speed, peak memory",
    "compare": "several runs in one picture",
    "export": "a checkpoint for llama.cpp (GGUF), or padded to uniform sizes",
}
for command, summary in COMMANDS.items():
    app.command(f"secateur.cli.{command}:{command}", name=command, help=summary)
app.register_install_completion_command(name="--install-completion")

INTERRUPTED = 130


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    _quiet_libraries()
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
    except SecateurError as error:
        return _fail(str(error), error.exit_code, arguments)
    except cyclopts.CycloptsError as error:
        return _fail(_one_line(error), 2, arguments)
    except KeyboardInterrupt:
        return _fail(_interrupted(arguments), INTERRUPTED, arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _quiet_libraries() -> None:
    """Warnings of secateur go to stderr; the chatter of the libraries below does not."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _one_line(error: cyclopts.CycloptsError) -> str:
    return " ".join(str(error).split())


def _interrupted(arguments: list[str]) -> str:
    """And how to go on: an export goes on by itself, and what only measures begins anew."""
    resumed = " with --resume to go on" if arguments[:1] in (["prune"], ["recover"]) else ""
    return f"interrupted; run the same command again{resumed}"


def _fail(message: str, code: int, arguments: list[str]) -> int:
    sys.stderr.write(f"error: {message}\n")
    if "--json" in arguments:
        import json

        sys.stdout.write(json.dumps({"error": message, "exit_code": code}) + "\n")
    return code
