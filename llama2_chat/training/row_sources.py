"""Rows of conversations where they lie: a file, a folder of files, a data set on the Hub.

How a file is read is row_files.py's, what a row says row_formats.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.named_files import in_home
from llama2_chat.text import first_line
from llama2_chat.training.row_files import Row, can_read, numbered_of_table, read_file, suffixes

# What tools leave beside data: descriptions of data sets, and no rows.
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class Reading(NamedTuple):
    """How data is read, beside its names."""

    columns: Mapping[str, str] = {}  # names of its columns, and what a known format calls them
    config: str | None = None  # of the data sets on the Hub
    split: str | None = None  # the only one of them that is read: "train_sft", or "train[:10%]"
    weights: Sequence[float] = ()  # of each data set: how often an epoch has each conversation of its train split
    plain_text: bool = False  # a text without a format is learned as it stands
    method: str = "sft"  # what it is read for: with dpo pairs of answers, with kto answers that are good or bad
    at_most: int | None = None  # conversations of each data set and split: what follows stays unread, on the Hub too


AS_IT_IS = Reading()


class Part(NamedTuple):
    """A file or a split on the Hub."""

    name: str  # with the subfolder that it lies in: "test/part-1"
    rows: Iterator[Row]  # read as they are asked for


def check_is_for_hub(names: Sequence[str], reading: Reading) -> None:
    """Raise ChatError if the reading is for data sets on the Hub, and none of these is there."""
    if (reading.config or reading.split) and all(in_home(name).exists() for name in names):
        raise ChatError(f"--dataset_config and --split are for data sets on the Hub, and none is: {', '.join(names)}.")


def read_parts(name: str, reading: Reading = AS_IT_IS, is_alone: bool = True) -> Iterator[Part]:
    """Of a file, a folder or a data set on the Hub. Raises ChatError if there is none, or if it cannot be read.

    is_alone: whether no other data is read beside it. A file is the train split then, whatever it is called.
    """
    path = in_home(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_data(file, path))
        if not files:
            raise ChatError(f"The folder {name} has no file that ends with {suffixes()}.")
        for file in files:
            relative = file.relative_to(path)
            yield Part(relative.with_name(_stem(file)).as_posix(), read_file(file, relative.as_posix()))
    elif path.is_file() and can_read(path):
        yield Part("train" if is_alone else _stem(path), read_file(path, path.name))
    elif path.is_file():
        raise ChatError(f"{name} is not a file that ends with {suffixes()}.")
    elif can_read(path) or name.startswith((".", "/", "~")):
        raise ChatError(f"There is no file or folder {name}. Check --dataset_name.")
    else:
        yield from read_hub(name, reading)


def read_hub(name: str, reading: Reading = AS_IT_IS) -> Iterator[Part]:
    import datasets

    is_stream = reading.at_most is not None
    with _translate_hub_errors(name):
        loaded = datasets.load_dataset(name, reading.config, split=reading.split, streaming=is_stream)
    # A split that was asked for is what is trained on, whatever it is called.
    for split, rows in {"train": loaded}.items() if reading.split else loaded.items():
        yield Part(split, _read_stream(name, split, rows) if is_stream else numbered_of_table(split, rows))


def _read_stream(name: str, split: str, rows: Any) -> Iterator[Row]:
    """What is fetched as it is asked for, and may fail on the way."""
    with _translate_hub_errors(name):
        yield from numbered_of_table(split, rows)


@contextmanager
def _translate_hub_errors(name: str) -> Iterator[None]:
    import datasets
    import httpx2

    try:
        yield
    except (OSError, ValueError, httpx2.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise ChatError(
            f"{name} is neither a file or folder here nor a data set that the Hugging Face Hub gives us "
            f"({first_line(error)}). Check --dataset_name, --dataset_config, --split and the network; "
            "a private one needs HF_TOKEN."
        ) from error


def _stem(file: Path) -> str:
    """Its name without what says its kind; my.test.jsonl.gz is my.test."""
    return file.with_suffix("").stem if file.suffix.lower() == ".gz" else file.stem


def _is_data(file: Path, folder: Path) -> bool:
    """Not in hidden folders, such as .git and .cache."""
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and can_read(file) and file.name not in NO_DATA and not is_hidden
