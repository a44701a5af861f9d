"""Many readers at once: what bench.py sends at a model, and what its readers see.

together() are users who arrive in the same moment, through_the_page() the same through Gradio, over_http() through the
API, joining() is a long prompt that comes in among them, tenth_turn() a long conversation that goes on, and soak() an
afternoon of visitors. Nothing here knows which model it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import pydoc_data.topics
import random
import shutil
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from llama2_chat.engine.reply import StreamedReply
from llama2_chat.remote import RemoteModel
from llama2_chat.settings import Settings
from llama2_chat.types import Message, Reply, SamplingParams
from model import ChatModel

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.0}
FIRST_IDS = itertools.count(1000)  # the first id of each prompt: no two begin alike, or one would find the other's KV
RANDOM = random.Random(0)
WORDS = sorted(set(pydoc_data.topics.topics["assignment"].split()))
MB = 1_000_000


class TimedReply(StreamedReply):
    """A reply that knows when each token came. Its text would not tell: a character may take several tokens."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.submitted = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def gaps_s(self, since: float = 0) -> list[float]:
        """Seconds between two tokens, of which the later one came after `since`."""
        return [after - before for before, after in itertools.pairwise(self.times) if after > since]


def ignore_stop_ids(chat: ChatModel) -> None:
    """From now on every answer takes its full length, and tells when each of its tokens came."""
    chat.reply_type = TimedReply
    chat.serving.engine.stop_ids = set()


def fresh_ids(chat: ChatModel, tokens: int) -> list[int]:
    vocab_size = chat.serving.model.get_input_embeddings().num_embeddings
    return [next(FIRST_IDS) % vocab_size, *(RANDOM.randrange(1000, vocab_size) for _ in range(tokens - 1))]


def submit(chat: ChatModel, input_ids: list[int], max_new_tokens: int) -> TimedReply:
    return chat.stream_completion(input_ids, SamplingParams(**SAMPLING, max_new_tokens=max_new_tokens))


async def read(reply: TimedReply) -> None:
    async for _ in reply:
        pass


# ---- Users who arrive together ----


def together(chat: ChatModel, users: int, prompt_tokens: int = 512, answer_tokens: int = 256) -> dict[str, float]:
    """Output tokens over wall time from the first submit until the last token is read, and what the users saw."""
    return _together(chat, [fresh_ids(chat, prompt_tokens) for _ in range(users)], answer_tokens)


def _together(chat: ChatModel, prompts: list[list[int]], answer_tokens: int) -> dict[str, float]:
    async def all_of_them() -> list[TimedReply]:
        replies = [submit(chat, input_ids, answer_tokens) for input_ids in prompts]
        await asyncio.gather(*map(read, replies))
        return replies

    started = time.perf_counter()
    replies = asyncio.run(all_of_them())
    seconds = time.perf_counter() - started
    if any(len(reply.times) != answer_tokens for reply in replies):
        sys.exit(f"An answer of {len(prompts)} users has ended before its {answer_tokens} tokens; see the log.")
    first_tokens = [reply.timing.time_to_first_token_s for reply in replies]
    return {
        "tokens/s": len(prompts) * answer_tokens / seconds,
        "time to first token, median, s": statistics.median(first_tokens),
        "time to first token, worst, s": max(first_tokens),
        **_gaps([gap for reply in replies for gap in reply.gaps_s()]),
    }


def _gaps(gaps_s: list[float]) -> dict[str, float]:
    ordered = sorted(gaps_s)
    return {"longest gap, ms": 1000 * ordered[-1], "p99 gap, ms": 1000 * ordered[int(0.99 * (len(ordered) - 1))]}


# ---- The same, of a server that counts its tokens itself ----


