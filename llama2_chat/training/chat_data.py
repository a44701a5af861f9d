"""Conversations that are worth training on, by split. Rows that are not are left out, each with its place and reason.

Where rows lie is row_sources.py's, what they say row_messages.py's; nothing here knows models or training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import repeat
from typing import NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.training.row_files import Row
from llama2_chat.training.row_formats import recognise, rename
from llama2_chat.training.row_messages import RowMessages, check_columns, is_labelled, read_row
from llama2_chat.training.row_pairs import RowPair, is_pair, read_pair
from llama2_chat.training.row_sources import AS_IT_IS, Reading, check_is_for_hub, read_parts
from llama2_chat.types import Message, Tool

SPLITS = ("train", "eval", "test")
EVAL_NAMES = "held_out|validation|valid|eval|dev"  # words in the name of a part that is an eval split
TEST_NAMES = "test"  # the same of a test split
TRAIN_NAMES = "train"  # and of one that is trained on, whatever is in it
SHOWN_FAULTS = 10


class Conversation(NamedTuple):
    messages: list[Message]  # of a plain text one, by the assistant
    place: str  # "train.jsonl, line 3"
    context: frozenset[int] = frozenset()  # answers that are not learned, by their places in messages
    tools: tuple[Tool, ...] = ()  # that the model is told of
    copies: int = 1  # how often an epoch has it
    rejected: Message | None = None  # a worse one in place of the last message
    is_wanted: bool = True  # False: the last message is what not to say

    @property
    def is_text(self) -> bool:
        """Whether nobody asked for it: it is learned as it stands."""
        return self.messages[0]["role"] == "assistant"

    @property
    def key(self) -> str:
        """What it teaches: equal for two that are trained on alike."""
        if not (self.context or self.tools or self.rejected) and self.is_wanted:
            return json.dumps(self.messages)
        tools = [asdict(tool) for tool in self.tools]
        return json.dumps([self.messages, sorted(self.context), tools, self.rejected, self.is_wanted])


@dataclass
class Data:
    """What was found: conversations that end with an answer, and what was wrong with the others."""

    train: list[Conversation] = field(default_factory=list)
    eval: list[Conversation] = field(default_factory=list)  # the data's own, if it has one
    test: list[Conversation] = field(default_factory=list)  # likewise
    formats: set[str] = field(default_factory=set)  # names in row_formats.FORMATS
    faults: list[str] = field(default_factory=list)  # rows left out: place and reason
    duplicates: int = 0  # left out
    unanswered: int = 0  # conversations whose last messages, after the last answer that is learned, were left out
    greetings: int = 0  # conversations that began with the assistant's greeting, which was left out
    unwanted: int = 0  # rows left out because they say that their answer is not to be learned
    context: int = 0  # answers that are kept, but not learned
    unread: set[str] = field(default_factory=set)  # columns and fields that say something, and that nothing reads
    unnamed: set[str] = field(default_factory=set)  # columns that were named and that no row so far has

    def summary_lines(self) -> Iterator[str]:
        sizes = {"train": len(self.train), "eval": len(self.eval), "test": len(self.test)}
        counts = ", ".join(f"{size:,} {split}" for split, size in sizes.items() if size)
        yield f"Conversations: {counts}; format: {', '.join(sorted(self.formats))}."
        if self.duplicates:
            yield f"{self.duplicates:,} duplicates are left out."
        if self.unanswered:
            yield f"{self.unanswered:,} end with messages after the last answer to learn; those are left out."
        if self.greetings:
            yield f"{self.greetings:,} begin with a greeting by the assistant, before any question; it is left out."
        if bad := sum(not row.is_wanted for row in self.train):
            yield f"Of the answers in train, {len(self.train) - bad:,} are good and {bad:,} bad."
        if self.unwanted:
            yield f"Rows left out, as they say that their answer is not to be learned (label): {self.unwanted:,}."
        if self.context:
            yield f"Answers that are read and not learned (weight, train): {self.context:,}."
        if self.unread:
            yield f"Columns not read: {', '.join(name or 'one without a name' for name in sorted(self.unread))}."
        if self.faults:
            yield f"{len(self.faults):,} rows cannot be used and are left out:"
            yield from (f"  {fault}" for fault in self.faults[:SHOWN_FAULTS])
            if len(self.faults) > SHOWN_FAULTS:
                yield f"  and {len(self.faults) - SHOWN_FAULTS:,} more"


def read(names: str | Sequence[str], reading: Reading = AS_IT_IS) -> Data:
    """The conversations of files, folders and data sets on the Hub, by their names.

    Files and splits called validation, eval or held_out are the eval split, those called test too unless there are
    both; then they are the test split. All others are the train split, and so is a single file, whatever its name.
    Raises ChatError if one of them has nothing, or all of them together nothing to train on.
    """
    names = [names] if isinstance(names, str) else names
    check_is_for_hub(names, reading)
    data, seen, empty = Data(unnamed={*reading.columns}), set[str](), []
    for name, weight in zip(names, reading.weights or repeat(1.0), strict=False):
        duplicates = data.duplicates
        own = _read_one(name, reading, data, seen, is_alone=len(names) == 1)
        data.train += _weighted(own["train"], weight)
        data.eval += own["eval"]
        data.test += own["test"]
        if not any(own.values()):
            if data.duplicates > duplicates:
                raise ChatError(f"{name} has only conversations that the data before it has, too. Leave it out.")
            empty.append(name)
    if data.unnamed:
        raise ChatError(f"--columns: the data has no column {min(data.unnamed)}.")
    if not data.eval:
        data.eval, data.test = data.test, []
    if not data.train or empty:
        raise ChatError(f"{' and '.join(empty or names)} has no conversation to train on{_why_none(data)}")
    if reading.method == "kto" and len({row.is_wanted for row in data.train}) < 2:
        raise ChatError(
            "--method kto needs good and bad answers (label true and false), and the data has one kind only."
        )
    return data


def _read_one(name: str, reading: Reading, data: Data, seen: set[str], is_alone: bool) -> dict[str, list[Conversation]]:
    """The new conversations of a data set, by split; seen: the keys of those that are known, to which these come."""
    own: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    # The train split first: of two copies of a conversation the other one goes.
    for part in sorted(read_parts(name, reading, is_alone), key=lambda part: SPLITS.index(_split_of(part.name))):
        rows = own[_split_of(part.name)]
        for conversation in _conversations(part.rows, data, reading):
            if conversation.key in seen:
                data.duplicates += 1
                continue
            seen.add(conversation.key)
            rows.append(conversation)
            if len(rows) == reading.at_most:
                break
    return own


def _weighted(rows: list[Conversation], weight: float) -> list[Conversation]:
    """As many copies of each, and of some one more for the rest of the weight; which depends on the rows alone."""
    each, rest = divmod(weight, 1)
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i].key.encode()).digest())
    more = {*order[: round(rest * len(rows))]}
    counts = (int(each) + (i in more) for i in range(len(rows)))
    return [row._replace(copies=count) for row, count in zip(rows, counts, strict=True) if count]


def _split_of(part_name: str) -> str:
    """By the first of its folders, or else by the file, whose name has a split's as one of its words."""
    for name in part_name.lower().split("/"):
        for split, names in (("train", TRAIN_NAMES), ("eval", EVAL_NAMES), ("test", TEST_NAMES)):
            if re.search(rf"(?<![^\W_])({names})(?![a-z])", name):
                return split
    return "train"


