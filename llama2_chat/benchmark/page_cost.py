"""What the page's streams take from an engine, without a model: beside the same answers read directly.

The stand-in for an engine waits, as one waits for a GPU, for as long as a step of the 13B takes with 32 users, and then
hands each of them a token. Whatever the page computes meanwhile makes its steps later, as it would an engine's here.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.browser_cost import SteadyChat
from llama2_chat.benchmark.serving_cost import ask_together, serving
from llama2_chat.channel import Channel, ChannelReply, Stopwatch
from llama2_chat.settings import Settings
from llama2_chat.types import Message, SamplingParams, Timing, Usage

STREAMS = 32
STEP_S = 0.015  # 2,130 tokens/s for 32 users: the 13B in bfloat16 on an H200
ANSWER_TOKENS = 300
ROUNDS = 5  # the first warms up


class StepReply(ChannelReply[str | None]):
    """An answer of the stand-in; None ends it."""

    queue_position = 0

    def __init__(self) -> None:
        self._channel: Channel[str | None] = Channel()
        self.usage, self._stopwatch = Usage(100, 0), Stopwatch()

    @property
    def channel(self) -> Channel[str | None]:
        return self._channel

    @property
    def timing(self) -> Timing:
        return self._stopwatch.timing(self.usage.completion_tokens)

    def close(self) -> None:
        self._finish("cancelled")

    def _read(self, item: str | None) -> str:
        if item is None:
            self._finish("stop")
        else:
            self.usage = Usage(100, self.usage.completion_tokens + 1)
        return item or ""

    def _raise_error(self) -> None: ...


class SteppingChat(SteadyChat):
    """Answers STREAMS questions together, once all of them are there."""

    def __init__(self) -> None:
        self._replies: list[StepReply] = []
        self.tokens_per_s: list[float] = []  # of each time that it did so

    def stream_reply(self, messages: list[Message], params: SamplingParams, **options: Any) -> StepReply:  # type: ignore[override]
        reply = StepReply()
        self._replies.append(reply)
        if len(self._replies) == STREAMS:
            replies, self._replies = self._replies, []
            threading.Thread(target=self._answer, args=(replies,)).start()
        return reply

    def _answer(self, replies: list[StepReply]) -> None:
        began = time.perf_counter()
        for _ in range(ANSWER_TOKENS):
            time.sleep(STEP_S)
            for reply in replies:
                reply.channel.put("word ")
        self.tokens_per_s.append(len(replies) * ANSWER_TOKENS / (time.perf_counter() - began))
        for reply in replies:
            reply.channel.put(None)


def measure() -> Iterator[Figures]:
    from app import create_app

    chat, cpu_s = SteppingChat(), []
    site = create_app(chat, Settings())  # type: ignore[arg-type]  # as much of one as the page asks for
    with serving(site) as url, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as readers:
        for _ in range(ROUNDS):
            before = time.process_time()
            asyncio.run(_read_directly(chat))
            between = time.process_time()
            readers.submit(_read_page, url).result()
            cpu_s.append((between - before, time.process_time() - between))
    tokens = STREAMS * ANSWER_TOKENS
    ratios = [page / direct for direct, page in zip(chat.tokens_per_s[2::2], chat.tokens_per_s[3::2], strict=True)]
    direct_s, page_s = (statistics.median(times) for times in zip(*cpu_s[1:], strict=True))
    name = f"{STREAMS} streams of a paced engine"
    yield {
        f"{name}, tokens/s": statistics.median(chat.tokens_per_s[2::2]),
        f"{name}, page / read directly": statistics.median(ratios),
        f"{name}, CPU that the page adds, ms/token": 1000 * (page_s - direct_s) / tokens,
    }


async def _read_directly(chat: SteppingChat) -> None:
    async def read() -> None:
        async with chat.stream_reply([], SamplingParams()) as reply:
            async for _ in reply:
                pass

    await asyncio.gather(*(read() for _ in range(STREAMS)))


def _read_page(url: str) -> None:
    """In a process of its own: readers take time, too."""
    asyncio.run(ask_together(url, ["Hello"] * STREAMS))
