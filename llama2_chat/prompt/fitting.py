"""What fits in the context window: the newest message, and before it as many whole exchanges as there is room for.

What there is of an answer to go on with belongs to the newest message.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat.errors import PromptTooLong, Subject
from llama2_chat.prompt.codec import check_length, codec_of
from llama2_chat.prompt.formats import Writer, writer
from llama2_chat.prompt.messages import Turn, check_messages, newest_turns, question_indices, split_examples
from llama2_chat.prompt.template import ToolObject
from llama2_chat.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MEGABYTE = 2**20  # characters; a shorter turn may be mostly thoughts, which a template leaves out
MERGED = 4  # tokens by which an exchange may be shorter where its ends meet others


class Fitted(NamedTuple):
    """A prompt that fits, and how many of the caller's messages were left out for it."""

    input_ids: list[int]
    dropped_messages: int


def fit(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    context_length: int,
    max_new_tokens: int,
    chat_format: str | None = None,
    tools: Sequence[ToolObject] = (),
) -> Fitted:
    """The longest recent part of a conversation that leaves room for max_new_tokens in the context window.

    Whole exchanges go, oldest first, and a greeting before them; the system message, examples, and the newest message
    with the calls and results after it stay. tools: as encode() takes them.
    Raises PromptTooLong if these alone do not fit, else as encode() does.
    """
    system, turns = check_messages(messages)
    shown, turns = split_examples(turns)
    newest = newest_turns(turns)
    _check_length(tokenizer, [Turn("system", system or "", 1), *shown, *newest], tools, context_length)
    write_all, codec = writer(tokenizer, chat_format, tools), codec_of(tokenizer)
    room = context_length - max_new_tokens

    def write(system: str | None, turns: list[Turn]) -> list[int]:
        return write_all(system, [*shown, *turns])

    # The usual case in one go. Hardly any text has more than 16 characters to a token; one that has takes the long way.
    if sum(len(_written(turn)) for turn in turns) <= 16 * room:
        input_ids = write(system, turns)
        if len(input_ids) <= room:
            return Fitted(input_ids, 0)

    least = len(write(system, newest))
    if least > room:
        word = [Turn("user", "Hello", 1)]
        S = len(write(system, word)) - len(write_all(None, word))  # tokens of what stands before any conversation
        raise PromptTooLong(least, context_length, max_new_tokens, S, subject_of(newest), bool(shown))

    # Back from the newest, each exchange by itself: where they no longer fit, the prompt does not either. So an old
    # megabyte is encoded once, and not at every step of the search.
    *questions, last = question_indices(turns)
    starts, left = [last], room - least
    for start in reversed(questions):
        exchange = turns[start : starts[0]]
        if any(len(text) > MEGABYTE and codec.at_least(text) > context_length for text in map(_written, exchange)):
            break  # unread
        left -= _at_least(exchange, write)
        if left < 0:
            break
        starts.insert(0, start)
    if starts[0] == 1:  # before the first question is a greeting
        starts.insert(0, 0)
    first = starts[bisect_left(starts[:-1], True, key=lambda start: len(write(system, turns[start:])) <= room)]
    return Fitted(write(system, turns[first:]), sum(turn.messages for turn in turns[:first]))


def check_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Sequence[ToolObject], context_length: int
) -> None:
    """Raise PromptTooLong for a conversation, or tools for it, that cannot fit, unread."""
    system, turns = check_messages(messages)
    _check_length(tokenizer, [Turn("system", system or "", 1), *turns], tools, context_length)


def _check_length(
    tokenizer: PreTrainedTokenizerBase, turns: Iterable[Turn], tools: Sequence[ToolObject], context_length: int
) -> None:
    described = (json.dumps(tool, ensure_ascii=False) for tool in tools)
    check_length(tokenizer, [*described, *map(_written, turns)], context_length)


def _written(turn: Turn) -> str:
    """What somebody else wrote of a turn."""
    return "".join([turn.content, *(call["arguments"] for call in turn.calls)])


def _at_least(exchange: list[Turn], write: Writer) -> int:
    """Tokens that an exchange takes in any conversation: as the template writes it, which may leave thoughts out."""
    word = [Turn("user", "Hello", 1)]
    return len(write(None, [*exchange, *word])) - len(write(None, word)) - MERGED


def subject_of(newest: list[Turn]) -> Subject:
    """What is too long if the newest turns are."""
    return "message" if len(newest) == 1 else "message and its answer so far"
