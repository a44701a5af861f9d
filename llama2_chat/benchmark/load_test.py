"""Many users at once, as they see it: tokens/s, time to first token, gaps between tokens.

They arrive together, or are being answered while a long prompt comes in among them. The prompts are random ids, so
that the model has nothing of them in its cache, except where a conversation goes on.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.local_model import TimedReply, fresh_ids, gpu_gb
from llama2_chat.types import SamplingParams
from model import ChatModel

SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, repetition_penalty=1.0)
ROUNDS = 3


def submit(chat: ChatModel, input_ids: list[int], max_new_tokens: int, adapter: str = "") -> TimedReply:
    reply = chat.stream_completion(input_ids, replace(SAMPLING, max_new_tokens=max_new_tokens, adapter=adapter))
    assert isinstance(reply, TimedReply)  # local_model.time_full_answers() was called
    return reply


def users_name(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"


def gap_figures(gaps_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(gaps_s)
    return {"longest gap, ms": 1000 * ordered[-1], "p99 gap, ms": 1000 * ordered[int(0.99 * (len(ordered) - 1))]}


# ---- Users who arrive together ----


def throughput_by_users(
    chat: ChatModel, counts: Sequence[int], prompt_tokens: int = 512, answer_tokens: int = 256
) -> Iterator[Figures]:
    for users in counts:
        figures: dict[str, object] = {**throughput(chat, users, prompt_tokens, answer_tokens)}
        figures["peak memory so far, GB"] = gpu_gb(torch.cuda.max_memory_reserved)
        yield {f"{users_name(users)}, {name}": value for name, value in figures.items()}


def throughput(chat: ChatModel, users: int, prompt_tokens: int = 512, answer_tokens: int = 256) -> dict[str, float]:
    """Output tokens over wall time, from the first submit until the last token is read, and what the users saw."""
    return throughput_of([fresh_ids(chat, prompt_tokens) for _ in range(users)], chat, answer_tokens)


def throughput_of(
    prompts: list[list[int]], chat: ChatModel, answer_tokens: int, adapters: Sequence[str] = ()
) -> dict[str, float]:
    """adapters: of each prompt its own; none without them."""

    async def read_all() -> list[TimedReply]:
        asked = zip(prompts, adapters or [""] * len(prompts), strict=True)
        replies = [submit(chat, input_ids, answer_tokens, adapter) for input_ids, adapter in asked]
        await asyncio.gather(*map(_read, replies))
        return replies

    started = time.perf_counter()
    replies = asyncio.run(read_all())
    seconds = time.perf_counter() - started
    if any(len(reply.times) != answer_tokens for reply in replies):
        sys.exit(f"An answer to one of {len(prompts)} users ended before its {answer_tokens} tokens; see the log.")
    first_tokens = [_time_to_first_token_s(reply) for reply in replies]
    return {
        "tokens/s": len(prompts) * answer_tokens / seconds,
        "time to first token, median, s": statistics.median(first_tokens),
        "time to first token, worst, s": max(first_tokens),
        **gap_figures([gap for reply in replies for gap in reply.gaps_s()]),
    }


def batching_gain(chat: ChatModel, users: int, prompt_tokens: int, answer_tokens: int) -> dict[str, float]:
    """One user, many, and many against as many one after another, alternately: medians of three rounds."""
    together, alone, gains = [], [], []
    for _ in range(ROUNDS):
        together.append(throughput(chat, users, prompt_tokens, answer_tokens))
        in_turn = [throughput(chat, 1, prompt_tokens, answer_tokens) for _ in range(users)]
        alone += in_turn
        # Each of them produces as many tokens, so that one after another they run at the harmonic mean of their speeds.
        speed_in_turn = statistics.harmonic_mean([one["tokens/s"] for one in in_turn])
        gains.append(together[-1]["tokens/s"] / speed_in_turn)
    return {
        **{f"1 user, {name}": value for name, value in _medians(alone).items()},
        **{f"{users} users, {name}": value for name, value in _medians(together).items()},
        f"{users} users, together / one after another": statistics.median(gains),
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


async def _read(reply: TimedReply) -> None:
    async for _ in reply:
        pass


# ---- One user ----


def first_token_s(chat: ChatModel, input_ids: list[int]) -> float:
    reply = submit(chat, input_ids, 1)
    list(reply)
    return _time_to_first_token_s(reply)


def _time_to_first_token_s(reply: TimedReply) -> float:
    seconds = reply.timing.time_to_first_token_s
    assert seconds is not None  # it has been read to its end
    return seconds


def prefix_reuse(chat: ChatModel, cached_tokens: int = 3000, new_tokens: int = 100) -> dict[str, float]:
    """Seconds to the first token of a conversation that goes on, and of a prompt as long as what is new in it."""
    conversation = fresh_ids(chat, cached_tokens)
    first_token_s(chat, conversation)
    fresh, cached = [], []
    for _ in range(5):
        fresh.append(first_token_s(chat, fresh_ids(chat, new_tokens)))
        cached.append(first_token_s(chat, conversation + fresh_ids(chat, new_tokens)))
    fresh_s, cached_s = statistics.median(fresh), statistics.median(cached)
    return {
        f"prompt {new_tokens}, time to first token, s": fresh_s,
        f"{new_tokens} after {cached_tokens:,} cached, time to first token, s": cached_s,
        f"{new_tokens} after {cached_tokens:,} cached / prompt {new_tokens}": cached_s / fresh_s,
    }


def return_from_host(chat: ChatModel, cached_tokens: int = 3000, new_tokens: int = 100, users: int = 8) -> Figures:
    """Seconds to the first token of conversations that had left the GPU, beside prompts as long, and the gaps of others
    meanwhile. Nothing where the host keeps no two of them."""
    engine, name = chat.serving.engine, f"{new_tokens} after {cached_tokens:,}"
    users = _users_beside_a_newcomer(chat, users)
    rounds = min(ROUNDS, engine.occupancy.host_capacity_tokens // cached_tokens - 1)
    if rounds < 1 or users < 1:
        return {}

    def gone() -> list[list[int]]:
        """Conversations that just left, with what is new in them."""
        conversations = [fresh_ids(chat, cached_tokens) for _ in range(rounds)]
        others = engine.occupancy.kv_capacity_tokens // cached_tokens + 1
        for ids in [*conversations, *(fresh_ids(chat, cached_tokens) for _ in range(others))]:
            first_token_s(chat, ids)
        return [[*ids, *fresh_ids(chat, new_tokens)] for ids in conversations]

    before, back = engine.occupancy.recalled_tokens, gone()
    back_s = statistics.median(first_token_s(chat, ids) for ids in back)
    anew_s = statistics.median(first_token_s(chat, fresh_ids(chat, len(ids))) for ids in back)
    back = gone()
    gaps_s, waits_s = asyncio.run(_join(chat, users, back))
    new_gaps_s, new_waits_s = asyncio.run(_join(chat, users, [fresh_ids(chat, len(ids)) for ids in back]))
    among = f"among {users} users"
    return {
        f"{name} that had left the GPU, time to first token, s": back_s,
        f"{name} computed anew, time to first token, s": anew_s,
        f"{name} that had left the GPU / computed anew": back_s / anew_s,
        f"{name} that had left the GPU, {among}, time to first token, s": statistics.median(waits_s),
        **{f"{name} that had left the GPU, {among}, {gap}": ms for gap, ms in gap_figures(gaps_s).items()},
        f"{name} computed anew, {among}, time to first token, s": statistics.median(new_waits_s),
        **{f"{name} computed anew, {among}, {gap}": ms for gap, ms in gap_figures(new_gaps_s).items()},
        "tokens that came back, of those that had left": f"{engine.occupancy.recalled_tokens - before:,} of "
        f"{2 * rounds * cached_tokens:,}",
    }


# ---- A long prompt comes in ----


def inter_token_latency(chat: ChatModel, users: int = 8, prompt_tokens: int = 3500) -> dict[str, float]:
    """The gaps between the tokens of users who are being answered while long prompts, one after another, are read."""
    users = _users_beside_a_newcomer(chat, users)
    if users < 1:
        return {}
    gaps_s, waits_s = asyncio.run(_join(chat, users, [fresh_ids(chat, prompt_tokens) for _ in range(ROUNDS)]))
    name = f"{users} users while a prompt of {prompt_tokens:,} joins"
    return {
        **{f"{name}, {gap}": value for gap, value in gap_figures(gaps_s).items()},
        f"prompt {prompt_tokens:,} among {users} users, time to first token, s": statistics.median(waits_s),
    }


def _users_beside_a_newcomer(chat: ChatModel, users: int) -> int:
    """So many at most that there is room for one more in the batch: else the newcomer waits until one has ended."""
    return min(users, chat.serving.engine.runner.max_batch - 1)


async def _join(chat: ChatModel, users: int, prompts: Sequence[list[int]]) -> tuple[list[float], list[float]]:
    """The users' gaps, and the times to first token of these prompts, which come in one after another."""
    streams = [submit(chat, fresh_ids(chat, 512), 3000) for _ in range(users)]
    readers = [asyncio.create_task(_read(stream)) for stream in streams]
    gaps_s: list[float] = []
    waits_s: list[float] = []
    for prompt in prompts:
        await _wait_for_tokens(streams)
        newcomer = submit(chat, prompt, 1)
        await _read(newcomer)
        await _wait_for_tokens(streams)  # or the last gap would have no end
        gaps_s += [gap for stream in streams for gap in stream.gaps_s(newcomer.submitted)]
        waits_s.append(_time_to_first_token_s(newcomer))
    for stream in streams:
        stream.close()
    await asyncio.gather(*readers)
    return gaps_s, waits_s


async def _wait_for_tokens(streams: list[TimedReply]) -> None:
    """Until each stream has a few more tokens than now."""
    wanted = [len(stream.times) + 3 for stream in streams]
    while any(len(stream.times) < tokens for stream, tokens in zip(streams, wanted, strict=True)):
        if any(stream.finish_reason for stream in streams):
            sys.exit("A stream ended before the long prompts were read; see the log.")
        await asyncio.sleep(0.001)
