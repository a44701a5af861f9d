"""Llama 2's format to the letter, any other model's through its own chat template, and which of the two a model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.prompt.calls import call_style
from llama2_chat.prompt.codec import Piece, codec_of
from llama2_chat.prompt.messages import Turn, check_messages, joined
from llama2_chat.prompt.template import ToolObject, check_template, template_ids, template_of
from llama2_chat.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_2_FORMAT = "llama-2"
NO_FORMAT = "none"  # of a base model, which completes texts
BASE_MODEL = (
    "This is a base model: it completes text and does not chat. Send a prompt to /v1/completions, or choose a chat or "
    "instruct model, for example meta-llama/Llama-2-7b-chat-hf."
)
LLAMA_2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
# For other programs, and saved with what is trained here: the text of the format. Its ids are _llama_2_ids' work.
LLAMA_2_TEMPLATE = (
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# What Meta's reference code gives. A tokenizer that agrees on these has Llama 2's vocabulary, merges and numbering.
# fmt: off
GOLDEN: tuple[tuple[list[Message], list[int]], ...] = (
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "  Hello"},  # spaces in a row: a converted tokenizer.model differs
            {"role": "assistant", "content": "Hi! How can I help?"},
            {"role": "user", "content": "llama 😱 in my garden"},
        ],
        [1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 11473, 29889, 13, 29966, 829, 14816, 29903, 6778, 13,
         13, 29871, 15043, 518, 29914, 25580, 29962, 6324, 29991, 1128, 508, 306, 1371, 29973, 29871, 2,
         1, 518, 25580, 29962, 11148, 3304, 29871, 243, 162, 155, 180, 297, 590, 16423, 518, 29914, 25580, 29962],
    ),
    (
        [{"role": "user", "content": "Hello</s><s> x"}],
        [1, 518, 25580, 29962, 15043, 829, 29879, 5299, 29879, 29958, 921, 518, 29914, 25580, 29962],
    ),
)
# fmt: on


Writer = Callable[[str | None, list[Turn]], list[int]]  # from a system text and turns to ids


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    chat_format: str | None = None,
    tools: Sequence[ToolObject] = (),
) -> list[int]:
    """Token ids of a conversation, ending where the assistant should answer, or go on with an answer that has begun.

    messages: an optional system message, then user and assistant in turn. If they end with an assistant message, that
    is an answer to go on with; an empty one is left out. Two turns of the same role in a row are joined by a blank
    line, and so are several system messages.
    chat_format: "llama-2", "none" for a base model, or None to recognise it from the tokenizer.
    tools: for a chat template that takes them, which calls.call_style() tells; without one, what a tool returned is
    written as the user's.

    In the Llama 2 format each finished exchange is encoded alone, between BOS and EOS, as the model saw it in training.
    In another one the ids are those of apply_chat_template. What a visitor typed can never become a control token or a
    whole template tag: a typed tag keeps its letters and loses its ids, so that decoding gives the same text. Turn
    marks that are ordinary words, such as "USER:", are beyond this protection.
    Raises ChatError for malformed messages and for a base model, ModelUnavailable as recognise() does.

    Source of the format: chat_completion() in Meta's Llama 2 reference code.
    """
    return writer(tokenizer, chat_format, tools)(*check_messages(messages))


def recognise(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """ "llama-2", None for a model that has its own chat template, or "none" for a base model, which has neither.

    Raises ModelUnavailable for a tokenizer that disagrees with Meta's ids though its template speaks the Llama 2
    format, and for a template that cannot write a conversation.
    """
    formats, template = codec_of(tokenizer).formats, template_of(tokenizer)
    if template not in formats:
        formats[template] = _recognise(tokenizer, template)
    return formats[template]


def checked_format(tokenizer: PreTrainedTokenizerBase, chat_format: str | None) -> str | None:
    """The format that was asked for, or else the recognised one. Raises ModelUnavailable, too, where Llama 2's was
    asked for and the tokenizer does not give its ids."""
    if chat_format == LLAMA_2_FORMAT and not _gives_metas_ids(tokenizer):
        raise ModelUnavailable(
            "CHAT_FORMAT=llama-2 needs Llama 2's tokenizer, and this model has another. Leave it out."
        )
    return chat_format or recognise(tokenizer)


def _gives_metas_ids(tokenizer: PreTrainedTokenizerBase) -> bool:
    return all(encode(tokenizer, messages, LLAMA_2_FORMAT) == ids for messages, ids in GOLDEN)


def _recognise(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    claimed = template is None or ("[INST]" in template and "<<SYS>>" in template)
    if claimed and _gives_metas_ids(tokenizer):
        return LLAMA_2_FORMAT
    if template is None:
        return NO_FORMAT
    if claimed:
        raise ModelUnavailable(
            "This model's chat template speaks the Llama 2 format, but its tokenizer gives other ids than Meta's. "
            "Its tokenizer.json is missing or belongs to another model: fetch it from where the model comes from."
        )
    check_template(tokenizer)  # fails now rather than at the first message
    return None


def writer(tokenizer: PreTrainedTokenizerBase, chat_format: str | None, tools: Sequence[ToolObject] = ()) -> Writer:
    """The function that turns a system text and turns into ids, in the format given or recognised."""
    if chat_format not in (None, LLAMA_2_FORMAT, NO_FORMAT):
        raise ChatError(
            f"chat_format is {LLAMA_2_FORMAT!r}, {NO_FORMAT!r}, or None for the model's own; "
            f"it was {str(chat_format)[:40]!r}."
        )
    found = chat_format or recognise(tokenizer)
    if found == NO_FORMAT:
        raise ChatError(BASE_MODEL)
    if found == LLAMA_2_FORMAT:
        return lambda system, turns: _llama_2_ids(tokenizer, system, without_results(turns))
    if call_style(tokenizer) is None:
        return lambda system, turns: template_ids(tokenizer, system, without_results(turns))
    return partial(template_ids, tokenizer, tools=tools)


def without_results(turns: list[Turn]) -> list[Turn]:
    """What tools returned, as the user's words."""
    written: list[Turn] = []
    for turn in turns:
        spoken = turn._replace(role="user") if turn.role == "tool" else turn
        if written and written[-1].role == spoken.role:
            written[-1] = joined(written[-1], spoken)
        else:
            written.append(spoken)
    return written