def _conversations(rows: Iterable[Row], data: Data, reading: Reading) -> Iterator[Conversation]:
    """Those of one file, whose rows all have one format; data takes note of everything else."""
    row_format = None
    for row in rows:
        try:
            if not isinstance(row.columns, dict):
                raise ChatError(row.fault or "it is not an object with named columns.")
            data.unnamed -= row.columns.keys()
            columns = rename(row.columns, reading.columns)
            check_columns(columns, pairs=reading.method != "sft")
            if reading.method != "sft" and is_pair(columns):
                pair = read_pair(columns)
                if pair.chosen.is_wanted:
                    yield from _compared(pair, row.place, data, reading.method)
                else:
                    data.unwanted += 1
                continue
            if reading.method == "dpo":
                raise ChatError("it is no pair of a chosen and a rejected answer, which --method dpo needs.")
            if reading.method == "kto" and not is_labelled(columns):
                raise ChatError("it does not say whether its answer is good (label true or false), for --method kto.")
            row_format = row_format or recognise(columns, {*reading.columns.values()}, reading.plain_text)
            found = read_row(columns, row_format, keep_unwanted=reading.method == "kto")
        except ChatError as error:
            data.faults.append(f"{row.place}: {error}")
            continue
        data.formats.add(row_format)
        data.unread |= found.unread
        if reading.method == "kto":
            yield _last_alone(_conversation(found, row.place, data))
        elif found.is_wanted:
            yield _conversation(found, row.place, data)
        else:
            data.unwanted += 1


def _compared(pair: RowPair, place: str, data: Data, method: str) -> Iterator[Conversation]:
    """One conversation for DPO, and two for KTO."""
    data.formats.add("chosen and rejected")
    data.unread |= pair.chosen.unread
    chosen = _last_alone(_conversation(pair.chosen, place, data))
    if method == "dpo":
        yield chosen._replace(rejected=pair.rejected)
        return
    yield chosen
    yield chosen._replace(messages=[*chosen.messages[:-1], pair.rejected], is_wanted=False)


def _last_alone(conversation: Conversation) -> Conversation:
    """Preferences are about the last answer: those before it are read and not learned."""
    places = range(len(conversation.messages) - 1)
    return conversation._replace(
        context=frozenset(i for i in places if conversation.messages[i]["role"] == "assistant")
    )


def _conversation(found: RowMessages, place: str, data: Data) -> Conversation:
    """It ends with the last answer that is learned."""
    last = max(i for i, m in enumerate(found.messages) if m["role"] == "assistant" and i not in found.context)
    data.unanswered += last + 1 < len(found.messages)
    data.greetings += found.has_greeting
    context = frozenset(i for i in found.context if i < last)
    data.context += len(context)
    return Conversation(found.messages[: last + 1], place, context, found.tools, is_wanted=found.is_wanted)


def _why_none(data: Data) -> str:
    if data.eval:
        return ": all its parts have names of eval or test splits."
    if data.unwanted and not data.faults:
        return ": all its rows say that their answer is not to be learned (label)."
    return f". The first fault: {data.faults[0]}" if data.faults else "."
