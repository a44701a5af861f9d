"""Answers that follow a grammar: which ids may come next, as llguidance tells.

Grammars come from strangers, so each is first tried out in a process of its own (try_grammar.py); here it then takes no
more. While answers are made, llguidance's own limits hold.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer

from llama2_chat.engine.ending import Ending
from llama2_chat.engine.json_state import JsonState
from llama2_chat.engine.refusals import sentence, too_complex
from llama2_chat.engine.try_grammar import LIMITS, Tried, tried
from llama2_chat.engine.vocabulary import Vocabulary
from llama2_chat.engine.way_out import way_out
from llama2_chat.errors import BadGrammar, Busy
from llama2_chat.types import GrammarSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

UNKNOWN = Ending(least=80, step=8)  # of JSON that may be endless
LOOKED_AT = 1500  # tokens of ways to the end that one answer may have looked at, of 10 ms each where it is hostile
SPARE = 6  # tokens that the way to the end may be longer in the middle of a character, or of an escape
CLOSING = 24  # tokens that may stand behind the JSON of a call, its end and an id
PATIENCE_S = 10  # a grammar waits no longer for others' to be compiled


class Grammars:
    """Makes grammars for the answers of one model. From any thread: making one takes milliseconds, a second at most.

    vocab_size: how many logits there are; more than the tokenizer has tokens if the model is padded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: set[int]) -> None:
        self._hf_tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, stop_ids
        self._made: tuple[LLTokenizer, Vocabulary] | None = None
        self._making = threading.Lock()
        self._one_at_a_time = threading.Lock()  # compiling shall not take all cores from those who decode

    def grammar(self, spec: GrammarSpec, most_tokens: int | None = None) -> Grammar:
        """A grammar at its beginning. Raises BadGrammar if answers cannot be held to it.

        most_tokens: of the answer, which is brought to its end before they are used up, if its JSON can be.
        """
        found = tried(spec, PATIENCE_S)
        if found.error:
            raise BadGrammar(found.error)
        if spec.strict and found.relaxed:
            words = " and ".join(found.relaxed)
            raise BadGrammar(f"Answers cannot be held to {words} in this JSON schema, and strict is true.")
        (tokenizer, vocabulary), source = self._tokenizer(), found.source
        if self._begins_with_space:
            source = _after_space(source)
        if not self._one_at_a_time.acquire(timeout=PATIENCE_S):
            raise Busy("Too many grammars are waiting to be compiled. Please try again in a minute.")
        try:
            # Copies of a matcher would share their lexer's states, and a grammar used often would run out of them.
            matcher = LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
            matcher.compute_bitmask()
        finally:
            self._one_at_a_time.release()
        if matcher.is_error():
            raise BadGrammar(sentence(spec.kind, matcher.get_error()))
        return Grammar(matcher, vocabulary, spec, found, most_tokens)

    def _tokenizer(self) -> tuple[LLTokenizer, Vocabulary]:
        """Made once, while those who come first wait for it."""
        from llama2_chat.engine.grammar_tokens import llguidance_tokenizer  # which imports transformers

        with self._making:
            if self._made is None:
                try:
                    made = llguidance_tokenizer(self._hf_tokenizer, self._vocab_size, self._stop_ids)
                except ValueError as error:
                    raise BadGrammar("This model's tokenizer cannot be held to a grammar. Leave it out.") from error
                self._made = made, Vocabulary(made)
            return self._made

    @functools.cached_property
    def _begins_with_space(self) -> bool:
        """Llama 2 begins its answers with a space, which decoding takes away."""
        space = self._hf_tokenizer.get_vocab().get("▁")
        return space is not None and self._hf_tokenizer.decode([space]) == ""


def _after_space(source: str) -> str:
    grammar = json.loads(source)
    grammar["grammars"][0]["name"] = "answer"
    grammar["grammars"].insert(0, {"lark_grammar": "start: / ?/ @answer"})
    return json.dumps(grammar)


class Grammar:
    """What may come next in one answer: a request.TokenConstraint, made of a GrammarSpec.

    Its methods raise BadGrammar when that exceeds the limits of llguidance.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        spec: GrammarSpec,
        found: Tried,
        most_tokens: int | None = None,
    ) -> None:
        self.relaxed = found.relaxed  # words of the JSON schema that the answer may violate
        self._matcher, self._vocabulary, self._kind = matcher, vocabulary, spec.kind
        self._state = JsonState()
        self._left, self._ending = most_tokens, found.ending or UNKNOWN
        # JSON that begins after more tokens of the answer may be cut.
        self.last_start = (most_tokens or 0) - self._tokens_to_end(0) if found.ending else -1
        # An end is not looked for at once where that may be in vain: the first token should not wait.
        self._most = (most_tokens or 0) if self.last_start >= 0 else (most_tokens or 0) * 3 // 4
        self._look_at, self._may_look_at = self._most, LOOKED_AT
        self._way: list[int] = []  # to the end, once there is no time for anything else
        # Around the JSON of a Lark grammar there may be text, in which a number is as long as it likes.
        self._least_depth = 0 if spec.kind == "json_schema" else 1 if "%json" in spec.text else math.inf

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return self._matcher.is_stopped()

    def allow(self, mask: Tensor) -> None:
        """Write to mask, int32 on the CPU, a bit for each id that may come next, the lowest first."""
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        self._check()
        if self._least_depth == 1 and self._vocabulary.allows_line_end(mask):  # no JSON here does, so this is text
            self._state = JsonState()
        if self._state.depth >= self._least_depth:
            self._end_number(mask)
            self._end_in_time(mask)

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        quotes = self._state.quotes
        if token < len(self._vocabulary.texts):
            self._state.feed(self._vocabulary.texts[token])
        if self._left is not None:
            self._left -= 1
            if self._state.quotes != quotes:  # within a string, the way to the end stays as long as it is
                self._look_at, self._may_look_at = self._most, LOOKED_AT
        self._way = self._way[1:] if self._way[:1] == [token] else []

    def forced(self) -> list[int]:
        return [*self._way] or self._matcher.compute_ff_tokens()

    def _end_number(self, mask: Tensor) -> None:
        """Allow a number no more digits than mean anything: a small model can write them until max_new_tokens."""
        left = self._state.digits_left
        if left is None:
            return
        longer = self._vocabulary.longer_numbers(left)
        if longer is not None and (shorter := mask & ~longer).any():  # else the schema asks for more digits
            mask.copy_(shorter)

    def _end_in_time(self, mask: Tensor) -> None:
        """Take the way to the end when one more token could make it longer than what is left."""
        if self._left is None or self._left > min(self._look_at, self._tokens_to_end(self._state.depth)):
            return
        way = self._way or self._look()
        if way is None:  # it cannot be brought to its end, as far as is known
            self._look_at = 0
            return
        step, needed = self._ending.step, len(way) + SPARE
        if needed + step < self._left and needed < self._may_look_at:
            # Within a string, the way stays as long as it is.
            self._look_at = needed + step if self._state.in_string else self._left - (self._left - needed) // step
        elif way:
            self._way = way
            mask.copy_(self._vocabulary.only(way[0]))

    def _tokens_to_end(self, depth: int) -> int:
        """As many as are enough anywhere where so many brackets and braces are open."""
        return self._ending.within(depth) + SPARE + CLOSING

    def _look(self) -> list[int] | None:
        if self._left is None or self._may_look_at <= 0:
            return None
        way = way_out(self._matcher, self._vocabulary, self._state, self._left)
        self._may_look_at -= self._left if way is None else len(way)
        return way

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadGrammar(too_complex(self._kind))
