"""Read annotation files into columns: CSV, header-less text, JSON lists, JSON lines, Excel.

`read_annotations` takes a file's bytes and a set's formats and returns a `RawFile`: the recognised format, the columns
it uses as Python values, the place of each row, and rows that are malformed in themselves (ragged, not JSON, a repeated
key). `scores.py` checks the values. Nothing is guessed: the format is recognised by its columns, a header's names must
match exactly after blanks and a byte order mark are stripped, and a file without one best format is a `UserError`.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from tatar_dist.data.registry import BLANK, Dataset, Format
from tatar_dist.errors import UserError

MISSING = object()  # the row has no such key; JSON's null is None


class Bad(NamedTuple):
    """Why a row cannot be used: a short reason for counts, and a sentence for its error line."""

    reason: str
    text: str


@dataclass
class RawFile:
    """One annotation file: columns of n values each (text for CSV and text files, as stored for JSON and Excel)."""

    file: str
    kind: str
    format: Format
    columns: dict[str, list[Any]]
    rows: int
    where: Callable[[int], str]  # row -> "FILE:LINE" or "FILE: row N"
    bad: dict[int, Bad]

    def label(self, column: str) -> str:
        """Name a column as messages do."""
        return f"{'key' if self.kind in ('json', 'jsonl') else 'column'} {column}"

    def reject(self, row: int, reason: str, text: str) -> None:
        """Mark a row as bad, unless it is already: its first fault counts."""
        self.bad.setdefault(int(row), Bad(reason, text))


class AnnotationRows(NamedTuple):
    """Rows of a file before its format is known. `header`: names, None for files without a header."""

    kind: str
    header: list[str] | None
    rows: list[Any]  # lists of values, or dicts for JSON
    where: Callable[[int], str]
    bad: dict[int, Bad]


def read_annotations(
    data: bytes, file: str, dataset: Dataset, format_name: str | None = None, encoding: str | None = None
) -> RawFile:
    """Read one file's bytes into columns. `file` is its name in messages.

    Raises:
        UserError: empty, not text in `encoding` (default UTF-8), malformed JSON, CSV or Excel, columns that fit no
            format of the set or more than one.
    """
    wanted = [dataset.format(format_name)] if format_name else list(dataset.formats.values())
    rows = parse(data, file, encoding, wanted)
    fmt = _recognise(rows, file, dataset, wanted)
    if not rows.rows:
        raise UserError(f"{file}: there are no rows under the header")
    if rows.kind in ("json", "jsonl"):
        columns = {c: [r.get(c, MISSING) if isinstance(r, dict) else MISSING for r in rows.rows] for c in fmt.used()}
        return RawFile(file, rows.kind, fmt, columns, len(rows.rows), rows.where, rows.bad)
    header = list(fmt.columns) if rows.header is None else rows.header
    for name in fmt.used():
        if header.count(name) > 1:
            raise UserError(f"{file}: the header has column {name!r} {header.count(name)} times")
    width = len(header)
    for i, row in enumerate(rows.rows):
        if len(row) != width:
            rows.bad.setdefault(i, Bad("ragged row", f"{len(row)} values where {width} are due"))
            rows.rows[i] = [*row, *[""] * width][:width]
    transposed = list(zip(*rows.rows, strict=True))
    columns = {name: list(transposed[header.index(name)]) for name in fmt.used()}
    return RawFile(file, rows.kind, fmt, columns, len(rows.rows), rows.where, rows.bad)


def parse(data: bytes, file: str, encoding: str | None, formats: Sequence[Format]) -> AnnotationRows:
    """Parse bytes into rows by their content; the formats' signatures decide between CSV and header-less text."""
    if data[:4] == b"PK\x03\x04":
        return _xlsx(data, file)
    text = decode(data, file, encoding)
    first = text.lstrip()[:1]
    if not first:
        raise UserError(f"{file}: the file is empty")
    if first == "[":
        return _json_list(text, file)
    if first == "{":
        return _json_lines(text, file)
    line = next(line for line in text.split("\n") if line.strip()).rstrip("\r")
    try:
        names = [c.strip() for c in next(csv.reader([line]), [])]
    except csv.Error:
        names = []
    if not any("text" not in f.kind and set(f.columns) <= set(names) for f in formats):
        for fmt in (f for f in formats if "text" in f.kind and len(_split(line, f.separator)) == len(f.columns)):
            return _plain_text(text, file, fmt.separator)
    return _csv(text, file)


