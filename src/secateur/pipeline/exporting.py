"""`export`: a checkpoint in a form that another engine loads."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import secateur
from secateur.anatomy.cut import pad_block
from secateur.anatomy.layout import FileLayout
from secateur.checkpoint.packing import DENSE, FORMATS
from secateur.checkpoint.place import require_disk
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import CheckpointError, ExportError, InputError, OutputError
from secateur.core.progress import SILENT, Progress
from secateur.formats.dense import ADDED, uniform
from secateur.formats.fit import Fit, fit
from secateur.formats.form import Form
from secateur.formats.gguf_file import DTYPES, require_gguf, stored_as, write_gguf
from secateur.formats.gguf_tensors import entries
from secateur.formats.vocabulary import WITHOUT, Vocabulary, file_name, vocabulary
from secateur.loading import REMOTE_CODE
from secateur.pipeline.opened import Opened, open_model
from secateur.pipeline.state import part_name
from secateur.pipeline.storing import write_stored

__all__ = ["export"]

GGUF = "gguf"
NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
MARGIN_BYTES = 64_000_000


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "gguf",
    dtype: str | None = None,
    tokenizer: bool = True,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write a checkpoint as one GGUF file for llama.cpp, as ordinary files for any other engine, or packed.

    Tensors are read, converted and written one after the other; the result takes its name when it is whole.
    `dense` unpacks packed weights, and pads blocks that differ in size where none are packed.

    Args:
        model: local folder, hub id or `seedling`.
        out: the GGUF file, or the folder of the checkpoint.
        format: `gguf`, `dense`, or one of packed weights: `bitmask` or `nm`.
        dtype: of the matrices in a GGUF file: `f16`, `bf16`, `f32` or `q8_0`; by default as stored.
        tokenizer: put the tokenizer into the GGUF file.

    Returns:
        What was written: `out`, `format`, `bytes`, `parameters`, `seconds`, `notes`, and of a GGUF file
        `architecture`, `dtype`, `tensors` and `tokenizer`.

    Raises:
        ExportError: a model or tokenizer that the format cannot hold; nothing is written.
        OutputError: a place that cannot be written, or is taken.

    >>> import secateur
    >>> secateur.export("seedling", "seedling.gguf", dtype="f16")["architecture"]  # doctest: +SKIP
    'llama'
    """
    started = time.perf_counter()
    known = (GGUF, DENSE, *(name for name, form in FORMATS if form.exact and not form.variant))
    if format not in known:
        raise InputError(f"format {format!r}", " or ".join(known))
    if format == GGUF:
        require_gguf()
    if dtype is not None and (format != GGUF or dtype not in DTYPES):
        raise InputError(f"dtype {dtype!r} for {format}", f"gguf with {', '.join(DTYPES)}", "leave it out")
    opened = open_model(model)
    facts = _writer(opened, format, dtype, tokenizer)(opened, Path(out).expanduser(), progress=progress)
    seconds = round(time.perf_counter() - started, 3)
    return {"model": str(model), "out": str(out), "format": format, **facts, "seconds": seconds}


def _writer(opened: Opened, format: str, dtype: str | None, tokenizer: bool) -> Callable[..., dict[str, Any]]:
    """What writes a format."""
    if format == GGUF:
        return partial(_gguf, dtype=dtype, tokenizer=tokenizer)
    if format != DENSE or opened.checkpoint.formats:
        return partial(write_stored, format=format)
    return _dense


