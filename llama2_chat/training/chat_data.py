"""Conversations to learn from: read, recognised, checked, and turned into token ids with what is learnt of them.

A local JSONL, JSON, CSV or Parquet file, a folder of them, or a data set on the Hugging Face Hub. Rows that cannot be
learnt from are left out, each with its place and the reason; nothing here knows models or training.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from llama2_chat.prompt import TokenizedExample
from llama2_chat.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HELD_OUT = r"(held_out|validation|valid|eval|dev)(?![a-z])"  # how a part that is not learnt is called, or begins
TEST = r"test(?![a-z])"  # the same where it is the only one, else a third part
ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
SHOWN_FAULTS = 10


class Conversation(NamedTuple):
    messages: list[Message]
    place: str  # "train.jsonl, line 3"


@dataclass
class Data:
    """What was found: conversations that end with an answer, and what was wrong with the others."""

    train: list[Conversation] = field(default_factory=list)
    held_out: list[Conversation] = field(default_factory=list)  # the data's own part for it, if it has one
    test: list[Conversation] = field(default_factory=list)  # its own part for a last test, beside that
    shapes: set[str] = field(default_factory=set)  # names in SHAPES
    faults: list[str] = field(default_factory=list)  # rows left out: place and reason
    duplicates: int = 0  # left out
    unanswered: int = 0  # conversations whose last message, a question, was left out

    def told(self) -> Iterator[str]:
        """What a person should know of it, line by line."""
        parts = {"to learn": self.train, "held out": self.held_out, "for a test": self.test}
        counts = [f"{len(rows):,} {name}" for name, rows in parts.items() if rows]
        yield f"Conversations: {', '.join(counts)}, {_and(self.shapes)}."
        if self.duplicates:
            yield f"{self.duplicates:,} that came twice are left out."
        if self.unanswered:
            yield f"{self.unanswered:,} end with a question that nobody answers; that question is left out."
        if self.faults:
            yield f"{len(self.faults):,} rows cannot be learnt from and are left out:"
            yield from (f"  {fault}" for fault in self.faults[:SHOWN_FAULTS])
            if len(self.faults) > SHOWN_FAULTS:
                yield f"  and {len(self.faults) - SHOWN_FAULTS:,} more"


def read(name: str) -> Data:
    """The conversations of a file, a folder or a data set on the Hub.

    Files and splits called validation or held_out are held out, those called test too unless there are both; then
    they are a third part. All others are learnt.
    Raises ChatError if there is nothing to learn from.
    """
    data, seen = Data(), set()
    parts = sorted(_parts(name), key=lambda part: _place(part[0]))  # a held-out copy of what is learnt goes
    for part, rows in parts:
        shape = None
        for place, row in rows:
            try:
                if not isinstance(row, dict):
                    raise ChatError(row if isinstance(row, str) else "it is no object with named columns.")
                shape = shape or _shape(row)
                messages = _checked(SHAPES[shape][1](row))
            except ChatError as error:
                data.faults.append(f"{place}: {error}")
                continue
            data.unanswered += messages[-1]["role"] == "user"
            while messages[-1]["role"] == "user":
                messages.pop()
            key = json.dumps(messages)
            if key in seen:
                data.duplicates += 1
                continue
            seen.add(key)
            data.shapes.add(shape)
            (data.train, data.held_out, data.test)[_place(part)].append(Conversation(messages, place))
    if not data.held_out:
        data.held_out, data.test = data.test, []
    if not data.train:
        why = f". The first fault: {data.faults[0]}" if data.faults else "."
        why = ": its parts are all held out by their names." if data.held_out else why
        raise ChatError(f"There is no conversation to learn from in {name}{why}")
    return data


def encode(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    max_length: int,
) -> tuple[list[TokenizedExample], list[str]]:
    """Lessons of at most max_length tokens, and what had to go for that.

    A conversation that is too long loses its last exchanges: an answer that is cut in the middle would be learnt
    without its end. One whose first exchange is too long is left out.
    """
    lessons, faults, shortened = [], [], 0
    for conversation in conversations:
        try:
            lesson = prompt.encode_example(tokenizer, conversation.messages, stop_ids)
        except ChatError as error:
            faults.append(f"{conversation.place}: {error}")
            continue
        answers = [answer for answer in lesson.answers if answer[1] <= max_length]
        if not answers:
            faults.append(f"{conversation.place}: its first exchange is {lesson.answers[0][1]:,} tokens.")
            continue
        shortened += len(answers) < len(lesson.answers)
        lessons.append(TokenizedExample(lesson.input_ids[: answers[-1][1]], answers))
    told = []
    if shortened:
        told.append(f"{shortened:,} are longer than {max_length:,} tokens and lose their last exchanges.")
    if faults:
        told.append(f"{len(faults):,} are left out, for they do not fit into {max_length:,} tokens or the format:")
        told += [f"  {fault}" for fault in faults[:SHOWN_FAULTS]]
    return lessons, told


def labels(lesson: TokenizedExample) -> list[int]:
    """The ids that are learnt, each in its place, and -100, which PyTorch's loss passes over, everywhere else."""
    labels = [-100] * len(lesson.input_ids)
    for start, end in lesson.answers:
        labels[start:end] = lesson.input_ids[start:end]
    return labels


