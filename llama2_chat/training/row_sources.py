"""Rows of conversations where they lie: a JSONL, JSON, CSV or Parquet file, a folder of them, a data set on the Hub.

What a row says is row_formats.py's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.text import first_line


class Row(NamedTuple):
    place: str  # "train.jsonl, line 3"
    columns: Any  # a dict, if the file is as it should be
    fault: str = ""  # why there are no columns


class Part(NamedTuple):
    """A file or a split on the Hub."""

    name: str
    rows: Iterator[Row]  # read as they are asked for


def read_parts(name: str) -> Iterator[Part]:
    """Of a file, a folder or a data set on the Hub. Raises ChatError if there is none, or if it cannot be read."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise ChatError(f"The folder {name} has no file that ends with {_suffixes()}.")
        yield from (Part(file.stem, _read_file(file)) for file in files)
    elif path.is_file() and path.suffix.lower() in READERS:
        yield Part("train", _read_file(path))  # by itself it is the train split, whatever it is called
    elif path.is_file():
        raise ChatError(f"{name} is not a file that ends with {_suffixes()}.")
    elif path.suffix.lower() in READERS or name.startswith((".", "/", "~")):
        raise ChatError(f"There is no file or folder {name}. Check --dataset_name.")
    else:
        yield from read_hub(name)


def read_hub(name: str) -> Iterator[Part]:
    import datasets
    import httpx2

    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, httpx2.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise ChatError(
            f"{name} is neither a file or folder here nor a data set that the Hugging Face Hub gives us "
            f"({first_line(error)}). Check --dataset_name and the network; a private one needs HF_TOKEN."
        ) from error
    for split, rows in splits.items():
        yield Part(split, _numbered(split, rows))


def _read_file(path: Path) -> Iterator[Row]:
    try:
        yield from READERS[path.suffix.lower()](path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's are among them
        raise ChatError(f"{path} cannot be read ({first_line(error)}).") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path.name}, line {number}"
            try:
                yield Row(place, json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                yield Row(place, None, f"it is not JSON in UTF-8 ({first_line(error)}).")


def _read_json(path: Path) -> Iterator[Row]:
    rows = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(rows, list):
        raise ChatError(f"{path} is not a list of rows.")
    yield from _numbered(path.name, rows)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**30)  # 128 KB otherwise, which a long conversation exceeds
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, line = csv.DictReader(file, strict=True), 2
        for columns in reader:
            place = f"{path.name}, line {line}"
            if None in columns:
                yield Row(place, None, "it has more columns than the first line names.")
            elif None in columns.values():
                yield Row(place, None, "it has fewer columns than the first line names.")
            else:
                yield Row(place, columns)
            line = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from _numbered(path.name, (row for batch in file.iter_batches() for row in batch.to_pylist()))


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[Row]:
    yield from (Row(f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _suffixes() -> str:
    *most, last = READERS
    return f"{', '.join(most)} or {last}"
