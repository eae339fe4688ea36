"""What a run may resume, and what it says when it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.checkpoint.journal import Journal, plain
from secateur.core.errors import ResumeError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(values=st.dictionaries(st.text(), VALUES, max_size=4))
@settings(max_examples=30, deadline=None)
def test_what_was_noted_comes_back(tmp_path_factory: pytest.TempPathFactory, values):
    folder = tmp_path_factory.getbasetemp()
    journal = Journal(folder, values, {"part": values}, values, merged=True)
    journal.save()
    assert Journal.load(folder) == journal
    journal.require(values)


def test_no_journal_is_none(tmp_path: Path):
    assert Journal.load(tmp_path) is None
    assert Journal.load(tmp_path / "absent") is None


def test_parts_keep_the_order_of_their_first_write(tmp_path: Path):
    journal = Journal(tmp_path, {})
    for part in ("b", "a", "10", "9", "b"):
        journal.parts[part] = {}
    journal.save()
    loaded = Journal.load(tmp_path)
    assert loaded is not None
    assert list(loaded.parts) == ["b", "a", "10", "9"]


def test_differences_are_listed_key_by_key(tmp_path: Path):
    journal = Journal(tmp_path / ".secateur", {"method": "wanda", "sparsity": 0.5, "seed": 0, "group": 1})
    with pytest.raises(ResumeError) as caught:
        journal.require({"method": "wanda", "sparsity": 0.6, "seed": 0, "alpha": [1, 2]})
    text = str(caught.value)
    assert "sparsity: 0.5 -> 0.6, group: 1 -> absent, alpha: absent -> [1, 2]" in text
    assert "method" not in text
    assert "seed" not in text


def test_tuples_and_lists_are_the_same(tmp_path: Path):
    Journal(tmp_path, plain({"pattern": (2, 4)})).require({"pattern": (2, 4)})
    Journal(tmp_path, plain({"pattern": (2, 4)})).require({"pattern": [2, 4]})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"parts": {}}', b'{"fingerprint": {}, "other": 1}'])
def test_a_damaged_journal_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "journal.json").write_bytes(content)
    with pytest.raises(ResumeError, match="does not parse"):
        Journal.load(tmp_path)
