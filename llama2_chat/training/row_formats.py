"""What a row says: which of the common formats it has, and its messages as they stand in it, which may be anything.

Which of them can be trained on, and which are learned, is row_messages.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from functools import cache
from typing import Any, NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.training.text_formats import TEXT_FORMATS, prompt_format, recognise_text, text_messages

# As ShareGPT, Gemma's data and, since it has a developer, OpenAI call them.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "developer": "system"}
SYSTEMS = {"system", "system_prompt"}  # columns for the system message, beside any format
READ_ELSEWHERE = {"chosen", "rejected", "label", "kto_tag", "tools", "functions"}  # columns beside any format
PLAIN_TEXT = "plain text"  # the format of what nobody says to anybody
# What data sets write where there is no input.
NO_INPUT = ("<noinput>", "nan")
ABOUT = ("input", "context")  # columns that belong to the question
# A list of messages in a column that holds text, as all of CSV do.
MESSAGES_IN_TEXT = re.compile(
    r"""\s*\[\s*\{(?=.*["'](role|from)["']\s*:)(?=.*["'](content|value|tool_calls)["']\s*:)""", re.S
)


class RowFormat(NamedTuple):
    needed: Set[str]  # columns
    read: Callable[[dict[str, Any]], list[Any]]
    optional: Set[str] = frozenset()  # columns that it reads where they are


def recognise(columns: dict[str, Any], named: Set[str] = frozenset(), plain_text: bool = False) -> str:
    """The name in FORMATS of the format that has these columns, best of those that were named.

    plain_text: whether a text is to be learned as it stands. Raises ChatError if none has.
    """
    for known in (columns.keys() & named, columns.keys()):
        for name, row_format in FORMATS.items():
            if row_format.needed <= known:
                is_text = name in TEXT_FORMATS
                return name if not is_text else PLAIN_TEXT if plain_text else recognise_text(columns["text"])
    raise ChatError(
        f"its columns ({', '.join(map(str, columns))[:200]}) belong to no known format: messages, conversations, "
        "prompt and completion or response, instruction and output or response, question and answer or response, or "
        "text. Name the columns: --columns question=user answer=assistant."
    )


def rename(columns: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Those of the columns that names has, under the names of a known format; the others as they are.

    Texts that get the same name are joined by a blank line. A known name may be written in capitals.
    """
    renamed: dict[str, Any] = {}
    for name, new in names.items():
        if name not in columns:  # of another data set
            continue
        value = columns[name]
        renamed[new] = _joined(renamed[new], value) if new in renamed else value
    others: dict[str, Any] = {}
    for name, value in columns.items():
        if name not in names:
            spelled = _spelled(name, columns)
            others[name if spelled in others else spelled] = value
    return renamed | {f"{name} (its own)" if name in renamed else name: value for name, value in others.items()}


def _spelled(name: Any, columns: Mapping[str, Any]) -> Any:
    """A known name in small letters, however it is written."""
    plain = str(name).strip().lower()
    return plain if plain in known_columns() | READ_ELSEWHERE and plain not in columns else name


def _joined(first: Any, second: Any) -> Any:
    if is_empty(first) or is_empty(second):
        return first if is_empty(second) else second
    if not (isinstance(first, str) and isinstance(second, str)):
        raise ChatError("two of its columns are to be one text, and they are not both text.")
    return f"{first}\n\n{second}"


def raw_messages(columns: dict[str, Any], row_format: str) -> list[Any]:
    """The messages of a row, its system text first. Raises ChatError if a column is missing or is no list."""
    messages = FORMATS[row_format].read(columns)
    if row_format == PLAIN_TEXT:
        return messages
    system = [columns[name] for name in sorted(SYSTEMS & columns.keys()) if not is_empty(columns[name])]
    return [*({"role": "system", "content": text} for text in system), *messages]


def columns_read(row_format: str) -> Set[str]:
    systems = set() if row_format == PLAIN_TEXT else SYSTEMS
    return FORMATS[row_format].needed | FORMATS[row_format].optional | systems


@cache
def known_columns() -> Set[str]:
    """What a column can be called."""
    return SYSTEMS.union(*(columns_read(name) for name in FORMATS))


def is_empty(value: Any) -> bool:
    """Whether this is how data sets write that there is nothing; NaN is pandas' way."""
    return value is None or value in ("", [], {}) or (isinstance(value, float) and value != value)


# ---- The formats ----


def _from_messages(columns: dict[str, Any]) -> list[Any]:
    return [_as_message(turn) for turn in _list(columns, "messages")]


def _from_sharegpt(columns: dict[str, Any]) -> list[Any]:
    return [_as_message(turn) for turn in _list(columns, "conversations")]


def _as_message(turn: Any) -> Any:
    if isinstance(turn, dict) and "from" in turn:
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        turn = {**others, "role": turn["from"], "content": turn.get("value")}
    if isinstance(turn, dict) and isinstance(turn.get("role"), str):
        role = turn["role"].lower()
        return turn | {"role": ROLES.get(role, role)}
    return turn  # prompt.check_messages says what is wrong with it


def _exchange(question: str, answer: str) -> Callable[[dict[str, Any]], list[Any]]:
    """The reader of a row with one question and one answer in these columns; each may be messages."""

    def read(columns: dict[str, Any]) -> list[Any]:
        asked, answered = unpacked(columns, question), unpacked(columns, answer)
        written = prompt_format(asked) if isinstance(asked, str) and isinstance(answered, str) else None
        if written or isinstance(asked, (list, dict)):
            _refuse_beside(columns, question)
        if written:  # some data sets repeat the prompt before the answer
            whole = answered if answered.lstrip().startswith(asked.strip()) else asked + answered
            return [*_earlier(columns), *text_messages(whole, written)]
        asked = asked if isinstance(asked, (list, dict)) else _with_what_it_is_about(columns, question)
        answers = _spoken(answered, "assistant")
        if answers and isinstance(answers[0], dict) and answers[0].get("role") == "user":
            raise ChatError(f"its {answer} is a whole conversation: name it by --columns NAME=messages.")
        return [*_earlier(columns), *_spoken(asked, "user"), *answers]

    return read


def _refuse_beside(columns: dict[str, Any], question: str) -> None:
    """Raise ChatError for what a question is about, where the question is a conversation that does not have it."""
    for name in _about(columns, question):
        if str(columns[name]) not in str(columns[question]):
            raise ChatError(f"its {question} is a conversation, and its {name} stands beside it: put it into it.")


def _spoken(value: Any, role: str) -> list[Any]:
    """The messages in a column: several, one, or what somebody in this role says."""
    if isinstance(value, (list, dict)):
        return [_as_message(turn) for turn in (value if isinstance(value, list) else [value])]
    return [{"role": role, "content": value}]


def _instruction(answer: str) -> Callable[[dict[str, Any]], list[Any]]:
    """The reader of a row in Alpaca's way: an instruction, perhaps what it is about, and perhaps earlier exchanges."""

    def read(columns: dict[str, Any]) -> list[Any]:
        asked = _with_what_it_is_about(columns, "instruction")
        return [*_earlier(columns), *_pair(asked, _column(columns, answer))]

    return read


def _with_what_it_is_about(columns: dict[str, Any], question: str) -> Any:
    about = _about(columns, question)
    parts = [_column(columns, question), *(columns[name] for name in about)]
    if about and not all(isinstance(part, str) for part in parts):
        raise ChatError(f"its {question}, input and context are not text.")
    return "\n\n".join(filter(None, parts)) if about else parts[0]


def _about(columns: dict[str, Any], question: str) -> list[str]:
    """The columns that say what the question is about."""
    return [name for name in ABOUT if name != question and not _has_no_input(columns.get(name))]


def _earlier(columns: dict[str, Any]) -> list[Any]:
    """The messages of the column history, before the question."""
    pairs = [] if is_empty(columns.get("history")) else _list(columns, "history")
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ChatError("its history is not a list of pairs, each a question and its answer.")
    return [message for pair in pairs for message in _pair(*pair)]


def _pair(question: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _has_no_input(value: Any) -> bool:
    return is_empty(value) or (isinstance(value, str) and value.strip() in NO_INPUT)


def _text(name: str) -> Callable[[dict[str, Any]], list[Any]]:
    return lambda columns: text_messages(_column(columns, "text"), name)


BESIDE = {*ABOUT, "history"}
FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat({"messages"}, _from_messages),
    "ShareGPT": RowFormat({"conversations"}, _from_sharegpt),
    "prompt and completion": RowFormat({"prompt", "completion"}, _exchange("prompt", "completion"), BESIDE),
    "Alpaca": RowFormat({"instruction", "output"}, _instruction("output"), BESIDE),
    "Dolly": RowFormat({"instruction", "response"}, _instruction("response"), BESIDE),
    "prompt and response": RowFormat({"prompt", "response"}, _exchange("prompt", "response"), BESIDE),
    "question and response": RowFormat({"question", "response"}, _exchange("question", "response"), BESIDE),
    "question and answer": RowFormat({"question", "answer"}, _exchange("question", "answer"), BESIDE),
}
FORMATS |= {name: RowFormat({"text"}, _text(name)) for name in TEXT_FORMATS}
FORMATS[PLAIN_TEXT] = RowFormat({"text"}, lambda columns: [{"role": "assistant", "content": _column(columns, "text")}])


def _column(columns: dict[str, Any], name: str) -> Any:
    if name not in columns:
        raise ChatError(f"it has no column {name}.")
    return columns[name]


def unpacked(columns: dict[str, Any], name: str) -> Any:
    """What is in a column, where messages may be in a text as JSON. Raises ChatError if they are, and are none."""
    value = _column(columns, name)
    if not (isinstance(value, str) and MESSAGES_IN_TEXT.match(value)):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ChatError(
            f"its {name} holds messages, but not as JSON. Save the data as JSON Lines or Parquet."
        ) from error


def _list(columns: dict[str, Any], name: str) -> list[Any]:
    """The list in a column; CSV can only hold it as JSON."""
    value = unpacked(columns, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise ChatError(f"its {name} are not a list.")
    return value
