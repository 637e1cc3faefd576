"""Read annotation files into columns: CSV, header-less text, JSON lists, JSON lines, Excel.

`read_annotations` takes a file's bytes and a set's formats and returns a `RawFile`: the recognised format, the columns
it uses as Python values, the place of each row, and rows that are malformed in themselves (ragged, not JSON, a repeated
key). `rows.py` checks the values. Nothing is guessed: the format is recognised by its columns, a header's names must
match exactly after blanks and a byte order mark are stripped, and a file without one best format is a `UserError`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tatar_dist.data.registry import BLANK, Dataset, Format
from tatar_dist.errors import UserError

# how files that hold no text begin, and what makes text of them
SIGNATURES: dict[bytes, tuple[str, str]] = {
    b"PAR1": ("a Parquet file", "pandas.read_parquet(FILE).to_csv(...)"),
    b"MATLAB 5.0": ("a MATLAB file", "scipy.io.loadmat(FILE), then write its arrays as CSV"),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file (also MATLAB 7.3)", "h5py.File(FILE), then write its arrays as CSV"),
    b"\x93NUMPY": ("a NumPy array", "numpy.load(FILE), then numpy.savetxt(...)"),
    **{
        b"\x80" + bytes([n]): ("a Python pickle", "pandas.read_pickle(FILE).to_csv(...), if you trust it")
        for n in range(2, 6)
    },
    b"\xd0\xcf\x11\xe0": ("an Excel file of the old format", "save it as .xlsx or CSV"),
    b"\x1f\x8b": ("compressed by gzip", "gunzip FILE"),
    b"BZh": ("compressed by bzip2", "bunzip2 FILE"),
    b"\xfd7zXZ": ("compressed by xz", "unxz FILE"),
    b"7z\xbc\xaf": ("a 7-Zip archive", "unpack it and give the annotation file in it"),
    b"Rar!": ("a RAR archive", "unpack it and give the annotation file in it"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"%PDF": ("a PDF document", "export the table as CSV"),
    b"\x89PNG": ("a picture", "give the file with the annotations"),
    b"\xff\xd8\xff": ("a picture", "give the file with the annotations"),
}
MISSING = object()  # the row has no such key; JSON's null is None


class Bad(NamedTuple):
    """Why a row cannot be used: a short reason for counts, and a sentence for its error line."""

    reason: str
    text: str


@dataclass
class AnnotationRows:
    """Rows of a file before its format is known."""

    kind: str
    header: list[str]  # column names, of JSON the keys of all rows; empty for text, which has no header
    rows: list[Any]  # lists of values, or dicts for JSON
    at: list[str]  # FILE:LINE of each row, "FILE: row N" for Excel
    bad: dict[int, Bad]

    def check(self) -> None:
        """Raise UserError for the first malformed row."""
        if self.bad:
            i = min(self.bad)
            raise UserError(f"{self.at[i]}: {self.bad[i].text}")


@dataclass
class RawFile:
    """One annotation file: columns of n values (text for CSV and text files, else as stored)."""

    file: str
    kind: str
    format: Format
    columns: dict[str, list[Any]]
    at: list[str]  # as in AnnotationRows
    bad: dict[int, Bad]

    def __len__(self) -> int:
        return len(self.at)

    def label(self, column: str) -> str:
        """Name a column as messages do."""
        return f"{'key' if self.kind in ('json', 'jsonl') else 'column'} {column}"

    def reject(self, row: int, reason: str, text: str) -> None:
        """Mark a row as bad, unless it is already: its first fault counts."""
        self.bad.setdefault(int(row), Bad(reason, text))


def read_annotations(
    data: bytes, file: str, dataset: Dataset, format_name: str | None = None, encoding: str | None = None
) -> RawFile:
    """Read a file's bytes into columns. `file`: name in messages; `encoding`: UTF-8 by default.

    Raises UserError for a file that is empty or malformed, or whose columns do not fit exactly one format of the set.
    """
    wanted = [dataset.format(format_name)] if format_name else list(dataset.formats.values())
    parsed = parse(data, file, encoding, wanted)
    fmt = _recognise(parsed, file, dataset, wanted)
    rows, bad = parsed.rows, parsed.bad
    if not rows:
        raise UserError(f"{file}: there are no rows under the header")
    if parsed.kind in ("json", "jsonl"):
        columns = {c: [r.get(c, MISSING) if isinstance(r, dict) else MISSING for r in rows] for c in fmt.used()}
        return RawFile(file, parsed.kind, fmt, columns, parsed.at, bad)
    header = parsed.header or list(fmt.columns)
    for name in fmt.used():
        if header.count(name) > 1:
            raise UserError(f"{file}: the header has column {name!r} {header.count(name)} times")
    width = len(header)
    for i, row in enumerate(rows):
        if len(row) != width:
            bad[i] = Bad("ragged row", f"{len(row)} values where {width} are due")
            rows[i] = [*row, *[""] * width][:width]
    transposed = list(zip(*rows, strict=True))
    columns = {name: list(transposed[header.index(name)]) for name in fmt.used()}
    return RawFile(file, parsed.kind, fmt, columns, parsed.at, bad)


def parse(data: bytes, file: str, encoding: str | None, formats: Sequence[Format]) -> AnnotationRows:
    """Parse bytes into rows by content; the formats' signatures tell CSV from header-less text."""
    if data[:4] == b"PK\x03\x04":
        return _xlsx(data, file)
    for start, (kind, remedy) in SIGNATURES.items():
        if data.startswith(start):
            raise UserError(
                f"{file}: {kind}, not annotations as text; convert it first: {remedy.replace('FILE', file)}"
            )
    text = decode(data, file, encoding)
    first = text.lstrip()[:1]
    if not first:
        raise UserError(f"{file}: the file is empty")
    if first == "[":
        return _json_list(text, file)
    if first == "{":
        return _json_lines(text, file)
    line = next(line for line in text.split("\n") if line.strip())
    names = {name.strip('" \t\r') for name in line.split(",")}
    if not any("text" not in f.kind and names.issuperset(f.columns) for f in formats):
        for fmt in formats:
            if "text" in fmt.kind and len(_split(line, fmt.separator)) == len(fmt.columns):
                return _plain_text(text, file, fmt.separator)
    return _csv(text, file)


