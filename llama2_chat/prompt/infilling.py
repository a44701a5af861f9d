"""Code Llama fills in what stands between two texts: the prompt for it by ids, and which models can do it.

The ids are those of Meta's reference, infilling_prompt_tokens() in codellama/llama/generation.py, prefix first.
transformers' CodeLlamaTokenizer puts a space before the suffix, and keeps in itself what it was last asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat.prompt.codec import INFILLING_PIECES, Piece, codec_of
from llama2_chat.text import valid_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Before a text, it takes the space that SentencePiece puts at the head; then both are left out.
HEAD = "☺"
# How several editors send the prompt as text. Anywhere else the marks stay letters.
WRITTEN = re.compile(r"<PRE> (.*?) <SUF>(.*) <MID>", re.DOTALL)
SNIPPET = "\n\n--- snippet ---\n\n"  # before each further text, as llama.cpp writes it
NO_INFILLING = (
    "This model cannot fill in text before a suffix: it was not trained to, as CodeLlama-7b and CodeLlama-13b were. "
    "Leave the suffix out, or choose one of these."
)
MARKS = 4  # BOS, and the marks of prefix, suffix and gap
LEAST_SUFFIX = 4  # the part of the room that a suffix gets beside a long prefix, as in llama.cpp


class Infilling(NamedTuple):
    """The ids before the prefix, the suffix and the answer, and the id that ends the answer."""

    prefix: int
    suffix: int
    middle: int
    end: int


def find_infilling(tokenizer: PreTrainedTokenizerBase, rows: int) -> Infilling | None:
    """None for a model that was not trained for it: its vocabulary, or an embedding of so many rows, lacks the ids."""
    ids = [tokenizer.backend_tokenizer.token_to_id(piece) for piece in INFILLING_PIECES]
    known = [id for id in ids if id is not None and id < rows]
    return Infilling(*known) if len(known) == len(ids) else None


def written_infilling(text: str) -> tuple[str, str] | None:
    """Prefix and suffix of a prompt that is just "<PRE> prefix <SUF>suffix <MID>"; None of any other."""
    match = WRITTEN.fullmatch(text)
    return (match[1], match[2]) if match else None


def encode_infilling(
    tokenizer: PreTrainedTokenizerBase,
    infilling: Infilling,
    prefix: str,
    suffix: str,
    extra: Sequence[str] = (),
    room: int | None = None,
) -> list[int]:
    """The prompt after which the model writes what stands between two texts, none of which becomes a control token.

    extra: further texts, the nearest last; they stand before the prefix.
    room: tokens that the prompt may have. What is farthest from the gap is left out: texts of `extra`, then the head of
        the prefix and the tail of the suffix, which keeps a quarter of the room. None leaves everything in.
    """
    if room is not None:
        most = codec_of(tokenizer).most_characters(room)
        prefix, suffix, extra = prefix[-most:], suffix[:most], [text[-most:] for text in extra]
    texts = [prefix, HEAD + suffix, HEAD, *(SNIPPET + text for text in extra)]
    segments = [[Piece(valid_unicode(text), True)] for text in texts]
    before, after, head, *snippets = codec_of(tokenizer).encode_segments(segments, ())
    after, further = after[len(head) :], [id for snippet in snippets for id in snippet]
    if room is not None:
        left = max(room - MARKS, 0)
        after = after[: max(left // LEAST_SUFFIX, left - len(before))]
        before = _last(before, left - len(after))
        further = _last(further, left - len(after) - len(before))
    bos = tokenizer.backend_tokenizer.encode("").ids
    return [*bos, infilling.prefix, *further, *before, infilling.suffix, *after, infilling.middle]


def head_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What an answer is decoded after, so that its first word keeps its space."""
    return codec_of(tokenizer).encode_segments([[Piece(HEAD, True)]], ())[0]


def _last(ids: list[int], count: int) -> list[int]:
    return ids[len(ids) - count :] if count < len(ids) else ids
