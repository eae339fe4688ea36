from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

import pytest

from secateur.report.html import render
from secateur.report.model import MEASUREMENTS, Report

from .reading import Page, read
from .samples import QUALITY, SPEEDS, layer_rows, sample, values

NASTY = "</title><script>alert('x')</script><img src=x onerror=alert(1)>\"&"
EMPTY: dict[str, Any] = {**dict.fromkeys(MEASUREMENTS), "protocol": None, "calibration": None, "blocks": []}
LOADING = {"src", "href", "srcset", "data", "poster", "background", "xlink:href"}


def page_of(report: Report) -> Page:
    return read(render(report))


def numbers_in(value: Any) -> set[float]:
    if isinstance(value, dict):
        return set().union(*(numbers_in(v) for k, v in value.items() if k != "schema_version"))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    return {float(value)} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


@pytest.mark.parametrize("changes", [{}, EMPTY, {"layers": [], "blocks": []}, {"model": NASTY}])
def test_the_page_is_well_formed(changes: dict[str, Any]) -> None:
    page = page_of(sample(2, **changes))
    assert page.stray == []
    assert page.unclosed == []
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing() -> None:
    html = render(sample(2))
    page = read(html)
    loaded = [e for e in page.elements if LOADING & e.attributes.keys() and e.tag != "data"]
    assert loaded == []
    assert not {e.tag for e in page.elements} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in html
    assert "url(" not in html


