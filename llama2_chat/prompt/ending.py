"""How a model's format ends an answer: as the chat template writes it, whatever the tokenizer calls its EOS."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llama2_chat.errors import ModelUnavailable
from llama2_chat.prompt.codec import MARK, codec_of
from llama2_chat.prompt.formats import LLAMA_2_FORMAT, recognise
from llama2_chat.prompt.messages import Turn
from llama2_chat.prompt.template import RENDERING_ERRORS, nonce, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Ending(NamedTuple):
    """What ends an answer."""

    ids: frozenset[int] = frozenset()  # of the token that ends it
    strings: tuple[str, ...] = ()  # the text that does so, where the template writes no token
    next_turn: frozenset[int] = frozenset()  # what follows: a model that writes one of these has nothing more to say


def find_ending(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """What stands in the model's format between an answer and the next question; nothing for a model without a format.

    The end is the first token, or in a text before it the first mark ("<|im_end|>" in a vocabulary that lacks it), or
    else the first line.
    """
    ids = tokenizer.get_added_vocab()
    try:
        if recognise(tokenizer) == LLAMA_2_FORMAT:
            return Ending(frozenset({ids["</s>"]}))
        after = _after_an_answer(tokenizer)
    except (ModelUnavailable, *RENDERING_ERRORS):
        return Ending()
    added = codec_of(tokenizer).added
    first = added.search(after)
    text = after[: first.start()] if first else after
    tokens = [ids[token] for token in added.findall(after)]
    if text.strip():
        return Ending(frozenset(), (_first_mark(text),), frozenset(tokens))
    return Ending(frozenset(tokens[:1]), (), frozenset(tokens[1:]))


def _after_an_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Up to the next question; where the newest answer ends otherwise than earlier ones do, up to the end.

    A template that refuses to end with an answer says nothing of a newest one.
    """
    nonces = [nonce() for _ in range(3)]
    asked, answered, again = Turn("user", nonces[0], 1), Turn("assistant", nonces[1], 1), Turn("user", nonces[2], 1)
    between = render(tokenizer, [asked, answered, again]).partition(nonces[1])[2].partition(nonces[2])[0]
    try:
        last = render(tokenizer, [asked, answered], add_generation_prompt=False).partition(nonces[1])[2]
    except RENDERING_ERRORS:
        return between
    return between if between.startswith(last) else last


def _first_mark(text: str) -> str:
    """The mark at the head of a text, or its first line, which then begins a line where the template says so."""
    line = text.strip().splitlines()[0].rstrip()
    mark = MARK.match(line)
    begins_a_line = "\n" in text[: text.index(line)]
    return mark[0] if mark else f"\n{line}" if begins_a_line else line
