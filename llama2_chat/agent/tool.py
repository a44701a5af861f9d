"""What a tool is, and how it is called: for so long and to so many characters, whatever it does.

A tool that raises, hangs or says too much becomes a failed step, and the agent goes on. This protects the answer, not
the machine: a tool runs in a thread of this process, may do what this process may, and one that hangs goes on hanging
in its thread. An agent should have only tools whose code is trusted, and no tool should trust its input.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from llama2_chat.errors import ChatError
from llama2_chat.text import valid_unicode

log = logging.getLogger("llama2_chat")

MAX_RESULT_CHARACTERS = 2_000  # some 500 tokens of a context window
MAX_CALLS = 16  # of one tool at once, in this process; those that hang count for as long as they do


@dataclass(frozen=True)
class Example:
    """A question that a tool is right for. A model learns from it when to call the tool, and how."""

    question: str
    input: Any
    result: str
    answer: str


class Tool(Protocol):
    """Something that a model may call. One tool may serve many agents, and be called from many threads at once."""

    @property
    def name(self) -> str: ...  # by which the model calls it

    @property
    def description(self) -> str: ...  # what it does, in a few words

    @property
    def input_schema(self) -> Mapping[str, Any]: ...  # a JSON schema that every input follows, without $ref

    @property
    def examples(self) -> Sequence[Example]: ...  # small models need one for each way of asking

    @property
    def timeout_s(self) -> float: ...  # after which a call counts as failed

    def run(self, input: Any) -> str:
        """The result. The sentence of a ChatError is shown to the model and to people; other errors are logged."""


def asks_first(tool: Tool) -> bool:
    """Whether a person has to allow each call: what changes things says so in an attribute of this name."""
    return bool(getattr(tool, "asks_first", False))


@dataclass(frozen=True)
class Call:
    """A tool that is being called, or would be if a person allowed it."""

    name: str
    input: Any  # as json.loads gives it
    asks: bool = False  # it waits for a person
    description: str = ""  # of the tool, as whoever made it wrote it
    version: str = ""  # of the tool; another one once it is described otherwise

    @classmethod
    def of(cls, tool: Tool, input: Any, *, asks: bool = False) -> Call:
        description = getattr(tool, "shown_description", tool.description)
        return cls(tool.name, input, asks, description, getattr(tool, "version", ""))


@dataclass(frozen=True)
class Step:
    """One call of a tool, as pages and programs show it."""

    name: str  # of the tool
    input: Any  # as json.loads gives it
    result: str  # or what went wrong, in a sentence
    seconds: float
    failed: bool = False


def call(tool: Tool, input: Any, outcome: Future[str], timeout_s: float) -> Step:
    """Call a tool and wait for it, timeout_s at most. Whatever the tool does, it is a step.

    outcome: where the tool's result goes; if anybody cancels it, the wait is over and CancelledError is raised.
    """
    started, timeout_s = time.monotonic(), max(min(timeout_s, tool.timeout_s), 0)
    try:
        result, failed = _checked(_start(tool, input, outcome).result(timeout_s)), False
    except ChatError as error:
        result, failed = str(error), True
    except BaseException as error:
        if outcome.cancelled():
            raise
        if isinstance(error, TimeoutError) and not outcome.done():
            result = f"The tool did not answer within {timeout_s:.3g} seconds."
        else:
            log.error("The tool %s failed", tool.name, exc_info=error)
            result = "The tool failed."
        failed = True
    return Step(tool.name, input, result, time.monotonic() - started, failed)


_places: dict[str, threading.Semaphore] = {}


def _start(tool: Tool, input: Any, outcome: Future[str]) -> Future[str]:
    """Let the tool run in a thread of its own, which ends with the process if not before."""
    places = _places.setdefault(tool.name, threading.Semaphore(MAX_CALLS))
    if not places.acquire(blocking=False):
        raise ChatError("The tool is busy with other calls.")

    def run() -> None:
        try:
            result = tool.run(input)
        except BaseException as error:
            with suppress(InvalidStateError):  # nobody waits any more
                outcome.set_exception(error)
        else:
            with suppress(InvalidStateError):
                outcome.set_result(result)
        finally:
            places.release()

    threading.Thread(target=run, name=f"tool {tool.name}", daemon=True).start()
    return outcome


def _checked(result: object) -> str:
    if not isinstance(result, str):
        raise TypeError(f"a tool's result is text; this was {type(result).__name__}")
    if len(result) > MAX_RESULT_CHARACTERS:
        raise ChatError(f"The tool's result has {len(result):,} characters; {MAX_RESULT_CHARACTERS:,} can be read.")
    return valid_unicode(result)
