"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from secateur.report.numbers import count, duration, number, percent, size

__all__ = ["benched", "compared", "evaluated", "exported", "inspection", "planned"]

Rows = list[tuple[str, str]]
BAR = 20


def _facts(rows: Rows, title: str = "") -> Table:
    table = Table(show_header=False, box=None, title=title, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def inspection(facts: Mapping[str, Any]) -> list[Any]:
    """`secateur inspect`."""
    how = "inferred from the model" if facts["inferred"] else "family file"
    prunable, total = facts["parameters_prunable"], facts["parameters"]
    share = percent(prunable / total)
    rows = [
        ("family", f"{facts['family']} ({how}), {facts['architecture']}"),
        ("blocks", str(facts["blocks"])),
        ("parameters", f"{count(total)}, {count(prunable)} of them prunable ({share})"),
        ("weights", f"{size(facts['bytes'])} in {facts['shards']} file(s), {', '.join(facts['dtypes'])}"),
        *_packing(facts),
        ("longest input", f"{facts['max_length_tokens']} tokens"),
        ("spaces", ", ".join(f"{name} {value}" for name, value in facts["spaces"].items())),
        ("tied", ", ".join(f"{a} = {b}" for a, b in facts["tied"].items()) or "nothing"),
        *((f"loads in {name}", answer) for name, answer in facts["loads_in"].items()),
    ]
    return [_facts(rows, facts["model"]), *(_kind(kind, facts["blocks"]) for kind in facts["block_kinds"])]


def _packing(facts: Mapping[str, Any]) -> Rows:
    if not facts["formats"]:
        return []
    kinds = ", ".join(f"{number} in {format}" for format, number in facts["formats"].items())
    share = percent(facts["bytes"] / facts["dense_bytes"])
    return [("packed tensors", f"{kinds}; {size(facts['dense_bytes'])} unpacked ({share} of that on disk)")]


def _kind(kind: Mapping[str, Any], blocks: int) -> Table:
    which = "every block" if len(kind["blocks"]) == blocks else f"blocks {_ranges(kind['blocks'])}"
    table = Table("matrix", "outputs", "inputs", "copies", "reads", box=None, header_style="bold")
    table.title, table.title_justify, table.title_style = f"\nin {which}", "left", "bold"
    for row in kind["matrices"]:
        table.add_row(row["name"], str(row["rows"]), str(row["columns"]), str(row["count"]), row["input"])
    return table


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def planned(facts: Mapping[str, Any]) -> list[Any]:
    """`secateur plan`."""
    free = size(facts["available_memory_bytes"])
    fits = "fits" if facts["peak_memory_bytes"] <= facts["available_memory_bytes"] else "DOES NOT FIT"
    about = "" if facts.get("exact", True) else "about "  # what goes where is what the run finds
    rows = [
        ("method", f"{facts['method']}, pattern {facts['pattern']}, allocation {facts['allocation']}"),
        ("sparsity", f"{percent(facts['sparsity'])} of {count(facts['parameters_prunable'])} prunable"),
        ("parameters after", about + count(facts["parameters_after"])),
        ("zeros after", count(facts["zeros_after"])),
        ("bytes", f"{size(facts['bytes_before'])} before, {about}{size(facts['bytes_after'])} after"),
        *_structure(facts.get("structure")),
        ("peak memory", f"about {size(facts['peak_memory_bytes'])} ({fits}: {free} free)"),
        ("time", f"about {duration(facts['seconds'])} on this machine"),
        ("disk during the run", size(facts["disk_bytes"])),
        *((f"loads in {name}", answer) for name, answer in facts["loads_in"].items()),
        ("faster", f"{'yes' if facts['faster'] else 'no'}. {facts['effect']}"),
    ]
    chart = [_widths(facts["blocks"])] if "blocks" in facts else []
    return [_facts(rows, facts["model"]), *chart]


def _structure(facts: Mapping[str, Any] | None) -> Rows:
    """Rows of a structured plan whose blocks are known."""
    if facts is None:
        return []
    units = ", ".join(
        f"{facts['units_after'][kind]:,} of {whole:,} {kind}" for kind, whole in facts["units_before"].items()
    )
    rows = [("units that stay", units)]
    labels = {
        "non_embedding_parameters": ("without embeddings", count),
        "macs_per_token": ("MACs a token", count),
        "kv_bytes_per_token": ("cache a token", size),
    }
    for key, (label, show) in labels.items():
        before, after = facts[f"{key}_before"], facts[f"{key}_after"]
        if before is not None and after is not None:
            rows.append((label, f"{show(before)} before, {show(after)} after"))
    if facts["floors"]:
        rows.append(("at the floor", f"{', '.join(facts['floors'])} (min_keep)"))
    if budget := facts["budget"]:
        figures = (number(budget[key]) for key in ("planned", "limit", "dense"))
        rows.append(
            ("budget", "{} {unit} planned, {} allowed, {} dense".format(*figures, unit=budget["unit"]))
        )
    return [*rows, *_nearest(facts["uniform"])]


def _nearest(uniform: Mapping[str, Any] | None) -> Rows:
    if uniform is None:
        return []
    widths = ", ".join(f"{width} {kind}" for kind, width in uniform["units_a_block"].items())
    kind = "the stock class" if uniform["stock"] else "secateur's loader"
    return [
        (
            "nearest uniform plan",
            f"{widths} in every block, {count(uniform['parameters'])}, {size(uniform['bytes'])}; "
            f"loads in {kind}; loses {percent(uniform['extra_loss'])} more of the scores (-O uniform=true)",
        )
    ]


def _widths(blocks: list[dict[str, list[int]]]) -> Table:
    """A bar a block and kind of unit: what stays of it."""
    table = Table(box=None, header_style="bold")
    kinds = list(dict.fromkeys(kind for block in blocks for kind in block))
    table.add_column("block", justify="right")
    for kind in kinds:
        table.add_column(kind)
    for index, block in enumerate(blocks):
        table.add_row(str(index), *(_bar(*block[kind]) if kind in block else "" for kind in kinds))
    return table


def _bar(kept: int, whole: int) -> str:
    filled = round(BAR * kept / whole)
    return f"{'█' * filled}{'░' * (BAR - filled)} {kept}/{whole}"


def evaluated(result: Mapping[str, Any]) -> list[Any]:
    """`secateur evaluate`."""
    labels = {
        "perplexity": "perplexity",
        "perplexity_dense": "perplexity of the dense model",
        "kl_divergence": "KL divergence (nats a token)",
        "top1_agreement": "top-1 agreement",
    }
    rows = [(label, number(result[key])) for key, label in labels.items() if key in result]
    if protocol := result.get("protocol"):
        rows.append(
            ("on", f"{protocol['windows']} windows of {protocol['window']} tokens of {protocol['text']}")
        )
        rows.append(("computed in", protocol["dtype"]))
    tables: list[Any] = [_facts(rows, result["model"])]
    if tasks := result.get("tasks"):
        table = Table("task", "metric", "value", box=None, header_style="bold")
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                table.add_row(task, metric, number(value) if isinstance(value, float) else str(value))
        tables.append(table)
    return tables


def benched(result: Mapping[str, Any]) -> list[Any]:
    """`secateur bench`."""
    table = Table("phase", "batch", "model", "tokens/s", "lowest", "highest", box=None, header_style="bold")
    for row in result["measurements"]:
        spread = (number(row[key]) for key in ("median", "min", "max"))
        table.add_row(row["phase"], str(row["batch_size"]), row["model"], *spread)
    for row in result.get("ratios", []):
        table.add_row(row["phase"], str(row["batch_size"]), "ratio", f"{row['ratio']:.2f}x", "", "")
    notes = (
        f"{result['dtype']}, peak memory {size(result['peak_memory_bytes'])}, median of {result['repeats']}"
    )
    weights = f"weights in memory {size(result['weight_bytes'])}"
    if "weight_bytes_against" in result:
        weights += f", against {size(result['weight_bytes_against'])}"
    lines = [notes, weights, *([f"kernel: {result['kernel']}"] if result["kernel"] else [])]
    return [table, *(f"[dim]{line}[/dim]" for line in lines)]


def compared(rows: list[dict[str, Any]]) -> Table:
    """`secateur compare`."""
    table = Table(
        "run", "method", "pattern", "sparsity", "perplexity", "KL", "bytes", box=None, header_style="bold"
    )
    for row in rows:
        known = [row["perplexity_after"], row["kl_divergence"]]
        shown = ["-" if value is None else number(value) for value in known]
        table.add_row(
            row["run"],
            row["method"],
            row["pattern"],
            percent(row["sparsity"]),
            *shown,
            size(row["bytes_after"]),
        )
    return table


def exported(facts: Mapping[str, Any]) -> list[Any]:
    """`secateur export`."""
    known = {"architecture": "architecture", "dtype": "matrices in", "tokenizer": "tokenizer"}
    rows = [(label, str(facts[key])) for key, label in known.items() if key in facts]
    rows += [
        ("parameters", count(facts["parameters"])),
        ("size", f"{size(facts['bytes_before'])} before, {size(facts['bytes'])} now"),
        *(("note", note) for note in facts["notes"]),
    ]
    return [_facts(rows, f"written: {facts['out']}")]
