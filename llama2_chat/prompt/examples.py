"""Conversations as a model is trained on them: the ids that the chat will use, and which of them the model writes."""

from __future__ import annotations

from collections.abc import Container, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.prompt.formats import writer
from llama2_chat.prompt.messages import check_messages
from llama2_chat.prompt.template import ToolObject
from llama2_chat.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizedExample(NamedTuple):
    """A conversation to train on: its ids, and the start and end of each answer to learn, stop ids included."""

    input_ids: list[int]
    answers: list[tuple[int, int]]


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    stop_ids: Container[int],
    chat_format: str | None = None,
    context: Set[int] = frozenset(),
    tools: Sequence[ToolObject] = (),
) -> TokenizedExample:
    """A conversation that ends with an answer, in the ids that encode() would give it, and the answers among them.

    context: places in messages of answers that are not to be learned. Several answers in a row are one in the format,
    and the place of the first counts.
    tools: as encode() takes them.

    An answer is what the model has to write after the prompt of its question, up to and including the stop
    id: without it a model never learns to end.
    Raises ChatError as encode() does, and if the chat format writes an answer in other ids than the model would.
    """
    system, turns = check_messages([*messages, {"role": "user", "content": "Go on."}])
    if turns[-1].messages > 1 or len(turns) == 1:
        raise ChatError("A conversation to train on ends with an answer.")
    if turns[0].role != "user":
        raise ChatError("A conversation to train on starts with a message from the user.")
    write = writer(tokenizer, chat_format, tools)
    input_ids, answers = write(system, turns), []
    spoken = [place for place, message in enumerate(messages) if message["role"] != "system"]
    for i, turn in enumerate(turns):
        if turn.role != "assistant" or spoken[sum(turn.messages for turn in turns[:i])] in context:
            continue
        asked = write(system, turns[:i])
        start = len(asked)
        end = next((t + 1 for t in range(start, len(input_ids)) if input_ids[t] in stop_ids), None)
        if input_ids[:start] != asked or end is None:
            raise ChatError(
                "This conversation cannot be trained on in the model's format: either earlier turns change as the "
                "conversation goes on, or an answer ends without the token that stops the model."
            )
        answers.append((start, end))
    return TokenizedExample(input_ids[: answers[-1][1]], answers)