def together_over_http(server: RemoteModel, users: int, words: int, answer_tokens: int = 256) -> dict[str, float]:
    """As together(), by the usage that the server reports. Gaps are between pieces of text, which may hold tokens."""
    params = SamplingParams(**SAMPLING, max_new_tokens=answer_tokens)

    async def ask() -> tuple[Reply, list[float]]:
        async with server.stream_reply(_fresh_question(words), params) as reply:
            times = [time.perf_counter() async for _ in reply]
        return reply, times

    async def all_of_them() -> list[tuple[Reply, list[float]]]:
        return await asyncio.gather(*(ask() for _ in range(users)))

    started = time.perf_counter()
    answers = asyncio.run(all_of_them())
    seconds = time.perf_counter() - started
    tokens = [reply.usage.completion_tokens for reply, _ in answers]
    first_tokens = [reply.timing.time_to_first_token_s or seconds for reply, _ in answers]
    return {
        "tokens/s": sum(tokens) / seconds,
        "time to first token, median, s": statistics.median(first_tokens),
        "time to first token, worst, s": max(first_tokens),
        **_gaps([after - before for _, times in answers for before, after in itertools.pairwise(times)] or [0.0]),
        "prompt, tokens": statistics.median(reply.usage.prompt_tokens for reply, _ in answers),
        "answer, tokens, median": statistics.median(tokens),  # fewer than asked for, where the model has said its piece
    }


def words_of(server: RemoteModel, prompt_tokens: int) -> int:
    """How many words make a prompt of about so many tokens."""

    def tokens(words: int) -> int:
        with server.stream_reply(_fresh_question(words), SamplingParams(max_new_tokens=1)) as reply:
            list(reply)
        return reply.usage.prompt_tokens or sys.exit("This server reports no usage, so nothing can be measured.")

    few, many = tokens(50), tokens(150)
    return max(1, round(50 + 100 * (prompt_tokens - few) / max(many - few, 1)))


def _fresh_question(words: int) -> list[Message]:
    text = " ".join(RANDOM.choice(WORDS) for _ in range(words))
    question = f"{next(FIRST_IDS)} {text}\n\nWrite a very long story in which all of these words occur."
    return [{"role": "user", "content": question}]


def together_and_in_turn(chat: ChatModel, users: int, prompt_tokens: int, answer_tokens: int) -> dict[str, float]:
    """One user, many, and many against as many one after another, alternately: medians of three rounds."""
    rounds = [
        (
            together(chat, users, prompt_tokens, answer_tokens),
            [together(chat, 1, prompt_tokens, answer_tokens) for _ in range(users)],
        )
        for _ in range(3)
    ]
    # Each alone produces as many tokens, so that one after another they run at the harmonic mean of their speeds.
    in_turn = [statistics.harmonic_mean(one["tokens/s"] for one in alone) for _, alone in rounds]
    names, alone = rounds[0][0], [one for _, alone in rounds for one in alone]
    rows = {f"1 user, {name}": statistics.median(one[name] for one in alone) for name in names}
    rows |= {f"{users} users, {name}": statistics.median(shared[name] for shared, _ in rounds) for name in names}
    ratios = [shared["tokens/s"] / speed for (shared, _), speed in zip(rounds, in_turn, strict=True)]
    return rows | {f"{users} users, together / one after another": statistics.median(ratios)}


# ---- Users of the page ----

PAGE_PROMPT_WORDS = 300
PAGE_PROCESSES = 4  # that the clients share, so that they are not what is measured


def through_the_page(chat: ChatModel, users: int = 32, answer_tokens: int = 256) -> dict[str, object]:
    """A Chromium, if there is one, and gradio_clients, who all ask the page together; then as many users with prompts
    of the same lengths who call the engine directly."""
    from app import create_app

    chromium = shutil.which("chromium")
    sampling = [f"--{name.replace('_', '-')}={value}" for name, value in SAMPLING.items()]
    site = create_app(chat, Settings.read([*sampling, f"--max-new-tokens={answer_tokens}"]))
    firsts = range(bool(chromium), bool(chromium) + PAGE_PROCESSES)
    context = multiprocessing.get_context("spawn")
    with (
        _every_reply(chat) as replies,
        _serving(site) as url,
        context.Manager() as manager,
        ProcessPoolExecutor(PAGE_PROCESSES + 1, context) as visitors,
    ):
        all_are_here = manager.Barrier(PAGE_PROCESSES + bool(chromium))
        shares = [range(first, users, PAGE_PROCESSES) for first in firsts]
        visits = [visitors.submit(_ask_the_page, url, share, all_are_here) for share in shares]
        visits += [visitors.submit(_browse, url, chromium, all_are_here)] if chromium else []
        for visit in visits:
            visit.result()
    if [len(reply.times) for reply in replies] != [answer_tokens] * users:
        sys.exit(f"Of {users} users of the page not all have got {answer_tokens} tokens; see the log.")
    seconds = max(reply.times[-1] for reply in replies) - replies[0].submitted
    speed = users * answer_tokens / seconds
    direct = _together(chat, [fresh_ids(chat, reply.request.prompt_tokens) for reply in replies], answer_tokens)
    return {
        "a Chromium among the users of the page": bool(chromium),
        f"{users} users of the page, until all have asked, s": replies[-1].submitted - replies[0].submitted,
        f"{users} users of the page, tokens/s": speed,
        f"{users} users of the page / of the engine": speed / direct["tokens/s"],
    }


