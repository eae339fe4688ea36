from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from secateur.report.card import model_card

from .reading import read
from .samples import layer_rows, sample


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def rendered(card: str) -> str:
    return read("<main>" + MarkdownIt("commonmark").enable("table").render(parts(card)[1]) + "</main>").text()


def source(folder: Path, card: str = "", **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if card:
        (folder / "README.md").write_text(card)
    return folder


def test_front_matter_of_a_hub_model(tmp_path: Path) -> None:
    card = "---\nlicense: llama3.1\nlanguage:\n- en\n- no\ntags:\n- chat\n---\n# Llama\n---\nlicense: mit\n"
    front, _ = parts(model_card(sample(1, pattern="2:4"), source(tmp_path, card)))
    assert front == {
        "base_model": "meta-llama/Llama-3.1-8B",
        "license": "llama3.1",
        "language": ["en", "no"],
        "library_name": "transformers",
        "tags": ["secateur", "pruned", "sparsegpt", "2-of-4"],
    }


@pytest.mark.parametrize("model", ["seedling", "/data/model", "./model", "a: b\n- c"])
def test_a_local_model_is_no_base_model(model: str) -> None:
    front, _ = parts(model_card(sample(1, model=model)))
    assert "base_model" not in front
    assert "license" not in front


def test_a_folder_that_looks_like_a_hub_id_is_no_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in parts(model_card(sample(1, model="models/tiny")))[0]


def test_the_licence_may_stand_in_the_config(tmp_path: Path) -> None:
    assert parts(model_card(sample(1), source(tmp_path, license="mit")))[0]["license"] == "mit"
    both = source(tmp_path, "---\nlicense: apache-2.0\n---\n", license="mit")
    assert parts(model_card(sample(1), both))[0]["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "card", ["---\n: : [\n---\n", "---\n- a\n---\n", "no front matter", "---\nnever closed"]
)
def test_a_broken_source_card_is_left_out(tmp_path: Path, card: str) -> None:
    assert "license" not in parts(model_card(sample(1), source(tmp_path, card)))[0]


def test_the_card_says_what_was_done_and_what_it_cost() -> None:
    report = sample(1, warnings=["mind the *gap*"])
    text = rendered(model_card(report))
    for words in (
        report.effect.replace("`", ""),
        report.command,
        report.fingerprint,
        "mind the *gap*",
        "from_pretrained(folder",
        "9.405",
        "+53.3%, worse",
        "wikitext-2 test, windows of 2048 tokens",
        "secateur 0.1.0, torch 2.13.0",
    ):
        assert words in text


def test_fallbacks_are_limits() -> None:
    assert "(2 of 35 matrices)" in rendered(model_card(sample(5, layers=layer_rows(5, fallbacks=True))))


def test_missing_values_bring_their_reason() -> None:
    assert "no perplexity_after today" in rendered(model_card(sample(1, perplexity_after=None)))


def test_names_cannot_write_markdown_or_html() -> None:
    nasty = "a|b <img src=x onerror=alert(1)> `c` ```\n# heading [x](http://y) **d**"
    card = model_card(
        sample(1, model=nasty, method=nasty, options={"x": nasty}, warnings=[nasty], command=nasty)
    )
    html = MarkdownIt("commonmark").enable("table").render(parts(card)[1])
    page = read(html)
    assert page.all("img") == page.all("a") == page.all("strong") == []
    assert len(page.all("h1")) == 1
    assert len(page.all("tr")) == 9
    assert page.stray == page.unclosed == []


def test_the_loading_code_is_python() -> None:
    body = model_card(sample(1))
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")
