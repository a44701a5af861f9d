"""Conversations that are worth training on, by split. Rows that are not are left out, each with its place and reason.

Where rows lie is row_sources.py's, what they say row_formats.py's; nothing here knows models or training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.training.row_formats import read_messages, recognise
from llama2_chat.training.row_sources import Row, read_parts
from llama2_chat.types import Message

SPLITS = ("train", "eval", "test")
EVAL_NAMES = r"(held_out|validation|valid|eval|dev)(?![a-z])"  # how the name of a part that is an eval split begins
TEST_NAMES = r"test(?![a-z])"  # the same of a test split
SHOWN_FAULTS = 10


class Conversation(NamedTuple):
    messages: list[Message]
    place: str  # "train.jsonl, line 3"


@dataclass
class Data:
    """What was found: conversations that end with an answer, and what was wrong with the others."""

    train: list[Conversation] = field(default_factory=list)
    eval: list[Conversation] = field(default_factory=list)  # the data's own, if it has one
    test: list[Conversation] = field(default_factory=list)  # likewise
    formats: set[str] = field(default_factory=set)  # names in row_formats.FORMATS
    faults: list[str] = field(default_factory=list)  # rows left out: place and reason
    duplicates: int = 0  # left out
    unanswered: int = 0  # conversations whose last message, a question, was left out

    def summary_lines(self) -> Iterator[str]:
        sizes = {"train": len(self.train), "eval": len(self.eval), "test": len(self.test)}
        counts = ", ".join(f"{size:,} {split}" for split, size in sizes.items() if size)
        yield f"Conversations: {counts}; format: {', '.join(sorted(self.formats))}."
        if self.duplicates:
            yield f"{self.duplicates:,} duplicates are left out."
        if self.unanswered:
            yield f"{self.unanswered:,} end with a question that has no answer; that question is left out."
        if self.faults:
            yield f"{len(self.faults):,} rows cannot be used and are left out:"
            yield from (f"  {fault}" for fault in self.faults[:SHOWN_FAULTS])
            if len(self.faults) > SHOWN_FAULTS:
                yield f"  and {len(self.faults) - SHOWN_FAULTS:,} more"


def read(name: str) -> Data:
    """The conversations of a file, a folder or a data set on the Hub.

    Files and splits called validation, eval or held_out are the eval split, those called test too unless there are
    both; then they are the test split. All others are the train split.
    Raises ChatError if there is nothing to train on.
    """
    data, seen = Data(), set()
    # The train split first: of two copies of a conversation the other one goes.
    for part in sorted(read_parts(name), key=lambda part: SPLITS.index(_split_of(part.name))):
        rows: list[Conversation] = getattr(data, _split_of(part.name))
        for conversation in _conversations(part.rows, data):
            key = json.dumps(conversation.messages)
            if key in seen:
                data.duplicates += 1
                continue
            seen.add(key)
            rows.append(conversation)
    if not data.eval:
        data.eval, data.test = data.test, []
    if not data.train:
        raise ChatError(f"{name} has no conversation to train on{_why_none(data)}")
    return data


def _split_of(part_name: str) -> str:
    if re.match(EVAL_NAMES, part_name.lower()):
        return "eval"
    return "test" if re.match(TEST_NAMES, part_name.lower()) else "train"


def _conversations(rows: Iterable[Row], data: Data) -> Iterator[Conversation]:
    """Those of one file, whose rows all have one format; data takes note of everything else."""
    row_format = None
    for row in rows:
        try:
            if not isinstance(row.columns, dict):
                raise ChatError(row.fault or "it is not an object with named columns.")
            row_format = row_format or recognise(row.columns)
            messages = read_messages(row.columns, row_format)
        except ChatError as error:
            data.faults.append(f"{row.place}: {error}")
            continue
        data.formats.add(row_format)
        if messages[-1]["role"] == "user":
            data.unanswered += 1
        while messages[-1]["role"] == "user":
            messages.pop()
        yield Conversation(messages, row.place)


def _why_none(data: Data) -> str:
    if data.eval:
        return ": all its parts have names of eval or test splits."
    return f". The first fault: {data.faults[0]}" if data.faults else "."
