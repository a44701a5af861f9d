"""Step by step to an answer: the model says what to do, it is done, and the model reads what came of it.

Every step is held by a grammar. After max_steps, after max_seconds, and when a call is repeated or does not end, the
grammar leaves nothing but the answer: a small model would call tools for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from llama2_chat.agent.messages import Exchange, asked, begun, opening, reminded, steps_taken, turns
from llama2_chat.agent.steps import ANSWER, StepReader, grammar
from llama2_chat.agent.tool import Call, Step, Tool, asks_first, call
from llama2_chat.types import ChatBackend, FinishReason, Fit, Message, Reply, SamplingParams, Timing, Usage

log = logging.getLogger("llama2_chat")

ASKED_S = 300.0  # that a person has to allow a call; it does not count in max_seconds
STEP_TOKENS = 128  # for a call, and for what stands around an answer; params.max_new_tokens are for the answer's text


@dataclass(frozen=True)
class Plan:
    """What an agent works with."""

    chat: ChatBackend
    tools: Sequence[Tool]
    params: SamplingParams  # of every step and of the answer; the grammar is the loop's
    max_steps: int
    max_seconds: float  # after which no step begins, and no tool is waited for
    instructions: str = ""  # of whoever asks, in the system text
    confirm: Callable[[Call], bool] | None = None  # asks a person, in a thread of its own
    examples: Sequence[Exchange] = ()  # beside those of the tools

    def conversation(self, question: str, exchanges: Sequence[Exchange]) -> tuple[list[Message], int]:
        """What the model reads, and how many of the latest exchanges are in it: as many as fit.

        The backend would leave out the oldest turns, which are the examples.
        """
        while True:
            remembered = [message for exchange in exchanges for message in turns(exchange)]
            messages = [*opening(self.tools, self.instructions, self.examples), *remembered, asked(question)]
            counts = exchanges and self.chat.capabilities.counts_tokens
            if not (counts and self.chat.fit(messages, self.params).dropped_messages):
                return messages, len(exchanges)
            exchanges = exchanges[1:]

    def fit(self, question: str, exchanges: Sequence[Exchange]) -> tuple[Fit, int]:
        """How that stands in the context window; an exchange is left out whole."""
        messages, remembered = self.conversation(question, exchanges)
        return replace(self.chat.fit(messages, self.params), dropped_messages=0), remembered


class Stopped(Exception):
    """Somebody has stopped the loop, or the model has been closed."""


class Loop:
    """The way to one answer. emit: takes each Step, and then the pieces of the answer; started: called once the model
    has taken the question.

    calling: what is done now that is no work of the model's. max_seconds are counted from the model's first word: who
    waits in line loses nothing.
    """

    calling: Call | None = None

    def __init__(
        self, plan: Plan, emit: Callable[[Step | str], None], started: Callable[[], None] = lambda: None
    ) -> None:
        self._plan, self._emit, self._started = plan, emit, started
        self._deadline: float | None = None
        self._begun = time.monotonic()
        self._first_piece: float | None = None  # of the answer
        self._replies: list[Reply] = []
        self._steps: list[Step] = []
        self._answer = ""
        self._lock = threading.Lock()
        self._stopped = False
        self._cancel: Callable[[], object] | None = None  # ends what is going on now

    def run(self, question: str, exchanges: Sequence[Exchange]) -> tuple[Exchange, FinishReason]:
        """The question, answered. Raises Stopped, and what ChatBackend raises."""
        messages, _ = self._plan.conversation(question, exchanges)
        reason = self._take_steps(messages) or self._write_answer(messages)
        return Exchange(question, self._steps, self._answer), reason

    def go_on(self, unfinished: Exchange, exchanges: Sequence[Exchange]) -> tuple[Exchange, FinishReason]:
        """The rest of an answer that was cut off, without tools. Raises as run does."""
        messages, _ = self._plan.conversation(unfinished.question, exchanges)
        messages += [*steps_taken(unfinished.steps), begun(unfinished.answer)]
        reader = StepReader(messages[-1]["content"])
        reason = self._read(reader, messages, self._plan.params, lambda: reader.is_whole)
        whole = replace(unfinished, answer=unfinished.answer + self._answer)
        return whole, "stop" if reader.is_whole else reason

    def stop(self) -> None:
        """Free the model within one step, and wait for no tool any longer; from any thread."""
        with self._lock:
            self._stopped, cancel = True, self._cancel
        if cancel:
            cancel()

    @property
    def queue_position(self) -> int:
        return self._replies[-1].queue_position if self._replies else 0

    @property
    def usage(self) -> Usage:
        """Of all that the model has read and written on the way."""
        usages = [reply.usage for reply in [*self._replies]]
        return Usage(
            sum(usage.prompt_tokens for usage in usages),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.cached_tokens for usage in usages),
        )

    @property
    def timing(self) -> Timing:
        """To the first piece of the answer, steps included; the speed is that of the answer."""
        first_s = None if self._first_piece is None else self._first_piece - self._begun
        return Timing(first_s, self._replies[-1].timing.tokens_per_second if self._replies else None)

    @property
    def _left_s(self) -> float:
        if self._deadline is None:
            return self._plan.max_seconds
        return self._deadline - time.monotonic()

    def _take_steps(self, messages: list[Message]) -> FinishReason | None:
        """How the answer ended; None if there is none yet and it is time for one. Adds to the messages."""
        while len(self._steps) < self._plan.max_steps and self._left_s > 0:
            reader, reason = self._generate(messages, self._plan.tools)
            if reader.action == ANSWER:
                return reason
            step = self._step(reader)
            if step is None:
                return None
            self._steps.append(step)
            self._emit(step)
            messages += steps_taken([step])
        return None

    def _write_answer(self, messages: list[Message]) -> FinishReason:
        reader, reason = self._generate(messages, ())
        if reader.action != ANSWER:  # a server that holds its model to no grammar: what it says is the answer
            self._say(reader.text)
        return reason

    def _generate(self, messages: list[Message], tools: Sequence[Tool]) -> tuple[StepReader, FinishReason]:
        """What the model says next; where it may call tools, until time is up."""
        reader = StepReader()
        params = replace(self._plan.params, grammar=grammar(tools))

        def is_late() -> bool:
            return bool(tools) and reader.action != ANSWER and self._left_s <= 0

        return reader, self._read(reader, [*messages] if tools else reminded(messages), params, is_late)

    def _read(
        self, reader: StepReader, messages: list[Message], params: SamplingParams, enough: Callable[[], bool]
    ) -> FinishReason:
        """Say what of the answer the model writes, to its end or until it is enough."""
        longest, before = params.max_new_tokens, None
        params = replace(params, max_new_tokens=longest + STEP_TOKENS)
        reply = self._plan.chat.stream_reply(messages, params)
        self._replies.append(reply)
        with self._cancelled_by(reply.close), reply:
            self._started()
            for number, piece in enumerate(reply):
                self._deadline = self._deadline or time.monotonic() + self._plan.max_seconds
                tokens = reply.usage.completion_tokens or number + 1
                if (text := reader.feed(piece)) and before is None:
                    before = tokens - 1
                self._say(text)
                if enough():
                    return "cancelled"
                if before is not None and tokens - before >= longest and not reader.is_whole:
                    return "length"
        if self._stopped or reply.finish_reason in (None, "cancelled"):
            raise Stopped
        return reply.finish_reason

    def _step(self, reader: StepReader) -> Step | None:
        """Call the tool that the model asks for; None if that leads nowhere: it is no whole call, or has been made."""
        asked_for = reader.call()
        if asked_for is None or self._left_s <= 0 or asked_for in [(step.name, step.input) for step in self._steps]:
            return None
        name, input = asked_for
        tool = next((tool for tool in self._plan.tools if tool.name == name), None)
        if tool is None:
            return Step(name, input, "There is no such tool.", 0, failed=True)
        outcome: Future[str] = Future()
        try:
            if refusal := asks_first(tool) and self._refusal(tool, input):
                return Step(name, input, refusal, 0, failed=True)
            self.calling = Call.of(tool, input)
            with self._cancelled_by(outcome.cancel):
                return call(tool, input, outcome, self._left_s)
        except CancelledError as error:
            raise Stopped from error
        finally:
            self.calling = None

    def _refusal(self, tool: Tool, input: Any) -> str:
        """Why a person did not allow this call; "" if they did."""
        confirm, allowed, begun = self._plan.confirm, Future[bool](), time.monotonic()
        assert confirm  # Agent takes no tool that asks without it
        self.calling = asked_for = Call.of(tool, input, asks=True)

        def ask() -> None:
            try:
                answer = confirm(asked_for)
            except Exception:
                log.exception("Asking whether the tool %s may be called failed", tool.name)
                answer = False
            with suppress(InvalidStateError):  # nobody waits any more
                allowed.set_result(answer)

        threading.Thread(target=ask, name=f"ask {tool.name}", daemon=True).start()
        try:
            with self._cancelled_by(allowed.cancel):
                return "" if allowed.result(ASKED_S) else "This call was not allowed."
        except TimeoutError:
            return "Nobody has allowed this call."
        finally:
            if self._deadline is not None:
                self._deadline += time.monotonic() - begun

    def _say(self, text: str) -> None:
        if text:
            self._first_piece = self._first_piece or time.monotonic()
            self._answer += text
            self._emit(text)

    @contextmanager
    def _cancelled_by(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Inside, stop() calls cancel."""
        with self._lock:
            self._cancel, stopped = cancel, self._stopped
        try:
            if stopped:
                cancel()
                raise Stopped
            yield
        finally:
            with self._lock:
                self._cancel = None
