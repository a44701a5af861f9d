"""What may enter: messages are checked at this door, and become a system text and turns."""

from __future__ import annotations

from typing import Literal, NamedTuple

from llama2_chat.errors import BadGrammar, ChatError
from llama2_chat.text import valid_unicode
from llama2_chat.types import Message, SamplingParams


class Turn(NamedTuple):
    role: Literal["system", "user", "assistant"]
    content: str
    messages: int  # of the caller, joined in this turn


def check_messages(messages: list[Message]) -> tuple[str | None, list[Turn]]:
    """The system text, if there is one, and turns: user and assistant alternate.

    System messages are joined by blank lines, wherever they stand: templates take one, at the beginning. The first turn
    may be a greeting by the assistant; whether a format can write it is for the format to say. The last turn is the
    user's, or an answer to go on with, which is not empty.
    """
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise ChatError("A conversation is a list of messages, each with a role and a content.")
    systems: list[str] = []
    turns: list[Turn] = []
    question: str | None = None  # the newest
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ChatError(f"A message's role is system, user or assistant; it was {str(role)[:40]!r}.")
        if not isinstance(content, str):
            raise ChatError(f"A message's content is plain text; message {i + 1} holds something else.")
        # The tokenizer raises on a lone surrogate, such as half an emoji that a caller cut in two.
        content = valid_unicode(content)
        if role == "system":
            systems.append(content)
            continue
        if role == "user":
            question = content
        if turns and turns[-1].role == role:  # an answer stopped before its first word leaves two questions in a row
            joined = "\n\n".join(filter(None, [turns[-1].content, content]))
            turns[-1] = Turn(role, joined, turns[-1].messages + 1)
        else:
            turns.append(Turn(role, content, 1))
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


def newest_turns(turns: list[Turn]) -> list[Turn]:
    """The newest question, and what there is of its answer: without these there is nothing to ask."""
    return turns[-2:] if turns[-1].role == "assistant" else turns[-1:]


def droppable(messages: list[Message]) -> int:
    """How many of the messages go before the newest does."""
    _, turns = check_messages(messages)
    return sum(turn.messages for turn in turns[: -len(newest_turns(turns))])


def goes_on(turns: list[Turn], params: SamplingParams) -> bool:
    """Whether an answer that has begun is asked for the rest. Raises BadGrammar if that is to follow a grammar."""
    if turns[-1].role != "assistant":
        return False
    if params.grammar is not None:
        raise BadGrammar("An answer that has begun cannot be held to a grammar. Ask for it from the beginning.")
    return True
