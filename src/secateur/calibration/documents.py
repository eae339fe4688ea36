"""Where calibration text comes from: text, JSON and Parquet files, data sets of the hub.

Readers are generators: nothing is read before, and no more than, what is taken from them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from secateur.core.errors import CalibrationError, MissingExtraError, did_you_mean

__all__ = ["is_hub_name", "read_hub", "read_json", "read_parquet", "read_text"]

PIECE_CHARACTERS = 1 << 20
ROWS_AT_ONCE = 256
HUB_NAME = re.compile(r"(?P<path>[\w-][\w.-]*/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[^:/]+))?")


def is_hub_name(spec: str) -> bool:
    """Whether a specification reads `owner/name[/configuration][:split]`."""
    return HUB_NAME.fullmatch(spec) is not None


def read_text(path: Path) -> Iterator[str]:
    """Pieces of a UTF-8 file (a byte order mark is dropped). Raises `CalibrationError` at a bad byte."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE_CHARACTERS):
                yield piece
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def read_json(path: Path, column: str | None) -> Iterator[str]:
    """Documents of a file of JSON lines, or of one JSON array, in order.

    Raises:
        CalibrationError: a line that is no JSON, a record without the column, bytes that are not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            records = _array(file.read(), path) if start == "[" else _lines(file, path)
            yield from _column_of(records, str(path), column)
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def read_parquet(path: Path, column: str | None) -> Iterator[str]:
    """Documents of a Parquet file, read by row groups. Raises `CalibrationError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise CalibrationError(f"{path} is not a readable Parquet file", "", str(error)) from error
    with file:
        schema = file.schema_arrow
        strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        name = _choose(column, strings, schema.names, str(path))
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[name]):
            yield from (value for value in batch.column(0).to_pylist() if value)


def read_hub(name: str, column: str | None) -> Iterator[str]:
    """Documents of a hub data set `owner/name[/configuration][:split]` (split `train` by default), streamed.

    Raises:
        MissingExtraError: the package `datasets` is not installed.
        CalibrationError: no such data set, configuration, split or column.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError("datasets", "data", "calibration data sets of the hub") from error
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise CalibrationError(f"data set {name!r}", "owner/name[/configuration][:split]")
    try:
        rows = load_dataset(match["path"], match["config"], split=match["split"] or "train", streaming=True)
        yield from _column_of(rows, name, column)
    except (OSError, ValueError, LookupError) as error:
        raise CalibrationError(
            f"data set {name!r} cannot be read ({_first_line(error)})",
            "owner/name[/configuration][:split]",
            "check its name on the hub and the network, or give a local file",
        ) from error


def _lines(file: Iterable[str], path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _parse(line, f"line {number} of {path}")


def _array(text: str, path: Path) -> list[Any]:
    records: list[Any] = _parse(text, str(path))
    return records


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{where} is not JSON ({error.msg} at character {error.pos})",
            "one JSON record a line, or an array",
        ) from error


def _column_of(records: Iterable[Any], where: str, column: str | None) -> Iterator[str]:
    """The text of each record: the string itself, or its column (chosen once, from the first record)."""
    stream = iter(records)
    first = next(stream, None)
    if first is None:
        return
    take = _taker(first, where, column)
    for number, record in enumerate(chain([first], stream), 1):
        text = take(record)
        if text is not None and not isinstance(text, str):
            raise CalibrationError(f"record {number} of {where} holds {_kind(text)}", "a string")
        if text:
            yield text


def _taker(first: Any, where: str, column: str | None) -> Callable[[Any], Any]:
    if isinstance(first, str) and column is None:
        return lambda record: record
    if not isinstance(first, Mapping):
        raise CalibrationError(
            f"the records of {where} are {_kind(first)}", f"objects with a column {column or 'text'!r}"
        )
    strings = [key for key, value in first.items() if isinstance(value, str)]
    name = _choose(column, strings, list(first), where)
    return lambda record: record.get(name) if isinstance(record, Mapping) else record


def _choose(asked: str | None, strings: list[str], columns: list[str], where: str) -> str:
    """The column asked for, else `text`, else the only one that holds strings."""
    if asked is not None and asked not in columns:
        raise CalibrationError(f"column {asked!r} is not in {where}", "", did_you_mean(asked, columns))
    if asked is not None:
        return asked
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise CalibrationError(
        f"{where} has the columns {', '.join(columns) or '(none)'}",
        "one named 'text' or only one that holds strings",
        "name one with --column",
    )


def _kind(value: object) -> str:
    return {dict: "an object", list: "an array", bool: "a boolean"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _not_utf8(path: Path) -> CalibrationError:
    return CalibrationError(
        f"{path} is not UTF-8: byte {_bad_byte(path)} cannot be decoded",
        "UTF-8 text",
        "convert it, for example with iconv",
    )


def _bad_byte(path: Path) -> int:
    """Offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    with path.open("rb") as file:
        while chunk := file.read(PIECE_CHARACTERS):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return consumed - pending + error.start
            consumed += len(chunk)
    return consumed - len(decoder.getstate()[0])
