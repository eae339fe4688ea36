from __future__ import annotations

import math

import pytest

from secateur.report.verdict import rows, verdict

from .samples import QUALITY, SPEEDS, sample

SLOW = {**SPEEDS, "decode_tokens_per_second_after": 10.0}
FAST = {**SPEEDS, "prefill_tokens_per_second_after": 4000.0, "decode_tokens_per_second_after": 30.0}


def outcome(key: str, **changes: object) -> str:
    return {row.key: row.outcome for row in rows(sample(1, **changes))}[key]


@pytest.mark.parametrize(
    ("key", "changes", "expected"),
    [
        ("bytes", {}, "same"),
        ("bytes", {"bytes_after": 10}, "better"),
        ("bytes", {"bytes_after": 10**12}, "worse"),
        ("parameters", {"parameters_after": 10}, "better"),
        ("nonzero_parameters", {}, ""),
        ("perplexity", {}, "worse"),
        ("perplexity", {"perplexity_after": 6.1363}, "same"),
        ("perplexity", {"perplexity_after": 5.0}, "better"),
        ("perplexity", {"perplexity_after": math.inf}, "worse"),
        ("perplexity", {"perplexity_after": math.nan}, "worse"),
        ("perplexity", {"perplexity_after": None}, ""),
        ("kl_divergence", {}, "worse"),
        ("kl_divergence", {"kl_divergence": 0.0}, "same"),
        ("top1_agreement", {"top1_agreement": 1.0}, "same"),
        ("prefill_tokens_per_second", {}, "same"),
        ("decode_tokens_per_second", SLOW, "worse"),
        ("decode_tokens_per_second", FAST, "better"),
    ],
)
def test_better_or_worse(key: str, changes: dict[str, object], expected: str) -> None:
    assert outcome(key, **changes) == expected


def test_a_missing_value_brings_its_reason() -> None:
    table = {
        row.key: row
        for row in rows(sample(1, perplexity_before=None, not_measured={"perplexity_before": "why"}))
    }
    assert table["perplexity"].cells() == ("not measured", "9.405")
    assert table["perplexity"].reason == "why"
    assert table["kl_divergence"].cells() == ("reference", "0.419")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "is not smaller"),
        ({}, "prefill and decode are as fast as before"),
        ({}, "perplexity rose from 6.136 to 9.405 (+53.3%)"),
        ({"perplexity_after": 6.1362}, "perplexity stayed at 6.136"),
        ({"bytes_after": 10**6}, "the file is smaller"),
        (FAST, "decode is faster (+40.1%)"),
        (SLOW, "prefill is as fast as before (+0.5%) and decode is slower (−53.3%)"),
        (dict.fromkeys(SPEEDS), "speed was not measured"),
        (dict.fromkeys(QUALITY), "quality was not measured"),
        ({**dict.fromkeys(SPEEDS), **dict.fromkeys(QUALITY)}, "neither speed nor quality was measured"),
        (dict.fromkeys(("perplexity_before", "perplexity_after")), "dense model for 73.4% of the tokens"),
        ({"sparsity_requested": 0.6}, "50.0% (60.0% was asked for)"),
        ({"pattern": "2:4"}, "in a 2:4 pattern"),
        ({"parameters_after": 100}, "as whole units"),
        ({"parameters_after": 100, "pattern": "experts"}, "of the routed experts"),
    ],
)
def test_the_sentence_says_it(changes: dict[str, object], words: str) -> None:
    sentence = verdict(sample(1, **changes))
    assert words in sentence
    assert sentence.endswith(".")
    assert sentence.startswith("sparsegpt removed")
