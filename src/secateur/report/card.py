"""README.md of the output folder: a model card that says what was done and what it cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from secateur.loading import CODE, PACKED_CODE
from secateur.report.model import FILE_NAME, Report
from secateur.report.verdict import rows, verdict

__all__ = ["model_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(report: Report, source: Path | None = None) -> str:
    """Markdown with YAML front matter, as the hub reads it.

    Args:
        report: the run.
        source: folder of the dense model; licence and language of its card or config are carried over.
    """
    matter = yaml.safe_dump(_front(report, source), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{matter}---",
        f"# {_plain(report.name)}, {_plain(report.title)}",
        _plain(verdict(report)),
        "## What was done\n\n" + _done(report),
        "## Before and after\n\n" + _table(report),
        "## What to expect\n\n" + report.effect,
        "## How to load it\n\n" + _loading(report),
        "## Limits\n\n" + _limits(report),
        f"Everything that was measured is in `{FILE_NAME}` and, to look at, in `report.html`.",
    ]
    return "\n\n".join(parts) + "\n"


_STOCK = "It is an ordinary checkpoint: whatever loads the dense model loads this one."
_OWN_CODE = """Its blocks are not those of a stock class: `modeling_secateur.py` beside the weights builds
them. Put `import secateur` before this, or pass `trust_remote_code=True` after reading that file."""
_PACKED = """Its weights are packed: transformers reads them after `import secateur`, other engines do not.
Loaded as below they are unpacked; `quantization_config=secateur.SecateurQuantizationConfig(mode="packed")`
keeps them packed, which takes less memory and, where a kernel computes from them, can take less time.
`secateur export FOLDER --format dense -o OUT` writes ordinary files that are equal bit for bit."""
_LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""


def _loading(report: Report) -> str:
    engines = "\n".join(f"- {name}: {_plain(answer)}" for name, answer in report.loads_in.items())
    said = report.loads_in.get("transformers", "")
    if CODE in said:
        return "\n\n".join(filter(None, (_OWN_CODE, _LOADING, engines)))
    if PACKED_CODE in said:
        loading = _LOADING.replace("from transformers", "import secateur\nfrom transformers", 1)
        return "\n\n".join((_PACKED, loading, engines))
    return "\n\n".join(filter(None, (_STOCK, _LOADING, engines)))


def _front(report: Report, source: Path | None) -> dict[str, Any]:
    dense = _source_facts(source) if source else {}
    from_hub = _HUB_ID.fullmatch(report.model) and not Path(report.model).exists()
    return {
        **({"base_model": report.model} if from_hub else {}),
        **{key: dense[key] for key in _INHERITED if key in dense},
        "library_name": "transformers",
        "tags": list(
            dict.fromkeys(["secateur", "pruned", report.method, report.pattern.replace(":", "-of-")])
        ),
    }


def _source_facts(folder: Path) -> dict[str, Any]:
    """What the dense model says about itself; nothing where its card does not parse.

    Scalars stay strings: `no` in a list of languages is Norwegian.
    """
    config, card = _read(folder / "config.json"), _read(folder / "README.md")
    match = re.match(r"\ufeff?---\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        facts = json.loads(config or "{}")
        front = yaml.load(match[1], Loader=yaml.BaseLoader) if match else None
    except (yaml.YAMLError, json.JSONDecodeError):
        return {}
    licence = {"license": facts["license"]} if isinstance(facts, dict) and "license" in facts else {}
    return {**licence, **front} if isinstance(front, dict) else licence


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _plain(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A code span around any text, longer fenced than the backticks in it."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _done(report: Report) -> str:
    options = ", ".join(f"{name}={value}" for name, value in report.options.items())
    calibration = report.calibration
    text = "none"
    if calibration:
        text = f"{_plain(calibration.source)}, {calibration.windows} windows of {calibration.length} tokens"
    facts = {
        "Dense model": _code(report.model),
        "Method": _code(report.method) + (f" with {_code(options)}" if options else ""),
        "Pattern": _code(report.pattern),
        "Allocation": _code(report.allocation),
        "Calibration text": text,
        "Seed": str(report.seed),
        "Versions": _plain(", ".join(f"{name} {version}" for name, version in report.versions.items())),
        "Fingerprint": _code(report.fingerprint),
    }
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", report.command)), default=0))
    command = f"{fence}sh\n{report.command}\n{fence}"
    return "\n".join(f"- {name}: {value}" for name, value in facts.items()) + f"\n\n{command}"


def _table(report: Report) -> str:
    lines = ["| | Before | After | Change |", "|---|---:|---:|---|"]
    for row in rows(report):
        before, after = row.cells()
        remark = row.reason or ", ".join(filter(None, (row.change, row.outcome)))
        lines.append(f"| {row.label} | {before} | {after} | {_plain(remark)} |")
    protocol = report.protocol
    if protocol:
        text = _plain(protocol.text or f"text {protocol.text_sha256[:12]}")
        where = f"{text}, windows of {protocol.window} tokens, stride {protocol.stride}, {protocol.dtype}"
        lines.append(f"\nQuality was measured on {where}.")
    return "\n".join(lines)


def _limits(report: Report) -> str:
    limits = [
        "It has the limits and biases of the dense model, and pruning adds its own: perplexity hides losses "
        "in rare knowledge, long contexts and other languages. Evaluate it on your task before you use it.",
        *(_plain(warning) for warning in report.warnings),
        *(
            f"{_plain(phrase)} ({len(layers)} of {len(report.layers)} matrices)."
            for phrase, layers in report.fallbacks()
        ),
    ]
    return "\n".join(f"- {limit}" for limit in limits)
