"""Step by step to an answer: the model says what to do, it is done, and the model reads what came of it.

Every step is held by a grammar. After max_steps, after max_seconds, and when a call is repeated or does not end, the
grammar leaves nothing but the answer: a small model would call tools for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace

from llama2_chat.agent.messages import Exchange, asked, called, came_of, opening, reminded, turns
from llama2_chat.agent.steps import ANSWER, StepReader, grammar
from llama2_chat.agent.tool import Step, Tool, call
from llama2_chat.types import ChatBackend, FinishReason, Message, SamplingParams


@dataclass(frozen=True)
class Plan:
    """What an agent works with."""

    chat: ChatBackend
    tools: Sequence[Tool]
    params: SamplingParams  # of every step and of the answer; the grammar is the loop's
    max_steps: int
    max_seconds: float  # after which no step begins, and no tool is waited for


class Stopped(Exception):
    """Somebody has stopped the loop, or the model has been closed."""


class Loop:
    """The way to one answer. emit: takes each Step, and then the pieces of the answer."""

    def __init__(self, plan: Plan, emit: Callable[[Step | str], None]) -> None:
        self._plan, self._emit = plan, emit
        self._deadline = time.monotonic() + plan.max_seconds
        self._steps: list[Step] = []
        self._answer = ""
        self._lock = threading.Lock()
        self._stopped = False
        self._cancel: Callable[[], object] | None = None  # ends what is going on now

    def run(self, question: str, exchanges: Sequence[Exchange]) -> tuple[Exchange, FinishReason]:
        """The question, answered. Raises Stopped, and what ChatBackend raises."""
        messages = self._conversation(question, exchanges)
        reason = self._take_steps(messages) or self._write_answer(messages)
        return Exchange(question, self._steps, self._answer), reason

    def stop(self) -> None:
        """Free the model within one step, and wait for no tool any longer; from any thread."""
        with self._lock:
            self._stopped, cancel = True, self._cancel
        if cancel:
            cancel()

    @property
    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def _conversation(self, question: str, exchanges: Sequence[Exchange]) -> list[Message]:
        """With as many exchanges as fit: the backend would leave out the oldest turns, which are the examples."""
        chat, params = self._plan.chat, self._plan.params
        while True:
            remembered = [message for exchange in exchanges for message in turns(exchange)]
            messages = [*opening(self._plan.tools), *remembered, asked(question)]
            if not (exchanges and chat.capabilities.counts_tokens and chat.fit(messages, params).dropped_messages):
                return messages
            exchanges = exchanges[1:]

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
            messages += [called(step), came_of(step)]
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
        reply = self._plan.chat.stream_reply([*messages] if tools else reminded(messages), params)
        with self._cancelled_by(reply.close), reply:
            for piece in reply:
                self._say(reader.feed(piece))
                if tools and reader.action != ANSWER and self._left_s <= 0:
                    return reader, "cancelled"
        if self._stopped or reply.finish_reason in (None, "cancelled"):
            raise Stopped
        return reader, reply.finish_reason

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
            with self._cancelled_by(outcome.cancel):
                return call(tool, input, outcome, self._left_s)
        except CancelledError as error:
            raise Stopped from error

    def _say(self, text: str) -> None:
        if text:
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
