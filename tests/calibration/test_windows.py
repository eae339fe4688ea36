"""Windows: what each source gives, and one clear line for each source that cannot be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import VOCAB, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from calibration.shared import STORIES, STORIES_TEXT, needs_shared
from secateur.calibration.windows import Windows, load_windows
from secateur.core.errors import CalibrationError, MissingExtraError

STORY = "The tree was small, and the fruit was sweet. Nobody knew how many leaves it had lost.\n" * 40
DOCUMENTS = ["The tree was small.", "The fruit was sweet.", "Nobody knew how many leaves it had lost."] * 20


def load(spec: Path | str, **changes: object) -> Windows:
    return load_windows(str(spec), **{"tokenizer": tiny_tokenizer(), "samples": 4, "length": 16, **changes})


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def joined() -> torch.Tensor:
    """The first four windows of the documents, by hand."""
    end = tiny_tokenizer().eos_token_id
    ids: list[int] = []
    for document in DOCUMENTS:
        ids += [*([end] if ids else []), *tiny_tokenizer()(document, add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids[:64]).view(4, 16)


def test_text_is_cut_into_consecutive_windows(tmp_path: Path) -> None:
    windows = load(written(tmp_path / "story.txt", STORY))
    expected = tiny_tokenizer()(STORY, add_special_tokens=False)["input_ids"][:64]
    assert windows.ids.tolist() == torch.tensor(expected).view(4, 16).tolist()
    assert (len(windows), windows.length, windows.tokens, windows.mask) == (4, 16, 64, None)


@pytest.mark.parametrize("layout", ["lines", "array", "strings"])
def test_json_records_are_joined(tmp_path: Path, layout: str) -> None:
    records = [{"text": text, "n": 1} for text in DOCUMENTS] if layout != "strings" else DOCUMENTS
    lines = "\n\n".join(json.dumps(record) for record in records)
    path = written(tmp_path / "stories.json", lines if layout == "lines" else json.dumps(records))
    assert torch.equal(load(path).ids, joined())


@pytest.mark.parametrize("large", [False, True])
def test_parquet_columns_are_joined_and_nulls_left_out(tmp_path: Path, large: bool) -> None:
    kind = pa.large_string() if large else pa.string()
    table = pa.table({"n": range(61), "story": pa.array([*DOCUMENTS[:5], None, *DOCUMENTS[5:]], kind)})
    pq.write_table(table, tmp_path / "stories.parquet", row_group_size=7)
    assert torch.equal(load(tmp_path / "stories.parquet").ids, joined())
    assert torch.equal(load(tmp_path / "stories.parquet", column="story").ids, joined())


def test_the_column_text_wins_over_other_strings(tmp_path: Path) -> None:
    lines = [json.dumps({"title": "x", "text": text}) for text in DOCUMENTS]
    assert torch.equal(load(written(tmp_path / "stories.jsonl", "\n".join(lines))).ids, joined())


def test_a_short_text_gives_what_it_has_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        windows = load(written(tmp_path / "story.txt", STORY), samples=10_000)
    expected = len(tiny_tokenizer()(STORY, add_special_tokens=False)["input_ids"]) // 16
    assert len(windows) == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{expected} windows" in caplog.text


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "short.txt": (b"The tree", "has 2 tokens; expected at least one window of 16"),
    "latin.txt": (b"a" * 70_000 + b"caf\xe9 noir" * 9, "byte 70003 cannot be decoded"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "byte 13 cannot be decoded"),
    "cut.txt": (b"a" * 99 + b"\xc3", "byte 99 cannot be decoded"),
    "empty.jsonl": (b"\n\n", "is empty"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 of"),
    "numbers.jsonl": (b'{"text": 3}', "has the columns text"),
    "later.jsonl": (b'{"text": "a"}\n{"text": 3}', "record 2 of"),
    "two.jsonl": (b'{"title": "a", "body": "b"}', "has the columns title, body"),
    "lists.json": (b"[[1, 2]]", "are an array"),
    "broken.parquet": (b"PAR1 not really", "not a readable Parquet file"),
    "unknown/": (None, "is a folder"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load(path, samples=10**5)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["missing.txt", "data/missing.jsonl", "missing", "a/b/c/d"])
def test_files_that_are_not_there(spec: str) -> None:
    with pytest.raises(CalibrationError, match="there is no file"):
        load(spec)


def test_a_wrong_column_names_the_right_ones(tmp_path: Path) -> None:
    path = written(tmp_path / "stories.jsonl", '{"title": "a", "body": "b"}')
    with pytest.raises(CalibrationError, match="did you mean 'body'"):
        load(path, column="bodi")
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), tmp_path / "stories.parquet")
    with pytest.raises(CalibrationError, match="known: body, title"):
        load(tmp_path / "stories.parquet", column="text")
    with pytest.raises(CalibrationError, match="a file with columns"):
        load(written(tmp_path / "story.txt", STORY), column="text")


@pytest.mark.parametrize(("samples", "length"), [(0, 16), (4, 1)])
def test_no_windows_asked_for(samples: int, length: int) -> None:
    with pytest.raises(CalibrationError, match="at least 1 window"):
        load("self", samples=samples, length=length)


def test_hub_data_sets_need_the_extra() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"secateur\[data\]"):
            load("owner/name:train")
    else:
        pytest.skip("the package datasets is installed")


def test_sampled_windows_come_from_the_model() -> None:
    windows = load("self", model=lambda: tiny_model("llama"), seed=3)
    assert windows.ids.shape == (4, 16)
    assert windows.source == "self (seed 3)"
    assert windows.ids[:, 0].tolist() == [tiny_tokenizer().bos_token_id] * 4
    with pytest.raises(CalibrationError, match="without a model"):
        load("self")
    with pytest.raises(CalibrationError, match="at most the model's 256 positions"):
        load("self", model=lambda: tiny_model("llama"), length=257)


def test_ids_and_lengths_are_checked_against_the_model() -> None:
    config = tiny_config("gpt2")
    Windows.of(torch.tensor([[0, VOCAB - 1]])).require_fits(config)
    with pytest.raises(CalibrationError, match=f"token id {VOCAB}.* below the model's vocabulary"):
        Windows.of(torch.tensor([[0, VOCAB]])).require_fits(config)
    with pytest.raises(CalibrationError, match="at most the model's 256 positions"):
        Windows.of(torch.zeros(1, 257)).require_fits(config)


def test_batches_and_shards_are_consecutive_and_complete() -> None:
    ids = torch.arange(70).view(10, 7)
    windows = Windows.of(ids, ids % 7 > 1)
    assert [len(batch) for batch in windows.batches(4)] == [4, 4, 2]
    for parts in (list(windows.batches(4)), [windows.shard(rank, 3) for rank in range(3)]):
        assert torch.equal(torch.cat([part.ids for part in parts]), ids)
        assert torch.equal(torch.cat([part.mask for part in parts]), windows.mask)
        assert {part.sha256 for part in parts} == {windows.sha256}
    with pytest.raises(CalibrationError, match="10 windows for 11 processes"):
        windows.shard(0, 11)


def test_split_parts_are_sets_of_their_own() -> None:
    windows = Windows.of(torch.arange(70).view(10, 7))
    first, rest = windows.split(3)
    assert torch.equal(torch.cat([first.ids, rest.ids]), windows.ids)
    assert first.sha256 == Windows.of(windows.ids[:3]).sha256 != windows.sha256
    with pytest.raises(CalibrationError, match="10 of 10 windows"):
        windows.split(10)


def test_the_hash_covers_ids_and_mask() -> None:
    ids = torch.arange(8).view(2, 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert len({Windows.of(ids).sha256, Windows.of(ids + 1).sha256, Windows.of(ids, mask).sha256}) == 3


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])])
def test_masks_that_do_not_fit(mask: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match="a mask of shape"):
        Windows.of(torch.zeros(2, 4), mask)


@needs_shared
def test_the_golden_windows_are_the_start_of_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    windows = load_windows(str(STORIES_TEXT), tokenizer=tokenizer, samples=128, length=256)
    text = STORIES_TEXT.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: 128 * 256]
    assert torch.equal(windows.ids, torch.tensor(ids).view(128, 256))
