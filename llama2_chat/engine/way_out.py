"""A short way from where an answer in JSON stands to its end, so that it ends before its last token."""

from __future__ import annotations

import copy

from llguidance import LLMatcher

from llama2_chat.engine.json_state import JsonState
from llama2_chat.engine.vocabulary import Vocabulary

# What is tried first outside of strings: what closes, then what is short, then what opens.
OUTSIDE = b'}]"01nft-[{,: '
# Within a string: its end, or else what the pattern of an address or a time asks for, a mark and a letter in turn.
MARKS, LETTERS = b"@.:/-", b"0a"
LATELY = 8  # tokens: a mark is not tried again so soon


def way_out(matcher: LLMatcher, vocabulary: Vocabulary, state: JsonState, most: int) -> list[int] | None:
    """Tokens that end an answer, the last of them an end token if one is needed; None if these are not found in `most`.

    It is not always the shortest: nothing is taken back. Some 0.1 ms for each token of it.
    """
    matcher, state = matcher.deep_copy(), copy.copy(state)
    way: list[int] = []
    while len(way) <= most and not matcher.is_error():
        if matcher.is_stopped():
            return way
        if matcher.is_accepting():
            return [*way, vocabulary.end] if len(way) < most else None
        tokens = matcher.compute_ff_tokens() or [_next(matcher.compute_bitmask(), vocabulary, state.in_string, way)]
        if not matcher.consume_tokens(tokens):
            return None
        way += tokens
        for token in tokens:
            state.feed(vocabulary.texts[token])
    return None


def _next(mask: bytes, vocabulary: Vocabulary, in_string: bool, way: list[int]) -> int:
    for token in _in_string(vocabulary, way) if in_string else _tokens(vocabulary, OUTSIDE):
        if mask[token // 8] >> token % 8 & 1:
            return token
    return next((8 * index + (byte & -byte).bit_length() - 1 for index, byte in enumerate(mask) if byte), 0)


def _in_string(vocabulary: Vocabulary, way: list[int]) -> list[int]:
    marks, letters = _tokens(vocabulary, MARKS), _tokens(vocabulary, LETTERS)
    fresh = [mark for mark in marks if mark not in way[-LATELY:]]
    first = letters + fresh if set(way[-1:]) <= set(marks) and way else fresh + letters
    return [*_tokens(vocabulary, b'"'), *first, *marks]


def _tokens(vocabulary: Vocabulary, text: bytes) -> list[int]:
    return [vocabulary.of_byte[byte] for byte in text if byte in vocabulary.of_byte]
