"""Questions answered with the help of tools, by any ChatBackend.

    agent = Agent(chat)
    with agent.ask("What is 15% of 240?") as reply:
        for event in reply:  # a Step after each call of a tool, then the answer, in pieces of text
            print(event)

Not here: which tools there are. Calculator and Clock are given if none are named; see tool.Tool for one of your own.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from llama2_chat.agent.calculator import Calculator
from llama2_chat.agent.clock import Clock
from llama2_chat.agent.loop import Loop, Plan, Stopped
from llama2_chat.agent.messages import Exchange
from llama2_chat.agent.steps import ANSWER
from llama2_chat.agent.tool import Step, Tool
from llama2_chat.channel import Channel
from llama2_chat.types import ChatBackend, FinishReason, SamplingParams

MEMORY = 5  # exchanges
MAX_STEPS = 5
MAX_SECONDS = 60.0
# The likeliest token every time, and no penalty on what the prompt holds: digits are to be copied as they are. A small
# model that repeats its answer for ever is led out of it by the penalty on what the answer itself holds.
PARAMS = SamplingParams(max_new_tokens=256, temperature=0, repetition_penalty=1, frequency_penalty=0.3)
TOOL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


class Agent:
    """One conversation with a model that may call tools. One question at a time.

    memory: how many of the latest exchanges a question comes with; fewer where they do not fit in the context window.
    max_steps, max_seconds: after which the model has to answer.
    params: how steps and answers are sampled; the grammar is the agent's own.
    Raises ValueError for tools with unfit names.
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
    ) -> None:
        tools = (Clock(), Calculator()) if tools is None else tuple(tools)
        _check_names([tool.name for tool in tools])
        self.plan = Plan(chat, tools, params, max_steps, max_seconds)
        self.exchanges: deque[Exchange] = deque(maxlen=memory)  # whatever was answered to its end

    def ask(self, question: str) -> AgentReply:
        """The answer, on its way. What the model raises, it raises while the answer is read."""
        return AgentReply(self, question)


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


class AgentReply:
    """One answer on its way: first Steps, then pieces of text; iterator and context manager, sync and async.

    Leaving the context, or close(), ends the iteration at once, frees the model within one step and waits for no tool;
    from any thread, any number of times. An answer that was stopped is not remembered.
    """

    finish_reason: FinishReason | None = None  # None until the reader has read the end, or close()

    def __init__(self, agent: Agent, question: str) -> None:
        self._channel: Channel[Step | str | _End] = Channel()
        self._finishing = threading.Lock()
        self._error: Exception | None = None
        self._loop = Loop(agent.plan, self._channel.put)
        threading.Thread(target=self._work, args=(agent, question), name="agent", daemon=True).start()

    def close(self) -> None:
        self._finish(_End("cancelled"))
        self._channel.put(_End("cancelled"))  # wakes a reader who waits
        self._loop.stop()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step | str:
        if self.finish_reason is None and (event := self._event(self._channel.get())):
            return event
        if self._error is not None:
            raise self._error
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Step | str:
        if self.finish_reason is None:
            await self._channel.wait()
            if event := self._event(self._channel.get_nowait()):
                return event
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def _event(self, item: Step | str | _End) -> Step | str | None:
        """What the reader gets; None at the end."""
        if isinstance(item, _End):
            self._finish(item)
        return None if self.finish_reason is not None or isinstance(item, _End) else item

    def _finish(self, end: _End) -> None:
        """The first end stays, be it the reader's or that of close()."""
        with self._finishing:
            if self.finish_reason is None:
                self.finish_reason, self._error = end.reason, end.error

    def _work(self, agent: Agent, question: str) -> None:
        try:
            exchange, reason = self._loop.run(question, [*agent.exchanges])
        except Stopped:
            self._channel.put(_End("cancelled"))
        except Exception as error:
            self._channel.put(_End("error", error))
        else:
            agent.exchanges.append(exchange)
            self._channel.put(_End(reason))
