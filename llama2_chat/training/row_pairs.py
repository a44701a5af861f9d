"""Rows with two answers to one question, of which one is better, as TRL, LLaMA-Factory, UltraFeedback and others have.

Each becomes two rows of the formats that row_formats.py knows, one for each answer, and is checked as these are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.training.row_formats import ABOUT, is_empty, recognise, unpacked
from llama2_chat.training.row_messages import PAIR, RowMessages, read_row
from llama2_chat.types import Message

# Columns that hold what was asked, the best of them first.
ASKED = ("conversations", "messages", "question", "prompt", "input")
LABELS = {"label", "kto_tag"}  # which say of a single answer whether it is good: of two the columns' names do
STARTERS = {"system", "developer", "human", "user"}  # roles with which a whole conversation begins


class RowPair(NamedTuple):
    chosen: RowMessages
    rejected: Message  # in place of the last of the chosen messages


def is_pair(columns: dict[str, Any]) -> bool:
    return all(not is_empty(columns.get(name)) for name in PAIR)


def read_pair(columns: dict[str, Any]) -> RowPair:
    """Raises ChatError if the answers are not two to the same question. A row may say that it is not to be learned."""
    chosen, rejected = (_read(columns, name) for name in ("chosen", "rejected"))
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise ChatError("its chosen and its rejected conversation differ before the last answer.")
    if chosen.messages == rejected.messages:
        raise ChatError("its chosen and its rejected answer are the same.")
    return RowPair(chosen, rejected.messages[-1])


def _read(columns: dict[str, Any], name: str) -> RowMessages:
    row = _with_answer(columns, name)
    found = read_row(row, recognise(row), keep_unwanted=True)
    if found.messages[-1]["role"] != "assistant" or len(found.messages) - 1 in found.context:
        raise ChatError(f"its {name} conversation does not end with an answer to learn from.")
    return found


def _with_answer(columns: dict[str, Any], name: str) -> dict[str, Any]:
    """The row as it would be if this were its only answer."""
    answer = unpacked(columns, name)
    others = {column: value for column, value in columns.items() if column not in PAIR | LABELS}
    spoken = answer[0] if isinstance(answer, list) and answer else answer
    if isinstance(spoken, dict) and spoken.get("role", spoken.get("from")) in STARTERS:
        return _beside(_without(others, *ASKED), conversations=answer)
    if "instruction" in others:
        return _beside(others, output=answer)
    asked = next((column for column in ASKED if column in others), None)
    if asked is None:
        return _beside(others, text=answer)
    rest = _without(others, *(column for column in ASKED if column == asked or column not in ABOUT))
    return _beside(rest, prompt=others[asked], completion=answer)


def _beside(others: dict[str, Any], **own: Any) -> dict[str, Any]:
    return {f"{column} (its own)" if column in own else column: value for column, value in others.items()} | own


def _without(columns: dict[str, Any], *names: str) -> dict[str, Any]:
    return {column: value for column, value in columns.items() if column not in names}
