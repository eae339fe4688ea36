from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.core.errors import InputError
from secateur.report.compare import compare
from secateur.report.runs import load_runs

from .reading import Page, read
from .samples import QUALITY, SPEEDS, sample, values

BARE: dict[str, Any] = {"layers": [], "blocks": []}


def saved(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    sample(1, **BARE, **changes).save(folder)
    return folder


def protocol(**changes: Any) -> dict[str, Any]:
    return {**values(1)["protocol"], **changes}


def figures(page: Page) -> list[str]:
    return [heading.text for heading in page.all("h3") if " against " in heading.text]


def test_runs_measured_alike_share_their_pictures(tmp_path: Path) -> None:
    runs = [saved(tmp_path / m, method=m, perplexity_after=p) for m, p in (("wanda", 7.5), ("alps", 7.1))]
    page = read(compare(runs))
    assert page.stray == page.unclosed == []
    assert page.all("aside") == []
    assert figures(page) == [
        "Perplexity against bytes of weights",
        "KL divergence from dense against bytes of weights",
        "Perplexity against sparsity",
        "Perplexity against decode speed",
        "Perplexity against prefill speed",
    ]
    assert "Best at 50.0%: alps owl 50.0%, perplexity 7.100 (dense 6.136)." in page.text()
    assert "No run is smaller on disk" in page.text()


def test_both_runs_and_the_dense_model_are_marked(tmp_path: Path) -> None:
    runs = [saved(tmp_path / m, method=m) for m in ("wanda", "alps")]
    first = read(compare(runs)).all("figure")[0]
    for words in ("1. wanda owl 50.0%:", "2. alps owl 50.0%:", "meta-llama/Llama-3.1-8B, dense:"):
        assert first.text.count(words) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_sha256": "ffff0000ffff"}, "text (9c1185a5, ffff0000)"),
        ({"window": 256}, "window (2048, 256)"),
        ({"dtype": "float32"}, "precision (bfloat16, float32)"),
        ({"tokenizer_sha256": "abcdef012345"}, "tokenizer (3f4b6ad0, abcdef01)"),
        ({"windows": 7, "stride": 9}, "stride (2047, 9) and number of windows (141, 7)"),
    ],
)
def test_other_protocols_get_their_own_pictures_and_a_notice(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    page = read(compare([saved(tmp_path / "a"), saved(tmp_path / "b", protocol=protocol(**change))]))
    (notice,) = page.all("aside")
    assert f"2 protocols that differ in {words}" in notice.text
    assert figures(page).count("Perplexity against bytes of weights") == 2
    assert {"Protocol 1", "Protocol 2"} <= {heading.text for heading in page.all("h2")}
    assert all("2. " not in figure.text for figure in page.all("figure")[:5])


def test_the_name_of_the_text_alone_makes_no_other_protocol(tmp_path: Path) -> None:
    page = read(
        compare([saved(tmp_path / "a"), saved(tmp_path / "b", protocol=protocol(text="same, renamed"))])
    )
    assert page.all("aside") == []


def test_speeds_of_other_machines_are_apart(tmp_path: Path) -> None:
    runs = [saved(tmp_path / "a"), saved(tmp_path / "b", machine={"cpu": "Other CPU", "cores": 2})]
    page = read(compare(runs))
    assert "different machines" in page.all("aside")[0].text
    assert figures(page).count("Perplexity against bytes of weights") == 1
    assert "Perplexity against decode speed on Other CPU, 2" in figures(page)


def test_a_run_without_quality_is_listed_and_not_drawn(tmp_path: Path) -> None:
    bare = saved(tmp_path / "b", **dict.fromkeys((*QUALITY, *SPEEDS)), protocol=None, method="random")
    page = read(compare([saved(tmp_path / "a"), bare]))
    assert "quality was not measured: random owl 50.0%" in page.all("aside")[0].text
    assert "random" not in "".join(figure.text for figure in page.all("figure"))
    assert "random owl 50.0%" in page.all("div", "table sortable")[0].text


def test_runs_without_any_quality_are_still_a_table(tmp_path: Path) -> None:
    page = read(compare([saved(tmp_path / "b", **dict.fromkeys(QUALITY), protocol=None)]))
    assert page.all("figure") == []
    assert len(page.all("div", "table sortable")) == 1


def test_an_infinite_perplexity_is_named_instead_of_drawn(tmp_path: Path) -> None:
    runs = [saved(tmp_path / "a"), saved(tmp_path / "b", method="magnitude", perplexity_after=float("inf"))]
    page = read(compare(runs))
    assert "Not drawn, for want of a number: magnitude owl 50.0%." in page.all("figure")[0].text
    assert "infinite" in page.all("div", "table sortable")[0].text


def test_different_models_are_named(tmp_path: Path) -> None:
    runs = [saved(tmp_path / "a", model="seedling"), saved(tmp_path / "b", model="sapling")]
    page = read(compare(runs))
    assert "different models" in page.all("aside")[0].text
    assert "Best" not in page.text()
    assert [run.label for run in load_runs(runs)] == [
        "seedling sparsegpt owl 50.0%",
        "sapling sparsegpt owl 50.0%",
    ]


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{}, {"pattern": "2:4"}], ["sparsegpt owl 50.0%", "sparsegpt 2:4 owl"]),
        ([{"seed": 1}, {"seed": 2}], ["sparsegpt owl 50.0% seed 1", "sparsegpt owl 50.0% seed 2"]),
        ([{}, {}], ["sparsegpt owl 50.0% in 0", "sparsegpt owl 50.0% in 1"]),
        ([{}, {"calibration": None}], ["sparsegpt owl 50.0% on self", "sparsegpt owl 50.0%"]),
    ],
)
def test_labels_tell_runs_apart(tmp_path: Path, changes: list[dict[str, Any]], labels: list[str]) -> None:
    runs = [saved(tmp_path / str(index), **change) for index, change in enumerate(changes)]
    assert [run.label for run in load_runs(runs)] == labels


def test_the_same_run_twice_has_two_labels(tmp_path: Path) -> None:
    run = saved(tmp_path / "a")
    labels = [run.label for run in load_runs([run, run, run / "report.json"])]
    assert len(set(labels)) == 3


def test_what_is_no_run_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"secateur prune MODEL -o FOLDER"):
        compare([tmp_path])
    with pytest.raises(InputError, match="no run to compare"):
        compare([])


def test_labels_are_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    page = read(compare([saved(tmp_path / "a", model=nasty), saved(tmp_path / "b", method=nasty)]))
    assert len(page.all("script")) == 1
    assert nasty in page.text()
