"""What may enter: messages are checked at this door, and become a system text and turns."""

from __future__ import annotations

from typing import Literal, NamedTuple

from llama2_chat.errors import BadGrammar, ChatError
from llama2_chat.text import valid_unicode
from llama2_chat.types import Message, SamplingParams, ToolCall


class Turn(NamedTuple):
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    messages: int  # of the caller, joined in this turn
    calls: tuple[ToolCall, ...] = ()  # of the assistant
    call_id: str = ""  # of a tool's result
    name: str = ""  # of that tool
    is_example: bool = False  # that stands before the conversation


def check_messages(messages: list[Message]) -> tuple[str | None, list[Turn]]:
    """The system text, if there is one, and turns: user and assistant alternate.

    System messages are joined by blank lines, wherever they stand: templates take one, at the beginning. The first turn
    may be a greeting by the assistant; whether a format can write it is for the format to say. After an assistant's
    turn with calls come results, each a turn of its own. The last turn is the user's, a result, or an answer to go on
    with, which is not empty.
    """
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise ChatError("A conversation is a list of messages, each with a role and a content.")
    systems: list[str] = []
    turns: list[Turn] = []
    question: str | None = None  # the newest
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant", "tool"):
            raise ChatError(f"A message's role is system, user, assistant or tool; it was {str(role)[:40]!r}.")
        if not isinstance(content, str):
            raise ChatError(f"A message's content is plain text; message {i + 1} holds something else.")
        # The tokenizer raises on a lone surrogate, such as half an emoji that a caller cut in two.
        content = valid_unicode(content)
        if role == "system":
            systems.append(content)
            continue
        if role == "user":
            question = content
        calls = tuple(message.get("tool_calls") or ())
        turn = Turn(
            role,
            content,
            1,
            calls,
            message.get("tool_call_id", ""),
            message.get("name", ""),
            message.get("is_example", False),
        )
        # An answer stopped before its first word leaves two questions in a row.
        if role != "tool" and not calls and turns and turns[-1].role == role and not turns[-1].calls:
            turns[-1] = joined(turns[-1], turn)
        else:
            turns.append(turn)
    if turns and turns[-1].calls:
        raise ChatError("A conversation cannot end with calls of tools. Add what the tools returned.")
    if turns and turns[-1].role == "assistant":
        # An answer that was cut off within a character ends in U+FFFD: the model writes all of the character anew.
        unfinished = turns.pop()
        if text := unfinished.content.rstrip("\ufffd"):
            turns.append(unfinished._replace(content=text))
    if question is None:
        raise ChatError(
            "A conversation starts with a message from the user, and ends with one or with an answer to go on with."
        )
    if not question.strip():
        raise ChatError("The message is empty. Write something first.")
    return ("\n\n".join(filter(None, systems)) if systems else None), turns


def joined(first: Turn, second: Turn) -> Turn:
    """Two turns of the same role as one."""
    content = "\n\n".join(filter(None, [first.content, second.content]))
    return first._replace(content=content, messages=first.messages + second.messages)


def split_examples(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The examples, with which a conversation may begin, and what was said."""
    first = next((i for i, turn in enumerate(turns) if not turn.is_example), len(turns))
    return turns[:first], turns[first:]


def newest_turns(turns: list[Turn]) -> list[Turn]:
    """The newest question, and what there is of its answer, calls and results among it: without these there is nothing
    to ask."""
    return turns[question_indices(turns)[-1] :]


def question_indices(turns: list[Turn]) -> list[int]:
    """Where the user's turns stand: a conversation may begin with any of them."""
    return [i for i, turn in enumerate(turns) if turn.role == "user"]


def droppable(messages: list[Message]) -> int:
    """How many of the messages go before the newest does."""
    _, turns = split_examples(check_messages(messages)[1])
    return sum(turn.messages for turn in turns[: -len(newest_turns(turns))])


def goes_on(turns: list[Turn], params: SamplingParams) -> bool:
    """Whether an answer that has begun is asked for the rest. Raises BadGrammar if that is to follow a grammar."""
    if turns[-1].role != "assistant":
        return False
    if params.grammar is not None:
        raise BadGrammar("An answer that has begun cannot be held to a grammar. Ask for it from the beginning.")
    return True
