"""What the page takes from a browser: Chromium, on a server that says what a measurement wants, at a steady rate.

A long task is one of more than 50 ms on the browser's main thread, in which no click, key or scroll is answered.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.serving_cost import serving
from llama2_chat.settings import Settings
from llama2_chat.types import Capabilities, Fit, Message, SamplingParams, Status, Timing, ToolOffer, Usage

if TYPE_CHECKING:
    from fastapi import FastAPI
    from playwright.sync_api import Browser, Page

TURNS = 100
TOKENS_PER_S = 200
ANSWER_WORDS, LONG_ANSWER_WORDS = 120, 4_000
PAGE_LOADS = 5
CONVERSATIONS, TURNS_EACH = 200, 100  # that are searched
PARAGRAPH = (
    "A **lighthouse** stands where the sea meets the land, and its light turns once every ten seconds. Ships that pass "
    "in the night count the flashes, look at `the chart` and know where they are.\n\n"
)
CODE = "```python\ndef flashes(seconds):\n    return seconds // 10  # one turn each\n```\n\n"
TABLE = "| place | height |\n|---|---|\n| Pharos | 100 m |\n| Genoa | 77 m |\n\n"

# Collects what lasted too long; `taken()` gives milliseconds since it was last asked.
WATCH = """() => {
  window.longTasks = [];
  new PerformanceObserver((list) => longTasks.push(...list.getEntries().map(({ duration }) => duration)))
    .observe({ type: "longtask" });
  window.taken = () => longTasks.splice(0).reduce((sum, duration) => sum + duration, 0);
}"""
FILL = """async ([conversations, turns, paragraph]) => {
  const { openStore, newId } = await import(new URL("page/store.js", document.baseURI));
  const store = await openStore();
  for (let number = 0; number < conversations; number += 1) {
    const conversation = { id: newId(), title: `Talk ${number}`, renamed: false, pinned: false, leafId: null };
    conversation.createdAt = conversation.updatedAt = Date.now() - number * 3600000;
    const messages = [];
    for (let turn = 0; turn < 2 * turns; turn += 1) {
      const parentId = messages.at(-1)?.id ?? null;
      const text = `${paragraph} ${number} ${turn}${number === 137 && turn === 42 ? " needle" : ""}`;
      const role = turn % 2 ? "assistant" : "user";
      messages.push({ id: newId(), conversationId: conversation.id, parentId, role, text, createdAt: turn });
    }
    conversation.leafId = messages.at(-1).id;
    await store.add(conversation, messages);
  }
}"""
SEARCH = """async () => {
  const { openStore } = await import(new URL("page/store.js", document.baseURI));
  const store = await openStore();
  await store.search("warm up");
  const timed = async (work) => {
    const began = performance.now();
    const found = await work();
    return [performance.now() - began, found.length];
  };
  return { list: await timed(() => store.conversations()), search: await timed(() => store.search("needle")) };
}"""


class SteadyReply:
    """A text, word by word."""

    queue_position, finish_reason, usage, timing, relaxed, json_ends = 0, None, Usage(), Timing(), (), False

    def __init__(self, words: list[str]) -> None:
        self._words, self._said, self._began = words, 0, time.perf_counter()

    async def __anext__(self) -> str:
        if self._said == len(self._words):
            self.finish_reason = "stop"
            raise StopAsyncIteration
        await asyncio.sleep(1 / TOKENS_PER_S)
        due = min(int((time.perf_counter() - self._began) * TOKENS_PER_S) + 1, len(self._words))
        piece, self._said = "".join(self._words[self._said : due]), due
        self.usage = Usage(100, due)
        return piece

    async def __aenter__(self) -> SteadyReply:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.finish_reason = self.finish_reason or "cancelled"


class SteadyChat:
    """As much of a ChatBackend as the page asks for. A question is how many words the answer is to have."""

    capabilities = Capabilities(supports_token_ids=True, knows_queue=True, can_fail_over=False, counts_tokens=True)
    status, state, mode = Status("ready", model="steady", precision="none", device="paper"), "ready", ""
    context_length, occupancy, gpu_memory, servers = 4_096, None, (), ()

    def stream_reply(self, messages: list[Message], params: SamplingParams, **options: Any) -> SteadyReply:
        wanted, paragraph = int(messages[-1]["content"]), PARAGRAPH.split(" ")
        words: list[str] = []
        while len(words) < wanted:
            words += [f"{word} " for word in paragraph[:-1]] + [paragraph[-1]]
            words += [CODE, TABLE] if len(words) % 5 == 0 else []
        return SteadyReply(words[:wanted])

    def fit(self, messages: list[Message], params: SamplingParams, tools: ToolOffer | None = None) -> Fit:
        tokens = min(sum(len(message["content"]) // 4 for message in messages), 3_000)
        return Fit(tokens, 0, self.context_length - tokens, self.context_length)

    def close(self, timeout_s: float = 5) -> None: ...


def measure() -> Iterator[Figures]:
    """Raises SystemExit where there is no Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("There is no chromium and no google-chrome on the PATH.")
    with serving(_page()) as url, serving(_empty_page()) as empty, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield _time_to_interactive(browser, url, empty)
        yield from _long_tasks(browser, url)
        yield _search(browser, url)
        browser.close()