def _gguf(
    opened: Opened, out: Path, *, dtype: str | None, tokenizer: bool, progress: Progress
) -> dict[str, Any]:
    config = opened.config.to_dict()
    found = fit(Form.of(config, opened.checkpoint.tensors), str(config["model_type"]))
    tensors = entries(found, opened.checkpoint, opened.anatomy, opened.layout)
    words = _vocabulary(opened, found) if tokenizer else Vocabulary({"tokenizer.ggml.model": "none"})
    stored = dtype or NAMES[str(opened.stored_dtype).removeprefix("torch.")]
    if out.exists():
        raise OutputError(f"{out} exists", "a new file", "remove it or choose another name")
    if not out.parent.is_dir():
        raise OutputError(f"there is no folder {out.parent}", "a folder to write to", "make it first")
    expected = sum(prod(entry.shape) * BYTES[stored_as(entry, stored)] for entry in tensors)
    require_disk(out, int(expected) + MARGIN_BYTES)
    keys = {f"{found.name}.{key}": value for key, value in found.keys().items()}
    keys = {"general.name": file_name(Path(opened.name).name, words.keys), **keys, **words.keys}
    nbytes = write_gguf(out, found.name, keys, tensors, stored, progress)
    return {
        "architecture": found.name,
        "dtype": stored,
        "tensors": len(tensors),
        "parameters": sum(prod(entry.shape) for entry in tensors),
        "bytes": nbytes,
        "bytes_before": opened.checkpoint.nbytes,
        "tokenizer": words.keys["tokenizer.ggml.model"],
        "notes": [*found.notes, *words.notes],
    }


def _vocabulary(opened: Opened, found: Fit) -> Vocabulary:
    import json

    try:
        tokenizer = opened.tokenizer
    except CheckpointError as error:
        raise ExportError(f"no tokenizer to put into the file ({error.seen})", "", WITHOUT) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("a tokenizer without a tokenizer.json", "one that has it", WITHOUT)
    special = {name: getattr(tokenizer, attribute) for name, attribute in SPECIAL.items()}
    ids = tokenizer("a").input_ids
    ends = (
        special["bos"] is not None and ids[0] == special["bos"],
        special["eos"] is not None and ids[-1] == special["eos"] and len(ids) > 1,
    )
    size = int(found.form.config["vocab_size"])
    words = vocabulary(json.loads(backend.to_str()), size, special, ends)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        words.keys["tokenizer.chat_template"] = template
    return words


def _dense(opened: Opened, out: Path, *, progress: Progress) -> dict[str, Any]:
    """Padded blocks, through the journal of pruning runs: a killed export goes on when it is repeated."""
    checkpoint, anatomy = opened.checkpoint, opened.anatomy
    config, stock = uniform(checkpoint.config, anatomy)
    marks = {
        "export": "dense",
        "secateur": secateur.__version__,
        "model_fingerprint": checkpoint.fingerprint(),
    }
    ends = [name for block in stock.blocks for name in (f"{block.prefix}.{own}" for own in block.parameters)]
    layout = FileLayout(stock, dict.fromkeys([*checkpoint.tensors, *ends]))
    with CheckpointWriter(out, checkpoint, marks, resume=True) as writer:
        if not writer.merged:
            _write_blocks(opened, writer, stock.blocks, layout, progress)
            names = [*opened.layout.outer_names(), *opened.layout.untouched]
            writer.write("outer", checkpoint.read(names), {})
            folder = writer.assemble(config_updates=config, removed=ADDED)
            (folder / REMOTE_CODE).unlink(missing_ok=True)
        writer.finish()
    padded = open_model(out)
    return {
        "parameters": padded.checkpoint.parameters,
        "parameters_before": checkpoint.parameters,
        "bytes": padded.checkpoint.nbytes,
        "bytes_before": checkpoint.nbytes,
        "notes": ["zeros were put where units are gone: it loads everywhere and is no faster than before"],
    }


def _write_blocks(
    opened: Opened, writer: CheckpointWriter, room: Any, layout: FileLayout, progress: Progress
) -> None:
    with progress.task("padding", len(room)) as task:
        for block, target in zip(opened.anatomy.blocks, room, strict=True):
            if part_name(block.index) not in writer.parts:
                stored = opened.checkpoint.read(opened.layout.block_names(block.index))
                own = opened.layout.assemble(block.index, stored)
                whole = pad_block(block, own, target, next(iter(own.values())).dtype)
                writer.write(part_name(block.index), layout.disassemble(block.index, whole), {})
            task.advance()
