"""Reads a data set into examples: a local JSON Lines, CSV or Parquet file, or a data set of the Hugging Face hub.

Not a judge of what a row holds: `example` is. An error names the file and the line, never what the line says; where
a library's own error could quote the text it is dropped, so that no traceback shows it. Imports `errors` and `example`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tidelock.data.example import KEYS, Example, parse_row
from tidelock.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # The line or row number (from 1) and the parsed row.
    Rows = Iterator[tuple[int, object]]

_ENDINGS = ".jsonl, .ndjson, .json, .csv (each also with .gz) or .parquet"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
# What looks like a file's name is never asked of the hub: `letters.jsonl` is private, and a typing error is likelier.
_FILE_ENDING = re.compile(r"\.(?:[A-Za-z]{2,8}|json5|bz2|7z)$")
_HUB_TIMEOUT_S = 10
_COLUMNS = frozenset({*KEYS, "split"})


def read_examples(data: str, *, split: str | None = None) -> list[Example]:
    """Return all examples of a data set, in its order.

    Args:
        data: A local file that ends in .jsonl, .ndjson, .json (JSON Lines all three), .csv (with a header), each
            also with .gz, or .parquet; or, if there is no such file, the name of a hub data set.
        split: Of a hub data set, the split (``train`` if not given). Of a file, keeps only the rows whose column
            ``split`` has this value (all rows if not given).

    Raises:
        DataError: There is no such data set, it cannot be read, it or the split is empty, or a row is malformed.
    """
    path = Path(data)
    if path.is_dir():
        msg = f"Data {data!r}: expected a file, got a folder. Name one file in it ({_ENDINGS})."
        raise DataError(msg)
    if path.exists():
        rows = _choose(_reader(path)(path), path.name, split)
        return [parse_row(row, source=path.name, line=line) for line, row in rows]
    if _HUB_NAME.fullmatch(data) is None or _FILE_ENDING.search(data) is not None:
        msg = f"Data {data!r}: expected a file or a hub data set such as org/name, got no file there. Check the path."
        raise DataError(msg)
    return _read_hub(data, split or "train")


def _reader(path: Path) -> Callable[[Path], Rows]:
    name = path.name.lower()
    ending = Path(name.removesuffix(".gz")).suffix
    if ending in {".jsonl", ".ndjson", ".json"}:
        return _json_rows
    if ending == ".csv":
        return _csv_rows
    if name.endswith(".parquet"):
        return _parquet_rows
    msg = f"Data {str(path)!r}: expected a name that ends in {_ENDINGS}, got another ending. Convert or rename it."
    raise DataError(msg)


def _choose(rows: Rows, name: str, split: str | None) -> list[tuple[int, object]]:
    everything = list(rows)
    if not everything:
        msg = f"Data {name!r}: expected at least one row, got none. Give a file that has some."
        raise DataError(msg)
    if split is None:
        return everything
    # A row that is no mapping stays, so that it is refused rather than skipped.
    chosen = [(line, row) for line, row in everything if not isinstance(row, Mapping) or row.get("split") == split]
    if not chosen:
        found = sorted({str(row["split"]) for _, row in everything if isinstance(row, Mapping) and row.get("split")})
        got = f"only {', '.join(map(repr, found[:10]))}" if found else "no column 'split'"
        msg = f"Data {name!r}: expected rows with split {split!r}, got {got}. Name one that exists, or none."
        raise DataError(msg)
    return chosen


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers and ends; only a line feed ends one, as JSON Lines has it."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, _decode(line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line, path.name, number)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        msg = f"Data {str(path)!r}: expected a whole gzip file, got other or damaged bytes. Compress it anew."
        raise DataError(msg) from None  # BadGzipFile quotes the first bytes
    except OSError as error:
        msg = f"Data {str(path)!r}: expected a readable file, got: {error.strerror}. Check it and its permissions."
        raise DataError(msg) from error


def _decode(line: bytes, name: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"another encoding at byte {error.start + 1}"
    # Raised out here because UnicodeDecodeError carries the line.
    msg = f"Line: expected UTF-8, got {got} ({name}:{number}). Save the file as UTF-8."
    raise DataError(msg)


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError):
        got = "a number too long or a nesting too deep"
    msg = f"JSON: expected one whole value, got {got} ({where}). Write one object a line, with no list around them."
    raise DataError(msg)


def _json_rows(path: Path) -> Rows:
    for number, line in _lines(path):
        if line.strip():
            yield number, _parse_json(line, f"{path.name}:{number}")


def _csv_rows(path: Path) -> Rows:
    records = _csv_records(path)
    first, header = next(records, (1, []))
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        msg = f"Header: expected column names that differ, got one twice ({path.name}:{first}). Rename or remove one."
        raise DataError(msg)
    for number, cells in records:
        where = f"{path.name}:{number}"
        if len(cells) != len(names):
            advice = "Put text with commas or line ends in double quotes."
            msg = f"Row: expected {len(names)} fields as in the header, got {len(cells)} ({where}). {advice}"
            raise DataError(msg)
        row: dict[str, object] = dict(zip(names, cells, strict=True))
        if "messages" in row:
            row["messages"] = _parse_json(str(row["messages"]), f"{where}, column 'messages'")
        if "text_a" in row and "label" in row:
            row["label"] = _number(str(row["label"]))
        yield number, row


def _number(text: str) -> float | str | None:
    """Return the number that a cell spells, nothing for an empty one; other text stays, so that it is refused."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    return text or None


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the records that are not blank, each with the number of the line where it begins."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    begins = 1
    try:
        for cells in reader:
            if cells:
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        msg = f"CSV: expected a well-formed record, got: {error} ({path.name}:{begins}). Check its quotes."
        raise DataError(msg) from None


def _parquet_rows(path: Path) -> Rows:
    # Loading pyarrow takes longer than everything else here together.
    import pyarrow  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            for batch in file.iter_batches(columns=columns or None):
                for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020 (counts on over batches)
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = type(error).__name__
        msg = f"Data {str(path)!r}: expected a whole Parquet file, got {kind} after row {number}. Write it anew."
        raise DataError(msg) from None


def _read_hub(name: str, split: str) -> list[Example]:
    # Loading datasets takes seconds, and a local file needs none of it.
    import datasets  # noqa: PLC0415
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415

    reason = ""
    try:
        # `load_dataset` alone repeats for half a minute when there is no network; this fails on the first try.
        snapshot_download(name, repo_type="dataset", allow_patterns="README.md", etag_timeout=_HUB_TIMEOUT_S)
        table = datasets.load_dataset(name, split=split)
        table = table.select_columns([column for column in table.column_names if column in KEYS])
        rows = list(enumerate(table, 1))
    except errors.LocalEntryNotFoundError:
        reason = "no answer from the hub, and no copy here of what it would send"
    except datasets.exceptions.DatasetGenerationError as error:
        reason = type(error).__name__  # its message and its cause can quote rows
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    if reason:
        tried = f"tried: local file {name}; hub data set {name}, split {split}"
        advice = "Check the name, the split, the network and your hub login, or give a local file."
        msg = f"Data {name!r}: expected a file or a hub data set, got: {reason} ({tried}). {advice}"
        raise DataError(msg)
    source = f"{name}[{split}]"
    return [parse_row(row, source=source, line=line) for line, row in _choose(iter(rows), source, None)]
