"""Answers that follow a grammar: which ids may come next, as llguidance tells.

Grammars come from strangers, and a small one can keep a compiler busy for hours or make it crash. So each is first
compiled by a process of its own, which may take only so much time, memory and stack; here it then takes no more. While
answers are made, llguidance's own limits hold.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llama2_chat.errors import BadGrammar, Busy, ChatError
from llama2_chat.process import python_command
from llama2_chat.types import GrammarKind, GrammarSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# What one answer may take, in llguidance's units: some 10 ms of a core for a token and 30 MB. Its speed does not need
# what it could compute beforehand.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
COMPILE_CPU_S = 1  # ordinary schemas take a millisecond
COMPILE_WALL_S = 10  # of a computer that is busy with other things
COMPILE_BYTES = 2**28  # of addresses, of which a heap takes some for itself
COMPILE_STACK_BYTES = 2**20  # an eighth of what a thread has on Linux: what passes has room to spare here
PATIENCE_S = 10  # a new schema waits no longer for others' to be compiled
# As Python writes JSON. Where any whitespace is allowed, a small model can emit it until max_new_tokens.
FORM: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, "whitespace_pattern": None}
WHAT = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}  # of GrammarSpec.kind


class Grammars:
    """Makes grammars for the answers of one model. From any thread: making one takes milliseconds, a second at most.

    vocab_size: how many logits there are; more than the tokenizer has tokens if the model is padded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: set[int]) -> None:
        self._hf_tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, stop_ids
        self._one_at_a_time = threading.Lock()  # compiling shall not take all cores from those who decode

    def grammar(self, spec: GrammarSpec) -> Grammar:
        """A grammar at its beginning. Raises BadGrammar if answers cannot be held to it."""
        if not self._one_at_a_time.acquire(timeout=PATIENCE_S):
            raise Busy("Too many JSON schemas are waiting to be compiled. Please try again in a minute.")
        try:
            if error := _error(spec):
                raise BadGrammar(error)
            # Copies of a matcher would share their lexer's states, and a grammar used often would run out of them.
            matcher = LLMatcher(self._tokenizer, self._source(spec), log_level=0, limits=LIMITS)
            matcher.compute_bitmask()
        finally:
            self._one_at_a_time.release()
        if matcher.is_error():
            raise BadGrammar(_sentence(spec.kind, matcher.get_error()))
        return Grammar(matcher, spec.kind)

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llama2_chat.engine.grammar_tokens import llguidance_tokenizer  # which imports transformers

        try:
            return llguidance_tokenizer(self._hf_tokenizer, self._vocab_size, self._stop_ids)
        except ValueError as error:
            raise BadGrammar("This model's tokenizer cannot be held to a grammar. Leave it out.") from error

    def _source(self, spec: GrammarSpec) -> str:
        grammar = json.loads(_source(spec))
        # Llama 2 begins its answers with a space, which decoding takes away.
        space = self._hf_tokenizer.get_vocab().get("▁")
        if space is not None and self._hf_tokenizer.decode([space]) == "":
            grammar["grammars"][0]["name"] = "answer"
            grammar["grammars"].insert(0, {"lark_grammar": "start: / ?/ @answer"})
        return json.dumps(grammar)


class Grammar:
    """What may come next in one answer: a request.TokenConstraint, made of a GrammarSpec.

    Its methods raise ChatError when that exceeds the limits of llguidance.
    """

    def __init__(self, matcher: LLMatcher, kind: GrammarKind) -> None:
        self._matcher, self._kind = matcher, kind

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return self._matcher.is_stopped()

    def allow(self, mask: Tensor) -> None:
        """Write to mask, int32 on the CPU, a bit for each id that may come next, the lowest first."""
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        self._check()

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ChatError(_too_complex(self._kind))


def _source(spec: GrammarSpec) -> str:
    """As llguidance reads it: a list of grammars, of which the first is where an answer starts."""
    match spec.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(spec.text, overrides=FORM)
        case "regex":
            return LLMatcher.grammar_from_regex(spec.text)
    return json.dumps({"grammars": [{"lark_grammar": spec.text}]})


def _too_complex(kind: GrammarKind) -> str:
    return f"This {WHAT[kind]} is too complex to be followed. Make it smaller."


def _sentence(kind: GrammarKind, error: str) -> str:
    if "regex parse error" in error:  # then it draws the pattern, and says below it what is wrong
        error = f"regex parse error: {error.rpartition('error: ')[2]}"
    reason = error.partition("\n")[0].strip().rstrip(".").replace(". ", "; ")
    reason = "no value satisfies it" if reason.startswith("NoExtension") else reason
    return f"Answers cannot be held to this {WHAT[kind]}: {reason:.300}."


# ---- Trying a grammar out ----


@functools.lru_cache(maxsize=256)
def _error(spec: GrammarSpec) -> str:
    """What is wrong with it, in a sentence."""
    asked = json.dumps([spec.kind, spec.text]).encode()
    try:
        tried = subprocess.run(
            python_command(f"{__name__}:try_grammar"), input=asked, capture_output=True, timeout=COMPILE_WALL_S
        )
    except subprocess.TimeoutExpired:
        return _too_complex(spec.kind)
    return _too_complex(spec.kind) if tried.returncode else tried.stdout.decode()


def try_grammar() -> None:
    """What the process does: a grammar comes in at stdin, and what is wrong with it goes out at stdout."""
    with suppress(ImportError):  # on Windows, where only COMPILE_WALL_S holds
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (COMPILE_CPU_S, COMPILE_CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (COMPILE_BYTES, COMPILE_BYTES))
    threading.stack_size(COMPILE_STACK_BYTES)
    spec, found = GrammarSpec(*json.loads(sys.stdin.buffer.read())), []
    thread = threading.Thread(target=lambda: found.append(_compile(spec)))
    thread.start()
    thread.join()
    (error,) = found
    sys.stdout.buffer.write(error.encode())


def _compile(spec: GrammarSpec) -> str:
    """What is wrong with it."""
    try:
        source = _source(spec)
    except ValueError as error:
        return _sentence(spec.kind, str(error))
    # With a tokenizer of 256 bytes it costs what it costs with any, and with none at all much less.
    matcher = LLMatcher(LLTokenizer("byte"), source, log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    return _sentence(spec.kind, matcher.get_error()) if matcher.is_error() else ""
