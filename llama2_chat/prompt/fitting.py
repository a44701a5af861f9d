"""What fits in the context window: the newest message, and before it as many whole exchanges as there is room for."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat.errors import PromptTooLong
from llama2_chat.prompt.codec import codec_of
from llama2_chat.prompt.formats import Writer, writer
from llama2_chat.prompt.messages import Turn, check_messages
from llama2_chat.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
) -> Fitted:
    """The longest recent part of a conversation that leaves room for max_new_tokens in the context window.

    Whole exchanges go, oldest first; the system message and the newest message stay.
    Raises PromptTooLong if those two alone do not fit, else as encode() does.
    """
    system, turns = check_messages(messages)
    write = writer(tokenizer, chat_format)
    room = context_length - max_new_tokens

    # The usual case in one go. Hardly any text has more than 16 characters to a token; one that has takes the long way.
    if sum(len(turn.content) for turn in turns) <= 16 * room:
        input_ids = write(system, turns)
        if len(input_ids) <= room:
            return Fitted(input_ids, 0)

    newest = write(system, turns[-1:])
    if len(newest) > room:
        raise _too_long(len(newest), write, system, context_length, max_new_tokens)

    # Back from the newest, the words alone: where they no longer fit, the prompt does not either. So an old megabyte
    # is encoded once, and not at every step of the search.
    codec, start, left = codec_of(tokenizer), len(turns) - 1, room - len(newest)
    while start > 0 and left >= 0:
        start -= 2
        left -= sum(codec.count(turn.content.strip()) for turn in turns[start : start + 2])
    starts = range(start, len(turns), 2)
    first = starts[bisect_left(starts[:-1], True, key=lambda start: len(write(system, turns[start:])) <= room)]
    return Fitted(write(system, turns[first:]), sum(turn.messages for turn in turns[:first]))


def _too_long(T: int, write: Writer, system: str | None, context_length: int, max_new_tokens: int) -> PromptTooLong:
    """T: tokens of the system text and the newest message alone, with what the format adds."""
    word = [Turn("user", "Hello", 1)]
    S = len(write(system, word)) - len(write(None, word)) if system else 0
    return PromptTooLong(T, context_length, max_new_tokens, S, subject="message")
