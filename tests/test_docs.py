"""Every command and every Python example of README and docs is run, offline, in the order of its page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from secateur.cli.app import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(sh|python|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.yaml)\n")
NOT_OURS = ("make", "pip", "python", "git", "cd", "torchrun")


def examples(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> list[list[str]]:
    """The lines of a shell block, continuation lines joined, comments dropped."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held-out.txt").write_text(
        "Once upon a time there was a little garden.\n" * 400, encoding="utf-8"
    )
    for language, block in examples(page):
        if language == "python":
            exec(compile(block, str(page), "exec"), {"__name__": page.stem})
            continue
        if language == "yaml":
            if named := NAMED.match(block):
                (tmp_path / named[1]).write_text(block, encoding="utf-8")
            continue
        for words in commands(block):
            if words[0] == "secateur":
                assert run(words[1:]) == 0, " ".join(words)
            else:
                assert words[0] in NOT_OURS, f"{page.name}: {words[0]} is not run by this test"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} -> {target}"
