"""Readers who come and go for minutes: whether they get errors, leave anything behind, or make the process grow."""

from __future__ import annotations

import asyncio
import logging
import pydoc_data.topics
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.local_model import kv_cache_bytes, load
from llama2_chat.types import ChatBackend, Message, SamplingParams

log = logging.getLogger("llama2_chat")

MB = 1_000_000
MOST_GROWTH_MB = 20
QUESTIONS = ("Tell me about {}.", "What is {}?", "Who needs {}, and why?", "Write a line about {}.", "And {}?")
TOPICS = sorted(pydoc_data.topics.topics)


@dataclass
class SoakState:
    """What has happened so far."""

    minutes: float  # that the soak lasts
    started: float = field(default_factory=time.perf_counter)
    answers: int = 0
    abandoned: int = 0  # answers whose reader went away in the middle
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    resident: list[tuple[float, float]] = field(default_factory=list)  # minute, MB

    @property
    def minute(self) -> float:
        return (time.perf_counter() - self.started) / 60

    @property
    def is_over(self) -> bool:
        return self.minute >= self.minutes

    def resident_mb(self, minute: float) -> float:
        """The median of the last samples before this minute: a step in progress takes some memory for itself."""
        return statistics.median([mb for at, mb in self.resident if at <= minute][-5:])


def measure(minutes: float, readers: int = 32) -> Iterator[Figures]:
    """What readers of the embedded model got, and how the memory of this process grew meanwhile."""
    chat = load([])
    state = SoakState(minutes)
    asyncio.run(_run(state, chat, readers))
    early = 2 if minutes > 2 else minutes / 5
    before, after = state.resident_mb(early), state.resident_mb(minutes)
    left_over = _left_over(chat)
    yield {
        "minutes": minutes,
        "readers": readers,
        "answers": state.answers,
        "left in the middle": state.abandoned,
        "tokens/s": state.tokens / (60 * state.minute),
        "errors": len(state.errors),
        "first error": next(iter(state.errors), None),
        "still in the engine": left_over,
        "KV memory, written to before the start, MB": kv_cache_bytes(chat) / MB,
        f"resident memory at minute {early:g}, MB": before,
        f"resident memory at minute {minutes:g}, MB": after,
        "growth, MB": after - before,
        "every promise kept": not state.errors and not left_over and after - before < MOST_GROWTH_MB,
    }


async def _run(state: SoakState, chat: ChatBackend, readers: int) -> None:
    await asyncio.gather(_watch_memory(state), *(_visit(state, chat, seed) for seed in range(readers)))
    await asyncio.sleep(1)  # the engine notices at its next step who has left


def _left_over(chat: ChatBackend) -> int:
    """Requests and tokens that the engine still holds."""
    occupancy = chat.occupancy
    assert occupancy is not None  # the model is in this process
    return occupancy.running + occupancy.waiting + occupancy.kv_tokens


async def _watch_memory(state: SoakState) -> None:
    process, shown_minute = psutil.Process(), 0
    while not state.is_over:
        resident_mb = process.memory_info().rss / MB
        state.resident.append((state.minute, resident_mb))
        if state.minute >= shown_minute + 1:
            shown_minute += 1
            print(f"minute {shown_minute}: {state.answers} answers, {resident_mb:.0f} MB", file=sys.stderr)
        await asyncio.sleep(state.minutes / 4)  # seconds: 240 samples


async def _visit(state: SoakState, chat: ChatBackend, seed: int) -> None:
    """One conversation after another. Every third reader has little patience, every fourth thinks before asking."""
    rng = random.Random(seed)
    while not state.is_over:
        messages: list[Message] = []
        for _ in range(rng.randint(1, 4)):
            question = rng.choice(QUESTIONS).format(rng.choice(TOPICS))
            messages.append({"role": "user", "content": question})
            patience_s = rng.uniform(0, 12) if seed % 3 == 0 else None
            answer = await _ask(state, chat, messages, _random_params(rng), patience_s)
            if answer is None or state.is_over:
                break
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(rng.uniform(0, 3) if seed % 4 == 0 else 0)


def _random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=rng.randint(4, 80),
        temperature=rng.choice((0, 0.3, 0.8, 1.2)),
        top_p=rng.choice((0.5, 0.9, 1)),
        top_k=rng.choice((0, 20, 50)),
        repetition_penalty=rng.choice((1, 1.1)),
        presence_penalty=rng.choice((0, 0.5)),
        frequency_penalty=rng.choice((0, 0.5)),
        seed=rng.choice((None, rng.randrange(2**63))),
        stop=rng.choice(((), ("\n\n",), (".", "?"))),
    )


async def _ask(
    state: SoakState, chat: ChatBackend, messages: list[Message], params: SamplingParams, patience_s: float | None
) -> str | None:
    """The answer; None if its reader left before the end, or if there was none."""
    try:
        async with chat.stream_reply(messages, params) as reply:
            try:
                async with asyncio.timeout(patience_s):
                    text = "".join([piece async for piece in reply])
            except TimeoutError:
                state.abandoned += 1
                return None
            finally:
                state.tokens += reply.usage.completion_tokens
        state.answers += 1
        return text
    except Exception as error:
        log.exception("A reader got an error")
        state.errors.append(f"{type(error).__name__}: {error}")
        return None