def decode(data: bytes, file: str, encoding: str | None) -> str:
    """Decode the bytes, without a byte order mark. Raises UserError with byte and line, suggesting --encoding."""
    name = encoding or "utf-8"
    try:
        if not codecs.lookup(name)._is_text_encoding:
            raise LookupError
        text = data.decode(name)
    except LookupError:
        raise UserError(f"--encoding {name}: no such text encoding (latin-1, cp1252, utf-16, gb18030, …)") from None
    except UnicodeError as e:
        start = getattr(e, "start", 0)
        line = data.count(b"\n", 0, start) + 1
        byte = f" (0x{data[start]:02x})" if start < len(data) else ""
        wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        hint = "utf-16" if wide else "latin-1 or another that fits" if encoding is None else "another"
        at = f"{file}:{line}: byte {start + 1} of the file{byte} is not {name.upper()}"
        raise UserError(f"{at}; name the encoding with --encoding {hint}") from None
    return text.removeprefix("\ufeff")


def _csv(text: str, file: str) -> AnnotationRows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as e:
        raise UserError(f"{file}:{reader.line_num}: broken CSV: {e}") from None
    header_at = next((i for i, row in enumerate(rows) if any(v.strip() for v in row)), None)
    if header_at is None:
        raise UserError(f"{file}: the file is empty")
    kept = [i for i in range(header_at + 1, len(rows)) if len(rows[i]) > 1 or any(v.strip() for v in rows[i])]

    def lines() -> list[int]:
        again = csv.reader(io.StringIO(text, newline=""), strict=True)
        ends = [0, *(again.line_num for _ in again)]  # a quoted value may span lines
        return [ends[i] + 1 for i in kept]

    return AnnotationRows(
        "csv", [name.strip() for name in rows[header_at]], [rows[i] for i in kept], _place(file, lines), {}
    )


def _place(file: str, lines: Callable[[], list[int]]) -> Callable[[int], str]:
    """Map a row to FILE:LINE. `lines` of all rows are counted once, for the first message: most files have no fault."""
    counted = cache(lines)
    return lambda i: f"{file}:{counted()[i]}"


def _plain_text(text: str, file: str, separator: str) -> AnnotationRows:
    lines = text.split("\n")
    kept = [i for i, line in enumerate(lines) if line.strip()]
    rows = [_split(lines[i], separator) for i in kept]
    return AnnotationRows("text", None, rows, lambda i: f"{file}:{kept[i] + 1}", {})


def _split(line: str, separator: str) -> list[str]:
    return line.split() if separator == BLANK else line.rstrip("\r\n").split(separator)