def marked(lesson: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text as the model sees it, control tokens and all, with ⟦what is learnt⟧ marked."""
    text, at = "", 0
    for start, end in lesson.answers:
        text += f"{tokenizer.decode(lesson.input_ids[at:start])}⟦{tokenizer.decode(lesson.input_ids[start:end])}⟧"
        at = end
    return text


# ---- Where rows come from ----

Rows = Iterator[tuple[str, Any]]  # a place, and a row, or the sentence that says why there is none


def _parts(name: str) -> Iterator[tuple[str, Rows]]:
    """The name and the rows of each file or split."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ChatError(f"The folder {name} holds no file that ends with {_and(SUFFIXES, 'or')}.")
        yield from ((file.stem, _file(file)) for file in files)
    elif path.is_file() and path.suffix.lower() in SUFFIXES:
        yield "train", _file(path)  # by itself it is what is to be learnt, whatever it is called
    elif path.is_file():
        raise ChatError(f"{name} is not a file that ends with {_and(SUFFIXES, 'or')}.")
    elif path.suffix.lower() in SUFFIXES or name.startswith((".", "/", "~")):
        raise ChatError(f"There is no file or folder {name}. Check --dataset_name.")
    else:
        yield from _hub(name)


def _file(path: Path) -> Rows:
    try:
        yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[path.suffix.lower()](path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's are among them
        raise ChatError(f"{path} cannot be read ({first_line(error)}).") from error


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path.name}, line {number}", json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    yield f"{path.name}, line {number}", f"it is not JSON in UTF-8 ({first_line(error)})."


def _json(path: Path) -> Rows:
    rows = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(rows, list):
        raise ChatError(f"{path} holds no list of rows.")
    yield from _numbered(path.name, rows)


def _csv(path: Path) -> Rows:
    csv.field_size_limit(2**30)  # 128 KB otherwise, which a long conversation exceeds
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows, line = csv.DictReader(file, strict=True), 2
        for row in rows:
            if None in row or None in row.values():
                row = f"it has {'more' if None in row else 'fewer'} columns than the first line names."
            yield f"{path.name}, line {line}", row
            line = rows.line_num + 1


def _parquet(path: Path) -> Rows:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from _numbered(path.name, (row for batch in file.iter_batches() for row in batch.to_pylist()))


def _hub(name: str) -> Iterator[tuple[str, Rows]]:
    import datasets
    import httpx2

    try:
        parts = datasets.load_dataset(name)
    except (OSError, ValueError, httpx2.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise ChatError(
            f"{name} is neither a file or folder here nor a data set that the Hugging Face Hub gives us "
            f"({first_line(error)}). Check --dataset_name and the network; a private one needs HF_TOKEN."
        ) from error
    for part, rows in parts.items():
        yield part, _numbered(part, rows)


def _numbered(name: str, rows: Iterable[Any]) -> Rows:
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _place(part: str) -> int:
    """0 for what is learnt, 1 for what is held out, 2 for what is called a test."""
    return bool(re.match(HELD_OUT, part.lower())) + 2 * bool(re.match(TEST, part.lower()))


# ---- What a row says ----


def _shape(row: dict[str, Any]) -> str:
    for name, (columns, _) in SHAPES.items():
        if columns <= row.keys():
            return name
    raise ChatError(
        f"its columns ({', '.join(map(str, row))[:200]}) are none of those known: messages, conversations, prompt and "
        "completion, instruction and output, or text."
    )


def _from_messages(row: dict[str, Any]) -> list[Message]:
    return _list(row, "messages")


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    return [
        {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
        if isinstance(turn, dict) and "from" in turn
        else turn
        for turn in _list(row, "conversations")
    ]


def _from_prompt(row: dict[str, Any]) -> list[Message]:
    sides = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        text = _column(row, column)
        sides += text if isinstance(text, list) else [{"role": role, "content": text}]
    return sides


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    question = "\n\n".join(map(str, filter(None, [_column(row, "instruction"), row.get("input")])))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _column(row, "output")}]


def _from_guanaco(row: dict[str, Any]) -> list[Message]:
    head, *parts = re.split(r"### (Human|Assistant):", str(_column(row, "text")))
    if head.strip() or not parts:
        raise ChatError("its text does not begin with '### Human:'.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": content} for name, content in zip(parts[::2], parts[1::2], strict=True)]


SHAPES: dict[str, tuple[set[str], Callable[[dict[str, Any]], list[Message]]]] = {
    "messages": ({"messages"}, _from_messages),
    "ShareGPT": ({"conversations"}, _from_sharegpt),
    "prompt and completion": ({"prompt", "completion"}, _from_prompt),
    "Alpaca": ({"instruction", "output"}, _from_alpaca),
    "### Human / ### Assistant": ({"text"}, _from_guanaco),
}


def _column(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise ChatError(f"it has no column {name}.")
    return row[name]


def _list(row: dict[str, Any], name: str) -> list[Any]:
    """The list in a column; CSV can only hold it as JSON."""
    value = _column(row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise ChatError(f"its {name} are no list.")
    return value


def _checked(messages: list[Message]) -> list[Message]:
    """Messages as the chat would take them: roles in order, nothing empty, an answer among them."""
    if messages and messages[0] in ({"role": "system", "content": ""}, {"role": "system", "content": None}):
        messages = messages[1:]  # so data sets write that there is none
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), str) and not message["content"].strip():
            raise ChatError(f"its {'answer' if message.get('role') == 'assistant' else 'message'} is empty.")
    prompt.check_messages([*messages, {"role": "user", "content": "Go on."}])
    # White space around it belongs to a format, and some formats would read it together with their own.
    messages = [{"role": message["role"], "content": _whole(message["content"]).strip()} for message in messages]
    if all(message["role"] != "assistant" for message in messages):
        raise ChatError("it holds no answer.")
    return messages


def _whole(text: str) -> str:
    """Without half an emoji, which JSON can write and no file can hold; prompt.encode() puts the same in its place."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _and(names: Iterable[str], word: str = "and") -> str:
    *most, last = sorted(names) or [""]
    return f"{', '.join(most)} {word} {last}" if most else last


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
