"""What the page and the API take from many users, beside the same answers read from the engine directly.

Readers run in processes of their own: they take time too, which is not what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import pydoc_data.topics
import secrets
import shutil
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.load_test import SAMPLING, throughput, throughput_of
from llama2_chat.benchmark.local_model import every_reply, fresh_ids, load, time_full_answers
from llama2_chat.server.listen import server_config
from llama2_chat.settings import Settings
from model import ChatModel

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGE_PROMPT_WORDS = 300
PAGE_PROCESSES = 4  # that the readers share
HTTP_ROUNDS = 4  # the first warms up
SAMPLING_FIELDS = {name: getattr(SAMPLING, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
TOPICS = sorted(pydoc_data.topics.topics)


@contextlib.contextmanager
def serving(site: FastAPI) -> Iterator[str]:
    """The address of a server for the site, in a thread."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(site, Settings()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


# ---- The page ----


def measure_page(chat: ChatModel) -> Iterator[Figures]:
    for attempt in (1, 2):
        yield {f"{name}, run {attempt}": value for name, value in page_cost(chat).items()}


def page_cost(chat: ChatModel, users: int = 32, answer_tokens: int = 256) -> dict[str, object]:
    """Readers of the page's streams, and a Chromium if there is one, who all ask together; then as many users with
    prompts of the same lengths who call the engine directly."""
    from app import create_app

    chromium = shutil.which("chromium")
    sampling = [f"--{name.replace('_', '-')}={value}" for name, value in SAMPLING_FIELDS.items()]
    site = create_app(chat, Settings.read([*sampling, f"--max-new-tokens={answer_tokens}"]))
    with every_reply(chat) as replies, serving(site) as url:
        _visit_page(url, users, chromium)
    if [len(reply.times) for reply in replies] != [answer_tokens] * users:
        sys.exit(f"Not all of {users} users of the page got {answer_tokens} tokens; see the log.")
    seconds = max(reply.times[-1] for reply in replies) - replies[0].submitted
    speed = users * answer_tokens / seconds
    direct = throughput_of([fresh_ids(chat, reply.usage.prompt_tokens) for reply in replies], chat, answer_tokens)
    return {
        "a Chromium among the users of the page": chromium is not None,
        f"{users} users of the page, until all have asked, s": replies[-1].submitted - replies[0].submitted,
        f"{users} users of the page, tokens/s": speed,
        f"{users} users of the page / of the engine": speed / direct["tokens/s"],
    }


def _visit_page(url: str, users: int, chromium: str | None) -> None:
    """All users ask at once, and read their answers to the end. The first one is the Chromium, if there is one."""
    first = 1 if chromium else 0
    shares = [range(first + process, users, PAGE_PROCESSES) for process in range(PAGE_PROCESSES)]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(PAGE_PROCESSES + 1, context) as visitors:
        all_are_here = manager.Barrier(PAGE_PROCESSES + first)
        visits = [visitors.submit(_ask_page, url, share, all_are_here) for share in shares]
        if chromium:
            visits.append(visitors.submit(_browse, url, chromium, all_are_here))
        for visit in visits:
            visit.result()


def _question(number: int) -> str:
    """Some 500 tokens of Llama 2; no two begin alike."""
    return f"{number} " + " ".join(pydoc_data.topics.topics[TOPICS[number]].split()[:PAGE_PROMPT_WORDS])


def _ask_page(url: str, numbers: Sequence[int], all_are_here: threading.Barrier) -> None:
    """As the page's own code asks, read to the end."""
    all_are_here.wait()
    asyncio.run(ask_together(url, [_question(number) for number in numbers]))


async def ask_together(url: str, questions: Sequence[str]) -> None:
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        defaults = (await http.get("/page/state")).json()["defaults"]
        asked = [{"messages": [{"role": "user", "content": text}], "settings": defaults} for text in questions]
        answers = [http.put(f"/page/answers/{secrets.token_hex(16)}", json=question) for question in asked]
        for answer in await asyncio.gather(*answers):
            answer.raise_for_status()


def _browse(url: str, chromium: str, all_are_here: threading.Barrier) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.goto(url)
        page.get_by_role("textbox", name="Message").fill(_question(0))
        all_are_here.wait()
        page.get_by_role("button", name="Send", exact=True).click()
        page.get_by_role("button", name="Stop", exact=True).wait_for()
        page.get_by_role("button", name="Send", exact=True).wait_for(timeout=600_000)


# ---- The API ----


def measure_api() -> Iterator[Figures]:
    """The API of the embedded model with 32 readers."""
    chat = load(["--max-batch", "32"])
    time_full_answers(chat)
    yield api_cost(chat)


def api_cost(chat: ChatModel, streams: int = 32, prompt_tokens: int = 32, answer_tokens: int = 64) -> dict[str, float]:
    """Streams read by a program in another process, beside the same streams read from the engine.

    Where model and program share few cores they slow each other down, so the server's own CPU time is measured, too.
    """
    from app import create_app

    rounds = []
    site = create_app(chat, chat.settings)
    with serving(site) as url, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as program:
        for _ in range(HTTP_ROUNDS):
            prompts = [fresh_ids(chat, prompt_tokens) for _ in range(streams)]
            before = time.process_time()
            direct = throughput(chat, streams, prompt_tokens, answer_tokens)["tokens/s"]
            between = time.process_time()
            seconds = program.submit(_read_over_http, url, prompts, answer_tokens).result()
            rounds.append((direct, streams * answer_tokens / seconds, between - before, time.process_time() - between))
    tokens = streams * answer_tokens
    direct, over_http, direct_cpu, http_cpu = map(statistics.median, zip(*rounds[1:], strict=True))
    name = f"{streams} streams"
    return {
        f"{name} from the engine, tokens/s": direct,
        f"{name} over HTTP, tokens/s": over_http,
        f"{name}, over HTTP / from the engine": statistics.median(after / before for before, after, *_ in rounds[1:]),
        f"{name} from the engine, CPU of the server, ms/token": 1000 * direct_cpu / tokens,
        f"{name} over HTTP, CPU of the server, ms/token": 1000 * http_cpu / tokens,
    }


def _read_over_http(url: str, prompts: list[list[int]], answer_tokens: int) -> float:
    """Seconds until all answers have been read. Runs in the program's process."""
    import httpx

    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": answer_tokens, "stream": True, **SAMPLING_FIELDS}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            last = [line async for line in answer.aiter_lines() if line][-1]
        assert last == "data: [DONE]", last

    async def ask_all() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            await client.get("/v1/models")
            started = time.perf_counter()
            await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
            return time.perf_counter() - started

    return asyncio.run(ask_all())