class _RepeatedKey(dict[str, Any]):
    """A JSON object that has `key` twice."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        values = _RepeatedKey(values)
        values.key = next(key for key in keys if keys.count(key) > 1)
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # the rows of a list
_BROKEN = (ValueError, RecursionError)  # ValueError also for integers of thousands of digits


def _bad_objects(rows: list[Any]) -> dict[int, Bad]:
    """Return the rows that are no JSON objects, or objects with a repeated key."""
    bad = {}
    for i, row in enumerate(rows):
        if isinstance(row, _RepeatedKey):
            bad[i] = Bad("repeated key", f"key {row.key!r} is given twice")
        elif not isinstance(row, dict):
            bad[i] = Bad("wrong type", f"the row is {json_type(row)}, must be an object")
    return bad


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} (column {error.colno})"
    return f"broken JSON: {str(error).split(';')[0]}"


def _json_list(text: str, file: str) -> AnnotationRows:
    try:
        rows = _DECODER.decode(text)
    except _BROKEN as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(f"{file}{line}: {_reason(e)}") from None

    def lines() -> list[int]:
        starts, line, counted, at = [], 1, 0, text.index("[") + 1
        for _ in rows:
            start = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it also matches the empty string
            line += text.count("\n", counted, start)
            starts.append(line)
            counted, at = start, _DECODER.raw_decode(text, start)[1]
        return starts

    return AnnotationRows("json", None, rows, _place(file, lines), _bad_objects(rows))


def _json_lines(text: str, file: str) -> AnnotationRows:
    lines = text.split("\n")
    kept = [i for i, line in enumerate(lines) if line.strip()]
    rows: list[Any] = []
    broken: dict[int, Bad] = {}
    for i, k in enumerate(kept):
        try:
            rows.append(_DECODER.decode(lines[k]))
        except _BROKEN as e:
            if i == 0 and _is_one_object(text):
                raise UserError(f"{file}: one JSON object; rows must be a JSON list or one object a line") from None
            rows.append({})
            broken[i] = Bad("broken JSON", _reason(e))
    return AnnotationRows("jsonl", None, rows, lambda i: f"{file}:{kept[i] + 1}", broken | _bad_objects(rows))


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(_DECODER.decode(text), dict)
    except _BROKEN:
        return False


def _xlsx(data: bytes, file: str) -> AnnotationRows:
    from openpyxl import load_workbook

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            if sum(part.file_size for part in parts.infolist()) > XLSX_LIMIT:
                raise UserError(f"{file}: the workbook unpacks to more than {XLSX_LIMIT >> 20} MiB; save it as CSV")
        sheet = load_workbook(io.BytesIO(data), read_only=True, data_only=True).worksheets[0]
        rows = [list(row) for row in sheet.iter_rows(values_only=True)]
    except UserError:
        raise
    except Exception as e:  # a damaged workbook raises whatever its part of zip, XML or openpyxl meets first
        raise UserError(f"{file}: not a readable Excel workbook: {type(e).__name__}: {e}") from None
    header_at = next((i for i, row in enumerate(rows) if any(v is not None for v in row)), None)
    if header_at is None:
        raise UserError(f"{file}: the first sheet is empty")
    header = ["" if v is None else str(v).strip() for v in rows[header_at]]
    while header and not header[-1]:
        header.pop()
    kept = [i for i in range(header_at + 1, len(rows)) if any(v is not None for v in rows[i])]
    values = [rows[i] + [None] * (len(header) - len(rows[i])) for i in kept]
    for row in values:  # empty cells to the right of the header come from the sheet's dimensions; they are not values
        while len(row) > len(header) and row[-1] is None:
            row.pop()
    return AnnotationRows("xlsx", header, values, lambda i: f"{file}: row {kept[i] + 1}", {})


XLSX_LIMIT = 512 << 20  # bytes unpacked; SPAQ's workbook is about 2 MiB


def _recognise(rows: AnnotationRows, file: str, dataset: Dataset, wanted: list[Format]) -> Format:
    """Return the format whose columns the file has; of several, the one whose columns include those of the others."""
    there = rows.header or []
    if rows.kind in ("json", "jsonl"):
        if not rows.rows:
            raise UserError(f"{file}: the list is empty")
        # Keys of all rows: the first row may lack a rationale that others have.
        there = list(dict.fromkeys(key for row in rows.rows if isinstance(row, dict) for key in row))
        if not there:
            i = min(rows.bad, default=0)
            reason = rows.bad[i].text if rows.bad else "the row is an empty object"
            raise UserError(f"{rows.where(i)}: {reason}; no row of the file can be read")
    possible = [f for f in wanted if rows.kind in f.kind]
    if rows.kind == "text":
        fits = [f for f in possible if len(f.columns) == len(rows.rows[0])]
    else:
        fits = [f for f in possible if set(f.columns) <= set(there)]
    best = [f for f in fits if all(set(g.columns) <= set(f.columns) for g in fits)]
    if len(best) == 1:
        return best[0]
    if fits:
        names = ", ".join(f"{f.name} ({f.score or 'votes'} on {f.range})" for f in best or fits)
        raise UserError(f"{file}: its columns fit more than one format of {dataset.name}: {names}; say --format NAME")
    raise UserError(f"{file}: {_no_fit(rows, there, dataset, wanted, possible)}")


def _no_fit(
    rows: AnnotationRows, there: list[str], dataset: Dataset, wanted: list[Format], possible: list[Format]
) -> str:
    """Say why no format of the set fits: which columns the nearest one lacks."""
    if not possible:
        known = "; ".join(f"{f.name}: {'/'.join(f.kind)}" for f in wanted)
        return f"looks like {rows.kind}, in which {dataset.name} has no format ({known})"
    if rows.kind == "text":
        return f"its lines have {len(rows.rows[0])} fields, which fits no format of {dataset.name}"
    nearest = min(possible, key=lambda f: len(set(f.columns) - set(there)))
    by_folded = {name.casefold(): name for name in reversed(there)}
    lacking = []
    for name in (c for c in nearest.columns if c not in there):
        similar = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=0.75)
        lacking.append(f"{name!r}" + (f" (there is {by_folded[similar[0]]!r})" if similar else ""))
    shown = ", ".join(map(repr, there[:12])) + (", …" if len(there) > 12 else "")
    hint = ""
    if rows.kind == "csv" and len(there) == 1 and (";" in there[0] or "\t" in there[0]):
        hint = "; columns must be separated by commas"
    if rows.kind == "csv":
        hint += "".join(f"; nor lines of {len(f.columns)} fields, as in {f.name}" for f in wanted if "text" in f.kind)
    what = "missing column" if rows.kind in ("csv", "xlsx") else "missing key"
    return f"{what} {', '.join(lacking)} of format {nearest.name}; found {shown}{hint}"


def json_type(value: Any) -> str:
    """Name the JSON type of a value, for messages."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "null")
