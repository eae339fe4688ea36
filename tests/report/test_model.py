from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from secateur.core.errors import InputError, OutputError
from secateur.report.files import write_text
from secateur.report.model import MEASUREMENTS, SCHEMA_VERSION, Report

from .samples import QUALITY, sample, values

PROMISED = """
method sparsity_requested sparsity parameters_before parameters_after bytes_before bytes_after
perplexity_before perplexity_after kl_divergence top1_agreement peak_memory_bytes seconds protocol seed
prefill_tokens_per_second_before prefill_tokens_per_second_after
decode_tokens_per_second_before decode_tokens_per_second_after layers versions
"""


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    report = sample(3, kl_divergence=None, warnings=["naïve — ok"])
    report.save(tmp_path)
    assert Report.load(tmp_path) == report
    assert Report.load(tmp_path / "report.json") == report
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_the_promised_keys_are_in_the_file(tmp_path: Path) -> None:
    sample(1).save(tmp_path / "report.json")
    assert set(json.loads((tmp_path / "report.json").read_text())) >= set(PROMISED.split())


def test_infinite_and_undefined_values_are_not_lost(tmp_path: Path) -> None:
    sample(1, perplexity_after=math.inf, kl_divergence=math.nan).save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded.perplexity_after == math.inf
    assert loaded.kl_divergence is not None
    assert math.isnan(loaded.kl_divergence)


def test_keys_of_a_later_release_are_kept(tmp_path: Path) -> None:
    Report.model_validate({**values(1), "energy_joules": 12}).save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["energy_joules"] == 12


@pytest.mark.parametrize("key", MEASUREMENTS)
def test_a_null_needs_a_reason(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} is null"):
        Report.model_validate({**values(1), key: None})
    assert getattr(sample(1, **{key: None}), key) is None


def test_a_value_has_no_reason_for_being_null() -> None:
    with pytest.raises(ValidationError, match="seconds has a value and a reason"):
        sample(1, not_measured={"seconds": "forgotten"})


def test_quality_without_its_protocol_is_refused() -> None:
    with pytest.raises(ValidationError, match="protocol"):
        sample(1, protocol=None)


def test_measuring_later_drops_the_reasons() -> None:
    bare = sample(1, **dict.fromkeys(QUALITY), protocol=None)
    full = bare.measured(**QUALITY, protocol=values(1)["protocol"])
    assert full == sample(1)
    assert bare.perplexity_after is None


def test_measuring_later_is_validated() -> None:
    with pytest.raises(ValidationError, match="top1_agreement"):
        sample(1).measured(top1_agreement=1.5)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("seedling", "seedling"),
        ("/data/models/tiny/", "tiny"),
        ("../tiny", "tiny"),
        ("./a/b/tiny", "tiny"),
        ("C:\\models\\tiny", "tiny"),
    ],
)
def test_the_name_people_use(model: str, name: str) -> None:
    assert sample(1, model=model).name == name


def test_bytes_that_are_not_text_do_not_break_the_file(tmp_path: Path) -> None:
    sample(1, command="secateur prune caf\udce9").save(tmp_path)
    assert Report.load(tmp_path).command == "secateur prune caf?"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        ("{", "no valid report"),
        ('{"model": "x"}', "no valid report"),
        ("\xff", "no valid report"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=words) as caught:
        Report.load(tmp_path)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_later_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    sample(1, schema_version=SCHEMA_VERSION + 1).save(tmp_path)
    with pytest.raises(InputError, match="upgrade"):
        Report.load(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "inside").touch()
    with pytest.raises(OutputError, match="another path"):
        write_text(target, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
