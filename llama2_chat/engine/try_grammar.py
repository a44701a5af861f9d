"""Trying a grammar out, before this process has anything to do with it.

Grammars come from strangers, and a small one can keep a compiler busy for hours or make it crash. So each is first
translated and compiled by a process of its own, which may take only so much time, memory and stack. What came of it is
kept.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from llama2_chat.engine.ending import Ending, ending_of, longest
from llama2_chat.engine.json_schema import Rewriter
from llama2_chat.engine.refusals import sentence, too_complex
from llama2_chat.errors import Busy
from llama2_chat.process import FROM_OUTSIDE, python_command, python_environment
from llama2_chat.types import GrammarKind, GrammarSpec

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
COMPILE_CPU_S = 1  # ordinary schemas take a millisecond, and Python's start a tenth of a second
COMPILE_WALL_S = 10  # of a computer that is busy with other things
COMPILE_BYTES = 2**28  # of addresses, of which a heap takes some for itself
COMPILE_STACK_BYTES = 2**20  # an eighth of what a thread has on Linux: what passes has room to spare here
SPARE_AFTER_S = 1  # when the answer that waited for this one's grammar has had its first token
NO_COMPUTER = "This computer is too busy to compile a grammar. Please try again in a minute."
KEPT_CHARACTERS = 2**25  # of grammars and what they were translated to
# As Python writes JSON. Where any whitespace is allowed, a small model can emit it until max_new_tokens. Which
# alternatives of a oneOf exclude each other, Rewriter has seen to.
FORM: Any = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "coerce_one_of": True,
}


@dataclass(frozen=True)
class Tried:
    """What came of a grammar."""

    source: str = ""  # as llguidance reads it: a list of grammars, of which the first is where an answer starts
    error: str = ""  # what is wrong with it, in a sentence
    relaxed: tuple[str, ...] = ()  # words of a JSON schema that answers may violate
    ending: Ending | None = None  # of its JSON; None where that may be endless, or there is none


# ---- What is known ----


class _Known:
    """The results that were last asked for, as many as KEPT_CHARACTERS hold. From any thread."""

    def __init__(self) -> None:
        self._results: OrderedDict[GrammarSpec, Tried] = OrderedDict()
        self._characters, self._lock = 0, threading.Lock()

    def get(self, spec: GrammarSpec) -> Tried | None:
        with self._lock:
            if spec in self._results:
                self._results.move_to_end(spec)
            return self._results.get(spec)

    def add(self, spec: GrammarSpec, result: Tried) -> None:
        with self._lock:
            self._results[spec] = result
            self._characters += _size(spec, result)
            while self._characters > KEPT_CHARACTERS:
                self._characters -= _size(*self._results.popitem(last=False))


def _size(spec: GrammarSpec, result: Tried) -> int:
    return len(spec.text) + len(result.source) + 1000


_known = _Known()
_one_at_a_time = threading.Lock()  # compiling shall not take all cores from those who decode


def tried(spec: GrammarSpec, patience_s: float) -> Tried:
    """What came of it, now or earlier. Raises Busy where others' take too long."""
    spec = replace(spec, strict=False)  # the same either way
    if result := _known.get(spec):
        return result
    if not _one_at_a_time.acquire(timeout=patience_s):
        raise Busy("Too many grammars are waiting to be compiled. Please try again in a minute.")
    try:
        result = _known.get(spec)  # while this waited
        if result is None:
            result = _try_apart(spec)
            _known.add(spec, result)
    finally:
        _one_at_a_time.release()
    return result


def _try_apart(spec: GrammarSpec) -> Tried:
    """Raises Busy where it is the computer that let it come to no end, which says nothing of the grammar."""
    try:
        process = _spare_or_new()
    except OSError as error:  # too many processes, or no memory for one
        raise Busy(NO_COMPUTER) from error
    try:
        written, _ = process.communicate(json.dumps([spec.kind, spec.text]).encode(), COMPILE_WALL_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    later = threading.Timer(SPARE_AFTER_S, _start_spare)
    later.daemon = True
    later.start()
    if -process.returncode in FROM_OUTSIDE:  # be it by COMPILE_WALL_S, before it has had COMPILE_CPU_S
        raise Busy(NO_COMPUTER)
    if process.returncode:
        return Tried(error=too_complex(spec.kind))
    result = json.loads(written)
    ending = None if result["ending"] is None else Ending(*result["ending"])
    return Tried(result["source"], result["error"], tuple(result["relaxed"]), ending)


_spare: list[subprocess.Popen[bytes]] = []  # one that waits for a grammar: Python takes a tenth of a second to start


def _spare_or_new() -> subprocess.Popen[bytes]:
    if _spare:
        process = _spare.pop()
        if process.poll() is None:
            return process
        process.communicate()  # ended while it waited
    return _start()


def _start_spare() -> None:
    if not _one_at_a_time.acquire(blocking=False):  # who is trying a grammar comes back here
        return
    try:
        if not _spare:
            with contextlib.suppress(OSError):  # too many processes, say
                _spare.append(_start())
    finally:
        _one_at_a_time.release()


def _start() -> subprocess.Popen[bytes]:
    """It ends by itself when this process does, for then it gets no grammar."""
    command, pipe = python_command(f"{__name__}:try_grammar"), subprocess.PIPE
    env = python_environment()
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env)