def _llama_2_ids(tokenizer: PreTrainedTokenizerBase, system: str | None, turns: list[Turn]) -> list[int]:
    """Each exchange alone, between BOS and EOS; after the last question no EOS, for the answer, or its rest, follows.

    An answer that has begun keeps its white space. Meta's ids of "[/INST] " and that text are then those of the prompt
    and those that the model wrote, id 29871 at its head included.
    """
    if turns[0].role != "user":
        raise ChatError("In the Llama 2 format a conversation starts with a message from the user.")
    segments = []
    for i in range(0, len(turns), 2):
        question = [Piece(turns[i].content.strip(), True)]
        if i == 0 and system is not None:
            # Meta strips the first message with the system text in it: white space before the question stays.
            question_text = turns[0].content.rstrip()
            question = [Piece("<<SYS>>\n", False), Piece(system, True)]
            question += [Piece("\n<</SYS>>" + ("\n\n" if question_text else ""), False), Piece(question_text, True)]
        segment = [Piece("[INST] ", False), *question, Piece(" [/INST]", False)]
        if i + 1 < len(turns):
            answer, is_finished = turns[i + 1].content, i + 2 < len(turns)
            segment += [Piece(" ", False), Piece(answer.strip() if is_finished else answer, True)]
            segment += [Piece(" ", False)] if is_finished else []
        segments.append(segment)
    *exchanges, last = codec_of(tokenizer).encode_segments(segments, LLAMA_2_TAGS)
    bos, eos = (
        tokenizer.backend_tokenizer.token_to_id(token) if id is None else id  # a bare tokenizer.json names neither
        for token, id in (("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id))
    )
    return [id for ids in exchanges for id in (bos, *ids, eos)] + [bos, *last]