def _page() -> FastAPI:
    from app import create_app

    return create_app(SteadyChat(), Settings())  # type: ignore[arg-type]  # as much of one as the page asks for


def _empty_page() -> FastAPI:
    import gradio as gr
    from fastapi import FastAPI

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Textbox(label="Message")
    return gr.mount_gradio_app(FastAPI(), blocks, path="/")


def _time_to_interactive(browser: Browser, url: str, empty: str) -> Figures:
    """Until the box can be typed into; alternately, each in a browser that has seen it before."""
    times: dict[str, list[float]] = {url: [], empty: []}
    contexts = {address: browser.new_context() for address in times}
    for _ in range(PAGE_LOADS + 1):
        for address, context in contexts.items():
            page = context.new_page()
            began = time.perf_counter()
            page.goto(address, wait_until="commit")
            page.get_by_role("textbox", name="Message").fill("x")
            times[address].append(time.perf_counter() - began)
            page.close()
    ours, theirs = (statistics.median(times[address][1:]) for address in (url, empty))
    return {"page interactive, s": ours, "page interactive / empty Blocks page": ours / theirs}


def _long_tasks(browser: Browser, url: str) -> Iterator[Figures]:
    page = _open(browser, url)
    page.evaluate(WATCH)
    taken = [_ask(page, ANSWER_WORDS) for _ in range(TURNS)]
    yield {
        "long tasks a turn, turns 1-10, ms": statistics.mean(taken[:10]),
        f"long tasks a turn, turns {TURNS - 9}-{TURNS}, ms": statistics.mean(taken[-10:]),
    }
    began = time.perf_counter()
    long_tasks_s = _ask(page, LONG_ANSWER_WORDS) / 1_000
    seconds = time.perf_counter() - began
    yield {
        f"{LONG_ANSWER_WORDS:,} words after that, s": seconds,
        f"{LONG_ANSWER_WORDS:,} words after that, share of time in long tasks": long_tasks_s / seconds,
    }


def _open(browser: Browser, url: str) -> Page:
    page = browser.new_page()
    page.goto(url)
    page.get_by_role("textbox", name="Message").wait_for()
    return page


def _ask(page: Page, words: int) -> float:
    """Milliseconds in long tasks, from sending the question to the end of the answer."""
    box = page.get_by_role("textbox", name="Message")
    box.fill(str(words))
    box.press("Enter")
    page.get_by_role("button", name="Stop", exact=True).wait_for()
    page.get_by_role("button", name="Send", exact=True).wait_for(timeout=600_000)
    page.wait_for_timeout(300)  # what follows the end belongs to it
    return page.evaluate("taken()")


def _search(browser: Browser, url: str) -> Figures:
    page = _open(browser, url)
    page.evaluate(FILL, [CONVERSATIONS, TURNS_EACH, PARAGRAPH])
    found = page.evaluate(SEARCH)
    (list_ms, listed), (search_ms, hits) = found["list"], found["search"]
    if listed < CONVERSATIONS or hits != 1:
        sys.exit(f"{listed} conversations and {hits} hits were found; it should be {CONVERSATIONS} and 1.")
    name = f"{CONVERSATIONS} conversations of {TURNS_EACH} turns"
    return {f"{name}: list, ms": list_ms, f"{name}: search, ms": search_ms}