def test_only_the_own_script_may_run() -> None:
    page = page_of(sample(1))
    (script,) = page.all("script")
    (policy,) = [e for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy.attributes["content"]
    assert "default-src 'none'" in policy.attributes["content"]


def test_names_are_never_markup() -> None:
    layers = [{**row, "matrix": NASTY, "fallbacks": [NASTY]} for row in layer_rows(1)[:1]]
    texts = dict.fromkeys(
        ("model", "family", "method", "allocation", "command", "fingerprint", "effect"), NASTY
    )
    clean, nasty = (
        page_of(sample(1, layers=layer_rows(1)[:1])),
        page_of(
            sample(
                1, **texts, layers=layers, warnings=[NASTY], versions={NASTY: NASTY}, options={NASTY: NASTY}
            )
        ),
    )
    assert len(nasty.all("script")) == 1
    assert nasty.all("img") == []
    assert {e.tag for e in nasty.elements} - {e.tag for e in clean.elements} <= {"aside", "li", "span"}
    assert nasty.text().count("<script>") >= 10


def test_every_number_of_the_report_is_on_the_page() -> None:
    report = sample(4, layers=[{**row, "notes": {"iterations": 31.5}} for row in layer_rows(4)])
    missing = numbers_in(json.loads(report.model_dump_json())) - page_of(report).numbers()
    assert missing == set()


def test_what_was_not_measured_says_why_and_invents_no_number() -> None:
    report = sample(
        2, **{**EMPTY, "layers": [{**row, "loss": None, "seconds": None} for row in layer_rows(2)]}
    )
    page = page_of(report)
    for key in MEASUREMENTS:
        assert f"no {key} today" in page.text()
    assert "None" not in page.text()
    assert "nan" not in page.text().lower().split()
    assert [figure.text[:8] for figure in page.all("figure")] == ["Sparsity"]
    assert page.text().count("Not drawn:") == 2


def test_a_run_without_layers_has_no_empty_tables() -> None:
    page = page_of(sample(1, layers=[], blocks=[]))
    assert "Every matrix" not in page.text()
    assert "this run lists no layers" in page.text()


def test_outcomes_read_without_colour() -> None:
    chips = [e.text for e in page_of(sample(1)).all("span", "chip")]
    assert "▼ worse" in chips
    assert "● same" in chips
    assert all(text.split()[-1] in ("better", "worse", "same") for text in chips)


def test_fallbacks_are_counted_and_named() -> None:
    report = sample(24, layers=layer_rows(24, fallbacks=True))
    hit = [layer for layer in report.layers if layer.fallbacks]
    (aside,) = page_of(report).all("aside")
    assert f"{len(hit)} of {len(report.layers)} matrices" in aside.text
    assert f"{hit[0].block}.{hit[0].matrix}" in aside.text


def test_a_clean_run_has_no_notices() -> None:
    assert page_of(sample(2)).all("aside") == []


def test_pictures_have_the_numbers_behind_them() -> None:
    report = sample(3)
    page = page_of(report)
    sparsity, loss = page.all("details")
    assert all(str(block) in sparsity.text for block in range(3))
    assert {layer.loss for layer in report.layers} | {block.loss for block in report.blocks} <= page.exact()
    assert "whole block" in loss.text.lower()


def test_the_table_has_a_row_a_matrix_and_sorts_by_keyboard() -> None:
    page = page_of(sample(3))
    (box,) = page.all("div", "table sortable")
    assert box.text.count("self_attn.q_proj") == 3
    assert [e.text for e in page.all("button") if e.attributes.get("class") != "copy"] == [
        "Matrix", "Block", "Shape", "Asked for", "Reached", "Loss", "Seconds"
    ]  # fmt: skip


def test_many_experts_are_joined_and_the_page_stays_small() -> None:
    row = {"rows": 64, "columns": 32, "sparsity_requested": 0.5, "seconds": 0.1}
    layers = [
        {
            **row,
            "block": b,
            "matrix": f"mlp.experts.down_proj.{e}",
            "sparsity": 0.25 + 0.5 * (e % 2),
            "loss": 0.1 + e,
        }
        for b in range(40)
        for e in range(128)
    ]
    html = render(sample(1, layers=layers, blocks=[]))
    (box,) = read(html).all("div", "table sortable")
    assert len(html) < 200_000
    assert "5,120" in read(html).text()
    assert box.text.count("mlp.experts.down_proj") == 40
    assert any(value == pytest.approx(0.1 + 127 / 2) for value in read(html).exact())
    assert {0.25, 0.75} & read(html).exact() == set()


@pytest.mark.parametrize("key", ["perplexity_after", "kl_divergence"])
def test_an_infinite_measurement_is_shown_as_such(key: str) -> None:
    assert "infinite" in page_of(sample(1, **{key: float("inf")})).text()


def test_the_quality_picture_shows_both_ends() -> None:
    figure = page_of(sample(1)).all("figure")[0]
    assert "dense 6.136" in figure.text
    assert "pruned 9.405" in figure.text


def test_quality_without_speed_and_speed_without_quality() -> None:
    assert "speed was not measured" in page_of(sample(1, **dict.fromkeys(SPEEDS))).text()
    assert "quality was not measured" in page_of(sample(1, **dict.fromkeys(QUALITY), protocol=None)).text()


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_meet_the_contrast_of_wcag_aa(scheme: int) -> None:
    style = (files("secateur.report") / "style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style.split(":root {")[1 + scheme]))
    text = [(ink, back) for ink in ("ink", "soft", "accent") for back in ("page", "panel")]
    text += [(word, f"{word}-back") for word in ("good", "bad", "same", "warn")] + [("soft", "warn-back")]
    assert min(contrast(colours[a], colours[b]) for a, b in text) >= 4.5
    assert min(contrast(colours[f"c{k}"], colours["panel"]) for k in range(8)) >= 3


def test_the_exact_command_can_be_copied() -> None:
    command = "secateur prune 'a  b' -o out\n  --pattern 2:4"
    page = page_of(sample(1, command=command))
    assert page.all("pre")[0].text == command
    assert page.all("button", "copy")[0].attributes["type"] == "button"


def test_dates_and_versions_are_there() -> None:
    text = page_of(sample(1)).text()
    assert "14 March 2026" in text
    assert all(version in text for version in values(1)["versions"].values())
