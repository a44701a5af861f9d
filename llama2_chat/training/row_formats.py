"""What a row says: which of the common formats it has, and its messages, as the chat would take them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from llama2_chat.text import valid_unicode
from llama2_chat.types import Message

ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them


def recognise(columns: dict[str, Any]) -> str:
    """The name in FORMATS of the format that has these columns. Raises ChatError if none has."""
    for name, (needed, _) in FORMATS.items():
        if needed <= columns.keys():
            return name
    raise ChatError(
        f"its columns ({', '.join(map(str, columns))[:200]}) belong to no known format: messages, conversations, "
        "prompt and completion, instruction and output, or text."
    )


def read_messages(columns: dict[str, Any], row_format: str) -> list[Message]:
    """The messages of a row, clean. Raises ChatError, as the end of "train.jsonl, line 3: ...", if it is no use."""
    return _clean(FORMATS[row_format][1](columns))


def _clean(messages: list[Any]) -> list[Message]:
    """Messages as the chat would take them: roles in order, nothing empty, an answer among them."""
    if messages and messages[0] in ({"role": "system", "content": ""}, {"role": "system", "content": None}):
        messages = messages[1:]  # how data sets write that there is none
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), str) and not message["content"].strip():
            raise ChatError(f"its {'answer' if message.get('role') == 'assistant' else 'message'} is empty.")
    if any(
        isinstance(message, dict) and (message.get("role") == "tool" or message.get("tool_calls"))
        for message in messages
    ):
        raise ChatError("it has calls of tools or their results, which are not trained on here.")
    _, turns = prompt.check_messages([*messages, {"role": "user", "content": "Go on."}])
    # A chat takes both of these. To train on them would be to teach another order than the row has.
    if any(message["role"] == "system" for message in messages[1:]):
        raise ChatError("Only the first message can be a system message.")
    if turns[0].role != "user":
        raise ChatError("A conversation to train on starts with a message from the user.")
    if all(message["role"] != "assistant" for message in messages):
        raise ChatError("it has no answer.")
    # White space at the ends belongs to the chat format, and some formats would join it with their own.
    return [{"role": message["role"], "content": valid_unicode(message["content"]).strip()} for message in messages]


# ---- The formats: messages as a row has them, which may be anything ----


def _from_messages(columns: dict[str, Any]) -> list[Any]:
    return _list(columns, "messages")


def _from_sharegpt(columns: dict[str, Any]) -> list[Any]:
    return [_from_sharegpt_turn(turn) for turn in _list(columns, "conversations")]


def _from_sharegpt_turn(turn: Any) -> Any:
    if isinstance(turn, dict) and "from" in turn:
        return {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
    return turn  # prompt.check_messages says what is wrong with it


def _from_prompt(columns: dict[str, Any]) -> list[Any]:
    messages: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = _column(columns, name)
        messages += value if isinstance(value, list) else [{"role": role, "content": value}]
    return messages


def _from_alpaca(columns: dict[str, Any]) -> list[Any]:
    question = "\n\n".join(map(str, filter(None, [_column(columns, "instruction"), columns.get("input")])))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _column(columns, "output")}]


def _from_guanaco(columns: dict[str, Any]) -> list[Any]:
    head, *parts = re.split(r"### (Human|Assistant):", str(_column(columns, "text")))
    if head.strip() or not parts:
        raise ChatError("its text does not begin with '### Human:'.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": content} for name, content in zip(parts[::2], parts[1::2], strict=True)]


FORMATS: dict[str, tuple[set[str], Callable[[dict[str, Any]], list[Any]]]] = {
    "messages": ({"messages"}, _from_messages),
    "ShareGPT": ({"conversations"}, _from_sharegpt),
    "prompt and completion": ({"prompt", "completion"}, _from_prompt),
    "Alpaca": ({"instruction", "output"}, _from_alpaca),
    "### Human / ### Assistant": ({"text"}, _from_guanaco),
}


def _column(columns: dict[str, Any], name: str) -> Any:
    if name not in columns:
        raise ChatError(f"it has no column {name}.")
    return columns[name]


def _list(columns: dict[str, Any], name: str) -> list[Any]:
    """The list in a column; CSV can only hold it as JSON."""
    value = _column(columns, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise ChatError(f"its {name} are not a list.")
    return value