def decode(data: bytes, file: str, encoding: str | None) -> str:
    """Decode bytes, dropping a byte order mark. Raises UserError with byte, line and --encoding."""
    name = encoding or "utf-8"
    try:
        return data.decode(name).removeprefix("\ufeff")
    except LookupError:
        raise UserError(f"--encoding {name}: no such text encoding (latin-1, cp1252, utf-16, gb18030, …)") from None
    except UnicodeError as e:
        start = getattr(e, "start", 0)
        line = data.count(b"\n", 0, start) + 1
        byte = f"byte {start + 1} of the file (0x{data[start : start + 1].hex()})"
        hint = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1 or another that fits"
        raise UserError(
            f"{file}:{line}: {byte} is not {name.upper()}; name the encoding with --encoding {hint}"
        ) from None


def _csv(text: str, file: str) -> AnnotationRows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    at, start = [], 1  # a quoted value may span lines: `start` is the line where a row begins
    try:
        for row in reader:
            if (rows and len(row) > 1) or any(value.strip() for value in row):  # the header is the first row with names
                rows.append(row)
                at.append(f"{file}:{start}")
            start = reader.line_num + 1
    except csv.Error as e:
        raise UserError(f"{file}:{reader.line_num}: broken CSV: {e}") from None
    if not rows:
        raise UserError(f"{file}: the file is empty")
    return AnnotationRows("csv", [name.strip() for name in rows[0]], rows[1:], at[1:], {})


def _plain_text(text: str, file: str, separator: str) -> AnnotationRows:
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [_split(line, separator) for _, line in lines]
    return AnnotationRows("text", [], rows, [f"{file}:{n}" for n, _ in lines], {})


def _split(line: str, separator: str) -> list[str]:
    return line.split() if separator == BLANK else line.rstrip("\r\n").split(separator)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Bad:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    keys = [key for key, _ in pairs]
    return Bad("repeated key", f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # the rows of a list
XLSX_LIMIT = 512 << 20  # bytes unpacked; SPAQ's workbook is about 2 MiB
_BROKEN = (ValueError, RecursionError)  # ValueError also for integers of thousands of digits


def _broken(error: Exception) -> str:
    column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return f"broken JSON: {str(getattr(error, 'msg', error)).split(';')[0]}{column}"


def _json_list(text: str, file: str) -> AnnotationRows:
    try:
        rows = _DECODER.decode(text)
    except _BROKEN as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(f"{file}{line}: {_broken(e)}") from None
    if not rows:
        raise UserError(f"{file}: the list is empty")
    lines, previous, end = [1], 0, text.index("[") + 1
    for _ in rows:  # once more, for the line on which each row begins
        start = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]  # it also matches the empty string
        lines.append(lines[-1] + text.count("\n", previous, start))
        previous, end = start, _DECODER.raw_decode(text, start)[1]
    return _json_rows("json", rows, [f"{file}:{line}" for line in lines[1:]])