@contextlib.contextmanager
def _every_reply(chat: ChatModel) -> Iterator[list[TimedReply]]:
    """The replies that anybody asks for meanwhile, in order of their submits."""
    replies = []

    class Noted(TimedReply):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            replies.append(self)

    chat.reply_type = Noted
    try:
        yield replies
    finally:
        chat.reply_type = TimedReply


@contextlib.contextmanager
def _serving(site: FastAPI) -> Iterator[str]:
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(site, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def _question(number: int) -> str:
    """Some 500 tokens of Llama 2; none begins as another does."""
    return f"{number} " + " ".join(pydoc_data.topics.topics[TOPICS[number]].split()[:PAGE_PROMPT_WORDS])


# These two run in processes of their own: readers take time too, which is not what is measured.


def _ask_the_page(url: str, numbers: Sequence[int], all_are_here: threading.Barrier) -> None:
    from gradio_client import Client

    clients = [Client(url, verbose=False) for _ in numbers]
    questions = [_question(number) for number in numbers]
    all_are_here.wait()
    jobs = [client.submit(question, api_name="/chat") for client, question in zip(clients, questions, strict=True)]
    for job in jobs:
        job.result()


def _browse(url: str, chromium: str, all_are_here: threading.Barrier) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.goto(url)
        page.get_by_label("Message").fill(_question(0))
        all_are_here.wait()
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").wait_for()
        page.get_by_role("button", name="Send").wait_for(timeout=600_000)


# ---- The same over HTTP ----


def over_http(chat: ChatModel, streams: int = 32, prompt_tokens: int = 32, answer_tokens: int = 64) -> dict[str, float]:
    """What the API costs: streams read by a program in another process, beside the same streams read from the engine.

    Where model and program share few cores they slow each other down, so the server's own CPU time stands beside it.
    """
    from app import create_app

    rounds, site = [], create_app(chat, chat.settings)
    with _serving(site) as url, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as program:
        for _ in range(4):
            prompts = [fresh_ids(chat, prompt_tokens) for _ in range(streams)]
            before = time.process_time()
            direct = together(chat, streams, prompt_tokens, answer_tokens)["tokens/s"]
            between = time.process_time()
            seconds = program.submit(_read_over_http, url, prompts, answer_tokens).result()
            rounds.append((direct, streams * answer_tokens / seconds, between - before, time.process_time() - between))
    tokens = streams * answer_tokens
    direct, over, direct_cpu, over_cpu = map(statistics.median, zip(*rounds[1:], strict=True))  # the first warms up
    name = f"{streams} streams"
    return {
        f"{name} from the engine, tokens/s": direct,
        f"{name} over HTTP, tokens/s": over,
        f"{name}, over HTTP / from the engine": statistics.median(after / before for before, after, *_ in rounds[1:]),
        f"{name} from the engine, CPU of the server, ms/token": 1000 * direct_cpu / tokens,
        f"{name} over HTTP, CPU of the server, ms/token": 1000 * over_cpu / tokens,
    }


def _read_over_http(url: str, prompts: list[list[int]], answer_tokens: int) -> float:
    """Seconds until all answers have been read. In the program's process."""
    import httpx

    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": answer_tokens, "stream": True, **SAMPLING}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            last = [line async for line in answer.aiter_lines() if line][-1]
        assert last == "data: [DONE]", last

    async def all_of_them() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            await client.get("/v1/models")
            started = time.perf_counter()
            await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
            return time.perf_counter() - started

    return asyncio.run(all_of_them())


# ---- One user ----


def first_token_s(chat: ChatModel, input_ids: list[int]) -> float:
    reply = submit(chat, input_ids, 1)
    list(reply)
    return reply.timing.time_to_first_token_s


def tenth_turn(chat: ChatModel, cached_tokens: int = 3000, new_tokens: int = 100) -> dict[str, float]:
    """Seconds to the first token of a conversation that goes on, and of a prompt as long as what is new in it."""
    conversation = fresh_ids(chat, cached_tokens)
    first_token_s(chat, conversation)
    fresh, tenth = [], []
    for _ in range(5):
        fresh.append(first_token_s(chat, fresh_ids(chat, new_tokens)))
        tenth.append(first_token_s(chat, conversation + fresh_ids(chat, new_tokens)))
    fresh_s, tenth_s = statistics.median(fresh), statistics.median(tenth)
    return {
        f"prompt {new_tokens}, time to first token, s": fresh_s,
        f"{new_tokens} after {cached_tokens:,} cached, time to first token, s": tenth_s,
        f"{new_tokens} after {cached_tokens:,} cached / prompt {new_tokens}": tenth_s / fresh_s,
    }


# ---- A long prompt comes in ----


def joining(chat: ChatModel, users: int = 8, prompt_tokens: int = 3500) -> dict[str, float]:
    """The gaps in the text of users who are being answered while long prompts, one after another, are read."""
    users = min(users, chat.serving.engine.runner.max_batch - 1)  # with a place for who joins
    gaps_s, waits_s = asyncio.run(_joining(chat, users, prompt_tokens))
    name = f"{users} users while a prompt of {prompt_tokens:,} joins"
    rows = {f"{name}, {gap}": value for gap, value in _gaps(gaps_s).items()}
    return rows | {f"prompt {prompt_tokens:,} among {users} users, time to first token, s": statistics.median(waits_s)}


async def _joining(chat: ChatModel, users: int, prompt_tokens: int) -> tuple[list[float], list[float]]:
    streams = [submit(chat, fresh_ids(chat, 512), 3000) for _ in range(users)]
    readers = [asyncio.create_task(read(stream)) for stream in streams]
    gaps_s, waits_s = [], []
    for _ in range(3):
        await _all_go_on(streams)
        newcomer = submit(chat, fresh_ids(chat, prompt_tokens), 1)
        await read(newcomer)
        await _all_go_on(streams)  # so that the last gap has its end
        gaps_s += [gap for stream in streams for gap in stream.gaps_s(newcomer.submitted)]
        waits_s.append(newcomer.timing.time_to_first_token_s)
    for stream in streams:
        stream.close()
    await asyncio.gather(*readers)
    return gaps_s, waits_s


async def _all_go_on(streams: list[TimedReply]) -> None:
    """Until each stream has a few more tokens than now."""
    wanted = [len(stream.times) + 3 for stream in streams]
    while any(len(stream.times) < tokens for stream, tokens in zip(streams, wanted, strict=True)):
        if any(stream.finish_reason for stream in streams):
            sys.exit("A stream has ended before the long prompts were read; see the log.")
        await asyncio.sleep(0.001)


# ---- An afternoon of visitors ----

QUESTIONS = ("Tell me about {}.", "What is {}?", "Who needs {}, and why?", "Write a line about {}.", "And {}?")
TOPICS = sorted(pydoc_data.topics.topics)


@dataclass
class Afternoon:
    """What has happened so far."""

    minutes: float
    started: float = field(default_factory=time.perf_counter)
    answers: int = 0
    left: int = 0  # answers whose reader went away in the middle
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    resident: list[tuple[float, float]] = field(default_factory=list)  # minute, MB

    @property
    def minute(self) -> float:
        return (time.perf_counter() - self.started) / 60

    def resident_mb(self, minute: float) -> float:
        """The median of the last samples before this minute: a step in progress takes some memory for itself."""
        return statistics.median([mb for at, mb in self.resident if at <= minute][-5:])


def soak(chat: ChatModel, minutes: float, readers: int = 32) -> dict[str, object]:
    """Readers who come and go; what they got, and how the memory of this process grew meanwhile."""
    _fill_kv_memory(chat)
    afternoon = Afternoon(minutes)
    asyncio.run(_spend(afternoon, chat, readers))
    early = 2 if minutes > 2 else minutes / 5
    before, after = (afternoon.resident_mb(minute) for minute in (early, minutes))
    return {
        "minutes": minutes,
        "readers": readers,
        "answers": afternoon.answers,
        "left in the middle": afternoon.left,
        "tokens/s": afternoon.tokens / (60 * afternoon.minute),
        "errors": len(afternoon.errors),
        "first error": next(iter(afternoon.errors), None),
        "still in the engine": _left_over(chat),
        "KV memory, written to before the start, MB": chat.serving.engine.runner.kv_bytes / MB,
        f"resident memory at minute {early:g}, MB": before,
        f"resident memory at minute {minutes:g}, MB": after,
        "growth, MB": after - before,
        "every promise kept": not afternoon.errors and not _left_over(chat) and after - before < 20,
    }


def _fill_kv_memory(chat: ChatModel) -> None:
    """Write to all of it: the system hands memory over when it is first touched, and that would look like growth."""
    # In a thread that ends, or its OpenMP team would slow down the engine's; see ChatModel.load.
    thread = threading.Thread(target=chat.serving.engine.runner.zero_blocks, args=(slice(None),))
    thread.start()
    thread.join()


async def _spend(afternoon: Afternoon, chat: ChatModel, readers: int) -> None:
    await asyncio.gather(_watch_memory(afternoon), *(_visit(afternoon, chat, seed) for seed in range(readers)))
    await asyncio.sleep(1)  # the engine notices at its next step who has left


def _left_over(chat: ChatModel) -> int:
    occupancy = chat.occupancy
    return occupancy.running + occupancy.waiting + occupancy.kv_tokens


async def _watch_memory(afternoon: Afternoon) -> None:
    process, told = psutil.Process(), 0
    while afternoon.minute < afternoon.minutes:
        afternoon.resident.append((afternoon.minute, process.memory_info().rss / MB))
        if afternoon.minute >= told + 1:
            told += 1
            print(f"minute {told}: {afternoon.answers} answers, {afternoon.resident[-1][1]:.0f} MB", file=sys.stderr)
        await asyncio.sleep(afternoon.minutes / 4)  # seconds: 240 samples


async def _visit(afternoon: Afternoon, chat: ChatModel, seed: int) -> None:
    """One conversation after another. Every third reader has little patience, every fourth thinks before asking."""
    rng = random.Random(seed)
    while afternoon.minute < afternoon.minutes:
        messages = []
        for _ in range(rng.randint(1, 4)):
            question = rng.choice(QUESTIONS).format(rng.choice(TOPICS))
            messages.append({"role": "user", "content": question})
            patience_s = rng.uniform(0, 12) if seed % 3 == 0 else None
            answer = await _ask(afternoon, chat, messages, _random_params(rng), patience_s)
            if answer is None or afternoon.minute >= afternoon.minutes:
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
    afternoon: Afternoon, chat: ChatModel, messages: list[dict], params: SamplingParams, patience_s: float | None
) -> str | None:
    """The answer; None if its reader left before the end, or if there was none."""
    try:
        async with chat.stream_reply(messages, params) as reply:
            try:
                async with asyncio.timeout(patience_s):
                    text = "".join([piece async for piece in reply])
            except TimeoutError:
                afternoon.left += 1
                return None
            finally:
                afternoon.tokens += reply.usage.completion_tokens
        afternoon.answers += 1
        return text
    except Exception as error:
        log.exception("A reader got an error")
        afternoon.errors.append(f"{type(error).__name__}: {error}")
        return None
