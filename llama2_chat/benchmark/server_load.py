"""The load test for any OpenAI-compatible server, by the usage that it reports.

The prompts are texts, as only the server knows its tokenizer; gaps are between pieces of text, which may hold several
tokens.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.load_test import SAMPLING, gap_figures, users_name
from llama2_chat.benchmark.local_model import FIRST_IDS, RANDOM
from llama2_chat.remote import RemoteModel
from llama2_chat.settings import Settings
from llama2_chat.types import ChatBackend, Message, Reply

PROMPT_TOKENS = 512  # about
ANSWER_TOKENS = 256  # at most
WORDS = sorted(set(pydoc_data.topics.topics["assignment"].split()))


def measure(url: str, counts: Sequence[int]) -> Iterator[Figures]:
    """What users of the server see. The model's name and a key come from INFERENCE_MODEL and INFERENCE_KEY."""
    server = RemoteModel(Settings.read(["--inference-url", url])).load()
    atexit.register(server.close)
    if server.state != "ready":
        sys.exit(server.status.error)
    yield {"server": url, "model": server.status.model}
    words = words_for(server, PROMPT_TOKENS)
    throughput(server, max(counts), words, answer_tokens=8)  # warms up
    for users in counts:
        figures = throughput(server, users, words, ANSWER_TOKENS)
        yield {f"{users_name(users)}, {name}": value for name, value in figures.items()}


def throughput(server: ChatBackend, users: int, words: int, answer_tokens: int) -> dict[str, float]:
    """As load_test.throughput(). words: in each prompt."""
    params = replace(SAMPLING, max_new_tokens=answer_tokens)

    async def ask() -> tuple[Reply, list[float]]:
        async with server.stream_reply(_fresh_question(words), params) as reply:
            times = [time.perf_counter() async for _ in reply]
        return reply, times

    async def ask_all() -> list[tuple[Reply, list[float]]]:
        return await asyncio.gather(*(ask() for _ in range(users)))

    started = time.perf_counter()
    answers = asyncio.run(ask_all())
    seconds = time.perf_counter() - started
    tokens = [reply.usage.completion_tokens for reply, _ in answers]
    first_tokens = [reply.timing.time_to_first_token_s or seconds for reply, _ in answers]
    gaps_s = [after - before for _, times in answers for before, after in itertools.pairwise(times)]
    return {
        "tokens/s": sum(tokens) / seconds,
        "time to first token, median, s": statistics.median(first_tokens),
        "time to first token, worst, s": max(first_tokens),
        **gap_figures(gaps_s or [0.0]),
        "prompt, tokens": statistics.median(reply.usage.prompt_tokens for reply, _ in answers),
        "answer, tokens, median": statistics.median(tokens),  # fewer than requested if the model stopped by itself
    }


def words_for(server: ChatBackend, prompt_tokens: int) -> int:
    """How many words make a prompt of about so many tokens."""

    def tokens(words: int) -> int:
        with server.stream_reply(_fresh_question(words), replace(SAMPLING, max_new_tokens=1)) as reply:
            list(reply)
        return reply.usage.prompt_tokens or sys.exit("This server reports no usage, so nothing can be measured.")

    few, many = tokens(50), tokens(150)
    return max(1, round(50 + 100 * (prompt_tokens - few) / max(many - few, 1)))


def _fresh_question(words: int) -> list[Message]:
    text = " ".join(RANDOM.choice(WORDS) for _ in range(words))
    question = f"{next(FIRST_IDS)} {text}\n\nWrite a very long story in which all of these words occur."
    return [{"role": "user", "content": question}]
