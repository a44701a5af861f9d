"""The rows of a file: JSON Lines, JSON, CSV or Parquet, packed by gzip or not. A row that cannot be read is named."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.text import first_line

DELIMITERS = ",;\t"  # of CSV, which spreadsheets write with semicolons where commas are for decimals
NO_VALUE = {"nan", "NaN"}  # as pandas writes an empty cell


class Row(NamedTuple):
    place: str  # "train.jsonl, line 3"
    columns: Any  # a dict, if the file is as it should be
    fault: str = ""  # why there are no columns


def can_read(path: Path) -> bool:
    """By its name."""
    return _kind(path) in READERS


def suffixes() -> str:
    *most, last = READERS
    return f"{', '.join(most)} or {last}, or with .gz behind it"


def read_file(path: Path, name: str) -> Iterator[Row]:
    """name: what the places of the rows begin with. Raises ChatError if the file cannot be read at all."""
    try:
        yield from READERS[_kind(path)](path, name)
    except UnicodeDecodeError as error:
        raise ChatError(
            f"{path} is not in UTF-8 ({first_line(error)}). Save it in UTF-8, which Excel calls CSV UTF-8."
        ) from error
    except (OSError, ValueError, RecursionError, EOFError, zlib.error, csv.Error) as error:  # pyarrow's are among them
        raise ChatError(f"{path} cannot be read ({first_line(error)}).") from error


def numbered(name: str, rows: Iterable[Any]) -> Iterator[Row]:
    yield from (Row(f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def numbered_of_table(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """The same of rows that Arrow holds: what is in their columns has all fields that the others have there, with None
    for those that it does not, so that each call of a tool would have the arguments of all tools."""
    yield from numbered(name, ({column: _own(value) for column, value in row.items()} for row in rows))


def _own(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _own(field) for name, field in value.items() if field is not None}
    return [_own(each) for each in value] if isinstance(value, list) else value


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]  # a GzipFile


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as file:
        is_list = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    yield from (_read_json if is_list else _read_lines)(path, name)  # a JSON list is often called .jsonl


def _read_lines(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{name}, line {number}"
            try:
                yield Row(place, json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                yield Row(place, None, f"it is not JSON in UTF-8 ({first_line(error)}).")


def _read_json(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" and _kind(path) == ".json":
            raise
        yield from _read_lines(path, name)  # JSON Lines are often called .json
        return
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    yield from numbered(name, rows if isinstance(rows, list) else [rows])


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    """A row with a stray quote costs itself alone: what follows it on other lines is read anew.

    As spreadsheets write it, too: with semicolons or tabs, in UTF-16, with a line "sep=;", and with empty cells around
    the table.
    """
    csv.field_size_limit(2**30)  # 128 KB otherwise, which a long conversation exceeds
    with _open(path) as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        lines = _Lines(io.TextIOWrapper(file, "utf-16" if is_utf16 else "utf-8-sig", newline=""))
        reader = csv.reader(
            lines, delimiter=_delimiter(lines, "\t" if _kind(path) == ".tsv" else DELIMITERS), strict=True
        )
        head = _filled([cell.strip() for cell in next(reader, [])])
        if twice := [column for column in head if column and head.count(column) > 1]:
            raise ChatError(f"{path} has two columns called {twice[0]!r:.60}. Rename one of them.")
        while True:
            place = f"{name}, line {lines.begin()}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                lines.give_back()
                yield Row(place, None, f"it is not CSV ({first_line(error)}); a quote within quotes is written twice.")
                continue
            if cells is None:
                return
            cells = _filled(cells, len(head))
            if cells and len(cells) != len(head):
                count = "more" if len(cells) > len(head) else "fewer"
                yield Row(place, None, f"it has {count} columns than the first line names.")
            elif cells:
                values = (None if cell in NO_VALUE else cell for cell in cells)
                yield Row(place, dict(zip(head, values, strict=True)))


def _delimiter(lines: _Lines, delimiters: str) -> str:
    """That of these by which the first line with text names most columns. A line that says which it is, as Excel takes
    it, and lines without text before the table are taken off."""
    first = next(lines, "")
    if first.lower().startswith("sep=") and len(first.rstrip("\r\n")) == 5:
        return first[4]
    while first and not first.strip(f"{DELIMITERS} \r\n"):
        first = next(lines, "")
    if first:
        lines.take_back(first)
    return max(delimiters, key=lambda each: len(next(csv.reader([first], delimiter=each), [])))


def _filled(cells: list[str], least: int = 0) -> list[str]:
    """Without empty cells at the end, as far as there are more than the least; none of a row that is empty."""
    if not any(cells):
        return []
    return cells[: max(least, *(place for place, cell in enumerate(cells, 1) if cell))]


class _Lines:
    """The lines of a CSV file, of which all but the first of a row can be given back."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = iter(lines)
        self.ahead: deque[str] = deque()  # given back
        self.taken: list[str] = []  # of this row
        self.number = 0  # of lines read

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.ahead.popleft() if self.ahead else next(self.lines)
        self.number += 1
        self.taken.append(line)
        return line

    def begin(self) -> int:
        """A row begins. Returns the number of its first line."""
        self.taken = []
        return self.number + 1

    def take_back(self, line: str) -> None:
        """Let the latest line be the next one again."""
        self.ahead.appendleft(line)
        self.number -= 1

    def give_back(self) -> None:
        self.ahead.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from numbered_of_table(name, (row for batch in file.iter_batches() for row in batch.to_pylist()))


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