def _json_lines(text: str, file: str) -> AnnotationRows:
    rows: list[Any] = []
    at = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            at.append(f"{file}:{n}")
            try:
                rows.append(_DECODER.decode(line))
            except _BROKEN as e:
                rows.append(Bad("broken JSON", _broken(e)))
    return _json_rows("jsonl", rows, at)


def _json_rows(kind: str, rows: list[Any], at: list[str]) -> AnnotationRows:
    bad = {}
    for i, row in enumerate(rows):
        if isinstance(row, Bad):
            bad[i] = row
        elif not isinstance(row, dict):
            bad[i] = Bad("wrong type", f"the row is {json_type(row)}, must be an object")
    # Keys of all rows: the first row may lack a rationale that others have.
    keys = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    if not keys:
        reason = bad[0].text if 0 in bad else "the row is an empty object"
        raise UserError(f"{at[0]}: {reason}; no row can be read: write a JSON list of objects, or one object a line")
    return AnnotationRows(kind, keys, rows, at, bad)


def _xlsx(data: bytes, file: str) -> AnnotationRows:
    from openpyxl import load_workbook

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            size = sum(part.file_size for part in parts.infolist())
            inside = [part.filename for part in parts.infolist()]
        if not any(name.startswith("xl/") for name in inside):
            first = f", such as {inside[0]}" if inside else ""
            raise UserError(f"{file}: a ZIP archive: unpack it and give the annotation file in it{first}")
        if size > XLSX_LIMIT:
            raise UserError(f"{file}: the workbook unpacks to more than {XLSX_LIMIT >> 20} MiB; save it as CSV")
        sheet = load_workbook(io.BytesIO(data), read_only=True, data_only=True).worksheets[0]
        cells = [list(row) for row in sheet.iter_rows(values_only=True)]
    except UserError:
        raise
    except Exception as e:  # a damaged workbook raises whatever its part of zip, XML or openpyxl meets first
        raise UserError(f"{file}: not a readable Excel workbook: {type(e).__name__}: {e}") from None
    rows = [(n, row) for n, row in enumerate(cells, 1) if any(value is not None for value in row)]
    if not rows:
        raise UserError(f"{file}: the first sheet is empty")
    for _, row in rows:  # empty cells at the end come from the sheet's dimensions; they are not values
        while row[-1] is None:
            row.pop()
    header = ["" if name is None else str(name).strip() for name in rows[0][1]]
    values = [row + [None] * (len(header) - len(row)) for _, row in rows[1:]]
    return AnnotationRows("xlsx", header, values, [f"{file}: row {n}" for n, _ in rows[1:]], {})


def _recognise(parsed: AnnotationRows, file: str, dataset: Dataset, wanted: list[Format]) -> Format:
    """Return the format whose columns the file has; of several, the one including the others."""
    possible = [f for f in wanted if parsed.kind in f.kind]
    if parsed.kind == "text":
        fits = [f for f in possible if len(f.columns) == len(parsed.rows[0])]
    else:
        fits = [f for f in possible if set(f.columns) <= set(parsed.header)]
    best = [f for f in fits if all(set(g.columns) <= set(f.columns) for g in fits)]
    if len(best) == 1:
        return best[0]
    if fits:
        names = ", ".join(f"{f.name} ({f.score or 'votes'} on {f.range})" for f in best or fits)
        raise UserError(f"{file}: its columns fit more than one format of {dataset.name}: {names}; say --format NAME")
    if not possible:
        known = "; ".join(f"{f.name}: {'/'.join(f.kind)}" for f in wanted)
        raise UserError(f"{file}: looks like {parsed.kind}, in which {dataset.name} has no format ({known})")
    raise UserError(f"{file}: {_lacking(parsed, wanted, possible)}")


def _lacking(parsed: AnnotationRows, wanted: list[Format], possible: list[Format]) -> str:
    """Name the columns that the file lacks for the nearest possible format."""
    there = parsed.header
    nearest = min(possible, key=lambda f: len(set(f.columns) - set(there)))
    lacking = ", ".join(repr(name) for name in nearest.columns if name not in there)
    shown = ", ".join(map(repr, there[:12])) + (", …" if len(there) > 12 else "")
    text = "".join(f"; nor lines of {len(f.columns)} fields, as in {f.name}" for f in wanted if "text" in f.kind)
    what = "columns" if parsed.kind in ("csv", "xlsx") else "keys"
    return f"format {nearest.name} needs {what} {lacking}, the file has {shown}{text if parsed.kind == 'csv' else ''}"


def json_type(value: Any) -> str:
    """Name the type of a value as JSON does, for messages."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
