"""Conversations as token ids, and as the labels that the loss is computed on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from llama2_chat.prompt import TokenizedExample
from llama2_chat.prompt.template import ToolObject
from llama2_chat.tools import PLAIN, plain
from llama2_chat.training.chat_data import SHOWN_FAULTS, Conversation
from llama2_chat.types import Message, ToolOffer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy passes over

Examples = dict[str, list[TokenizedExample]]  # by split


class Told(NamedTuple):
    """A conversation as the model reads it: with its tools, or with plain text for them."""

    messages: list[Message]
    context: Set[int]  # answers that are not learned, by their places in messages
    tools: tuple[ToolObject, ...] = ()


def tell(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Told:
    """As the chat tells the model of tools: through a template that takes them, or else as plain turns."""
    messages, context, tools = conversation.messages, conversation.context, conversation.tools
    if prompt.call_style(tokenizer) is not None:
        return Told(messages, context, tuple(map(prompt.tool_object, tools)))
    written = plain(messages, ToolOffer(tools) if tools else None)
    if not tools:
        return Told(written, context)
    # The examples of calls, which are the same for all, stand before what was said, and the system text first.
    first = len(written) - sum(message["role"] != "system" for message in messages)
    moved = first - sum(message["role"] == "system" for message in messages)
    return Told(written, {*range(first), *(place + moved for place in context)})


def question_ids(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt of the last answer."""
    told = tell(conversation._replace(messages=conversation.messages[:-1]), tokenizer)
    return prompt.encode(tokenizer, told.messages, tools=told.tools)


def said(message: Message) -> str:
    """What stands in a message, for people: calls as plain text."""
    calls = message.get("tool_calls") or ()
    return "\n".join(filter(None, [message["content"], *map(PLAIN.write, calls)]))


def tokenize(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    max_length: int,
) -> tuple[list[TokenizedExample], list[str]]:
    """Examples of at most max_length tokens, and notes on what had to go for that.

    A conversation that is too long loses its last exchanges: from an answer that is cut in the middle a model would
    learn not to end. One that is too long up to its first answer that is learned is left out. A plain text that is too
    long becomes several examples.
    """
    examples: list[TokenizedExample] = []
    faults, shortened = [], 0
    for conversation in conversations:
        if conversation.is_text:
            examples += _text_examples(conversation.messages[0]["content"], tokenizer, max_length)
            continue
        try:
            told = tell(conversation, tokenizer)
            example = prompt.encode_example(tokenizer, told.messages, stop_ids, context=told.context, tools=told.tools)
        except ChatError as error:
            faults.append(f"{conversation.place}: {error}")
            continue
        answers = [answer for answer in example.answers if answer[1] <= max_length]
        if not answers:
            faults.append(f"{conversation.place}: its first answer ends after {example.answers[0][1]:,} tokens.")
            continue
        if len(answers) < len(example.answers):
            shortened += 1
        examples.append(TokenizedExample(example.input_ids[: answers[-1][1]], answers))
    return examples, _notes(shortened, faults, max_length)


def _text_examples(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[TokenizedExample]:
    """All of it is learned, and at the end that it ends: a piece begins with the last token of the one before it."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*prompt.encode_text(tokenizer, text), *end]
    for start in range(0, len(ids), max(1, max_length - 1)):
        piece = ids[start : start + max_length]
        if len(piece) > 1:  # the first token of all is predicted from nothing
            yield TokenizedExample(piece, [(0, len(piece))])


def _notes(shortened: int, faults: list[str], max_length: int) -> list[str]:
    notes = []
    if shortened:
        notes.append(f"{shortened:,} are longer than {max_length:,} tokens and lose their last exchanges.")
    if faults:
        notes.append(f"{len(faults):,} are left out because they do not fit into {max_length:,} tokens or the format:")
        notes += [f"  {fault}" for fault in faults[:SHOWN_FAULTS]]
    return notes


def labels(example: TokenizedExample) -> list[int]:
    """The ids of the answers, each in its place, and IGNORED everywhere else."""
    labels = [IGNORED] * len(example.input_ids)
    for start, end in example.answers:
        labels[start:end] = example.input_ids[start:end]
    return labels


def mark_answers(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text as the model sees it, control tokens and all, with the ⟦tokens that have labels⟧ marked."""
    text, at = "", 0
    for start, end in example.answers:
        text += f"{tokenizer.decode(example.input_ids[at:start])}⟦{tokenizer.decode(example.input_ids[start:end])}⟧"
        at = end
    return text