@atexit.register
def _end_spare() -> None:
    while _spare:
        process = _spare.pop()
        process.kill()
        process.communicate()


# ---- In the process ----


def try_grammar() -> None:
    """What the process does: a grammar comes in at stdin, and what came of it goes out at stdout."""
    with contextlib.suppress(ImportError):  # on Windows, where only COMPILE_WALL_S holds
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (COMPILE_BYTES, COMPILE_BYTES))
    threading.stack_size(COMPILE_STACK_BYTES)
    kind, text = json.loads(sys.stdin.buffer.read())
    if hasattr(signal, "ITIMER_PROF"):  # from now on: to start may have taken a busy computer as long
        signal.setitimer(signal.ITIMER_PROF, COMPILE_CPU_S)
    found: list[Tried] = []
    thread = threading.Thread(target=lambda: found.append(compile_here(kind, text)))
    thread.start()
    thread.join()
    (result,) = found
    sys.stdout.buffer.write(json.dumps(asdict(result)).encode())


def compile_here(kind: GrammarKind, text: str) -> Tried:
    """What comes of it, however long that takes and whatever it needs."""
    match kind:
        case "json_schema":
            return _try_schema(json.loads(text))
        case "regex":
            return _compile(kind, LLMatcher.grammar_from_regex(text))
    try:
        text = any_to_lark(text)
    except Exception as error:  # of many types, none of its own
        return Tried(error=sentence(kind, str(error)))
    text, schemas, relaxed = _with_schemas(text)
    return _compile(kind, json.dumps({"grammars": [{"lark_grammar": text}]}), schemas, relaxed)


def _with_schemas(lark: str) -> tuple[str, list[dict[str, Any]], set[str]]:
    """The grammar with its JSON schemas as Rewriter writes them, these, and what of them is relaxed."""
    relaxed: set[str] = set()
    schemas, pieces, end, decoder = [], [], 0, json.JSONDecoder()
    for match in re.finditer(r"%json\s*(?=\{)", lark):
        try:
            schema, after = decoder.raw_decode(lark, match.end())
        except ValueError:
            continue  # as llguidance will say
        rewriter = Rewriter(schema)
        schemas.append(_rewritten(rewriter, schema))
        pieces += [lark[end : match.end()], json.dumps(schemas[-1] | {"x-guidance": FORM})]
        end, relaxed = after, relaxed | rewriter.relaxed
    return "".join([*pieces, lark[end:]]), schemas, relaxed


def _try_schema(schema: dict[str, Any]) -> Tried:
    """First with each alternative of a oneOf as narrow as it must be; that may leave none, or be too much."""
    result = Tried()
    for exact_one_of in (True, False):
        rewriter = Rewriter(schema, exact_one_of)
        written = _rewritten(rewriter, schema)
        try:
            source = LLMatcher.grammar_from_json_schema(json.dumps(written), overrides=FORM)
        except ValueError as error:  # half of a character
            return Tried(error=sentence("json_schema", str(error)))
        result = _compile("json_schema", source, [written], rewriter.relaxed)
        if not (result.error and rewriter.narrowed_one_of):
            break
    return result


def _rewritten(rewriter: Rewriter, schema: dict[str, Any]) -> dict[str, Any]:
    try:
        return rewriter.rewritten()
    except (AttributeError, LookupError, TypeError, ValueError):
        return schema  # which is none, as llguidance will say


def _compile(
    kind: GrammarKind, source: str, schemas: Sequence[dict[str, Any]] = (), relaxed: Collection[str] = ()
) -> Tried:
    # With a tokenizer of 256 bytes it costs what it costs with any, and with none at all much less.
    matcher = LLMatcher(LLTokenizer("byte"), source, log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    if matcher.is_error():
        return Tried(error=sentence(kind, matcher.get_error()))
    return Tried(source, relaxed=tuple(sorted(relaxed)), ending=longest(map(ending_of, schemas)))
