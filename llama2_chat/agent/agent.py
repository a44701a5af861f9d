"""Questions answered with the help of tools, by any ChatBackend.

    agent = Agent(chat)
    with agent.ask("What is 15% of 240?") as reply:
        for event in reply:  # a Step after each call of a tool, then the answer, in pieces of text
            print(event)

Not here: which tools there are. Calculator and Clock are given if none are named; see tool.Tool for one of your own.
"""

from __future__ import annotations

import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from llama2_chat.agent.calculator import Calculator
from llama2_chat.agent.clock import Clock
from llama2_chat.agent.loop import Loop, Plan, Stopped
from llama2_chat.agent.messages import Exchange
from llama2_chat.agent.steps import ANSWER
from llama2_chat.agent.tool import Call, Step, Tool, asks_first
from llama2_chat.channel import Channel
from llama2_chat.types import ChatBackend, FinishReason, Fit, SamplingParams, Timing, Usage

MEMORY = 5  # exchanges
MAX_STEPS = 5
MAX_SECONDS = 60.0
# The likeliest token every time, and no penalty on what the prompt holds: digits are to be copied as they are. A small
# model that repeats its answer for ever is led out of it by the penalty on what the answer itself holds.
PARAMS = SamplingParams(max_new_tokens=256, temperature=0, repetition_penalty=1, frequency_penalty=0.3)
Answer = Callable[[Loop, Sequence[Exchange]], tuple[Exchange, FinishReason]]
TOOL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


class Agent:
    """One conversation with a model that may call tools. One question at a time.

    memory: how many of the latest exchanges a question comes with; fewer where they do not fit in the context window.
    max_steps, max_seconds: after which the model has to answer.
    params: how steps and answers are sampled; the grammar is the agent's own, and max_new_tokens are for the answer.
    instructions: what else the system text says, such as the language of answers.
    examples: what the model is shown beside the examples of its tools.
    confirm: asks a person whether a call may be made, in a thread of its own, for tools that ask first.
    Raises ValueError for tools with unfit names, and for one that asks first where nobody can be asked.
    """

    def __init__(
        self,
        chat: ChatBackend,
        tools: Sequence[Tool] | None = None,
        *,
        memory: int = MEMORY,
        max_steps: int = MAX_STEPS,
        max_seconds: float = MAX_SECONDS,
        params: SamplingParams = PARAMS,
        instructions: str = "",
        examples: Sequence[Exchange] = (),
        confirm: Callable[[Call], bool] | None = None,
    ) -> None:
        tools = (Clock(), Calculator()) if tools is None else tuple(tools)
        _check_names([tool.name for tool in tools])
        if confirm is None and (asking := next((tool for tool in tools if asks_first(tool)), None)):
            raise ValueError(f"The tool {asking.name} asks before each call: give the agent a function as confirm=.")
        self.plan = Plan(chat, tools, params, max_steps, max_seconds, instructions, confirm, examples)
        self.exchanges: deque[Exchange] = deque(maxlen=memory)  # whatever was answered to its end

    def ask(self, question: str) -> AgentReply:
        """The answer, on its way. What the model raises, it raises while the answer is entered or read."""
        return self._reply(lambda loop, exchanges: loop.run(question, exchanges))

    def go_on(self, unfinished: Exchange) -> AgentReply:
        """The rest of an answer that was cut off, without another call of a tool."""
        return self._reply(lambda loop, exchanges: loop.go_on(unfinished, exchanges))

    def fit(self, question: str) -> tuple[Fit, int]:
        """How the question would stand in the context window, and with how many exchanges. As ChatBackend.fit()."""
        return self.plan.fit(question, [*self.exchanges])

    def _reply(self, answer: Answer) -> AgentReply:
        def work(loop: Loop) -> FinishReason:
            exchange, reason = answer(loop, [*self.exchanges])
            self.exchanges.append(exchange)
            return reason

        return AgentReply(self.plan, work)


def _check_names(names: list[str]) -> None:
    for name in names:
        if not TOOL_NAME.fullmatch(name):
            raise ValueError(f"A tool's name is a word of letters, digits, - and _; this is {name!r:.80}.")
        if name == ANSWER or names.count(name) > 1:
            raise ValueError(f"Two actions cannot both be called {name!r}.")


@dataclass(frozen=True)
class _End:
    reason: FinishReason
    error: Exception | None = None


class _Started:
    """The model has taken the question."""


class AgentReply:
    """One answer on its way: first Steps, then pieces of text; iterator and context manager, sync and async.

    Entering it waits until the model has taken the question. Leaving the context, or close(), ends the iteration at
    once, frees the model within one step and waits for no tool; from any thread, any number of times. An answer that
    was stopped is not remembered.
    """

    finish_reason: FinishReason | None = None  # None until the reader has read the end, or close()

    def __init__(self, plan: Plan, work: Callable[[Loop], FinishReason]) -> None:
        self._channel: Channel[Step | str | _Started | _End] = Channel()
        self._finishing = threading.Lock()
        self._error: Exception | None = None
        self._has_started = False
        self._loop = Loop(plan, self._channel.put, lambda: self._channel.put(_Started()))
        threading.Thread(target=self._work, args=(work,), name="agent", daemon=True).start()

    @property
    def calling(self) -> Call | None:
        """The tool that is being called just now."""
        return self._loop.calling

    @property
    def queue_position(self) -> int:
        return self._loop.queue_position

    @property
    def usage(self) -> Usage:
        return self._loop.usage

    @property
    def timing(self) -> Timing:
        return self._loop.timing

    def close(self) -> None:
        self._finish(_End("cancelled"))
        self._channel.put(_End("cancelled"))  # wakes a reader who waits
        self._loop.stop()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step | str:
        while self.finish_reason is None:
            if event := self._event(self._channel.get()):
                return event
        self._raise_error()
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Step | str:
        """The next step, or all the text there is since the last piece, waiting only if there is none."""
        text = ""
        while self.finish_reason is None:
            try:
                event = self._event(self._channel.get_nowait())
            except queue.Empty:
                if text:
                    break
                await self._channel.wait()
            else:
                if isinstance(event, Step):  # they come before all text
                    return event
                text += event or ""
        if text:
            return text
        self._raise_error()
        raise StopAsyncIteration

    def __enter__(self) -> Self:
        while not (self._has_started or self.finish_reason):
            self._event(self._channel.get())
        self._raise_error()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        try:
            while not (self._has_started or self.finish_reason):
                await self._channel.wait()
                self._event(self._channel.get_nowait())
            self._raise_error()
        except BaseException:
            self.close()  # nobody will leave what was not entered
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def _event(self, item: Step | str | _Started | _End) -> Step | str | None:
        """What the reader gets of it, if anything."""
        if isinstance(item, _End):
            self._finish(item)
        elif isinstance(item, _Started):
            self._has_started = True
        elif self.finish_reason is None:
            return item
        return None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _finish(self, end: _End) -> None:
        """The first end stays, be it the reader's or that of close()."""
        with self._finishing:
            if self.finish_reason is None:
                self.finish_reason, self._error = end.reason, end.error

    def _work(self, work: Callable[[Loop], FinishReason]) -> None:
        try:
            reason = work(self._loop)
        except Stopped:
            self._channel.put(_End("cancelled"))
        except Exception as error:
            self._channel.put(_End("error", error))
        else:
            self._channel.put(_End(reason))
