"""Readers of a soak who mean well: conversations on the page and through the API, some of them left in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pydoc_data.topics
import random
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from llama2_chat.benchmark.hostile_readers import Target, client
from llama2_chat.types import Message

if TYPE_CHECKING:
    import httpx

    from llama2_chat.benchmark.soak import SoakState

QUESTIONS = ("Tell me about {}.", "What is {}?", "Who needs {}, and why?", "Write a line about {}.", "And {}?")
TOPICS = sorted(pydoc_data.topics.topics)


async def visit(target: Target, number: int, state: SoakState) -> None:
    """One conversation after another, every second reader's on the page. Every third has little patience, every fourth
    thinks before asking."""
    rng = random.Random(number)
    async with _reader(target, number) as http:
        while not state.is_over:
            messages: list[Message] = []
            for _ in range(rng.randint(1, 4)):
                messages.append({"role": "user", "content": rng.choice(QUESTIONS).format(rng.choice(TOPICS))})
                patience_s = rng.uniform(0, 12) if number % 3 == 0 else None
                answer = await _read(_answer(http, target, number, messages, rng), state, patience_s)
                if answer is None or state.is_over:
                    break
                messages.append({"role": "assistant", "content": answer})
                await asyncio.sleep(rng.uniform(0, 3) if number % 4 == 0 else 0)


async def warm_up(target: Target) -> None:
    """One question through the API and one on the page."""
    for number in (0, 1):
        async with _reader(target, number) as http:
            question: list[Message] = [{"role": "user", "content": "Name a colour."}]
            async for _ in _answer(http, target, number, question, random.Random(0)):
                pass


@contextlib.asynccontextmanager
async def _reader(target: Target, number: int) -> AsyncIterator[httpx.AsyncClient]:
    async with client(target, f"127.1.0.{number + 1}") as http:
        if number % 2:
            login = {"username": f"reader{number}", "password": target.password}
            (await http.post("/login", data=login)).raise_for_status()
        yield http


def _answer(
    http: httpx.AsyncClient, target: Target, number: int, messages: list[Message], rng: random.Random
) -> AsyncIterator[str]:
    return _from_page(http, messages, rng) if number % 2 else _from_api(http, target.key(number), messages, rng)


async def _read(answer: AsyncIterator[str], state: SoakState, patience_s: float | None) -> str | None:
    """The answer; None if its reader left before the end, or if there was none."""
    pieces: list[str] = []
    asked_at = time.perf_counter()
    try:
        async with asyncio.timeout(patience_s):
            async for piece in answer:
                if not pieces:
                    state.first_word(asked_at)
                pieces.append(piece)
    except TimeoutError:
        state.abandoned += 1
        return None
    except EOFError:
        state.lost += 1
        return None
    except Exception as error:
        state.errors.append(f"{type(error).__name__}: {error}")
        return None
    state.answers += 1
    return "".join(pieces)


async def _from_page(http: httpx.AsyncClient, messages: list[Message], rng: random.Random) -> AsyncIterator[str]:
    """Its pieces. Raises EOFError for an answer without an end, RuntimeError for one that ends with an error."""
    settings = {"maxNewTokens": rng.randint(4, 80), "temperature": 0.8, "topP": 0.9, "topK": 50, "repetitionPenalty": 1}
    body = {"messages": messages, "settings": settings}
    async with http.stream("PUT", f"/page/answers/{secrets.token_hex(16)}", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            event: dict[str, Any] = json.loads(line) if line.strip() else {}
            if text := event.get("more") or event.get("text"):
                yield text
            if end := event.get("end"):
                if end["reason"] not in ("stop", "length"):
                    raise RuntimeError(f"{end['reason']}: {end['error']}")
                return
    raise EOFError


async def _from_api(
    http: httpx.AsyncClient, key: dict[str, str], messages: list[Message], rng: random.Random
) -> AsyncIterator[str]:
    """The same through /v1/chat/completions, with settings of all kinds."""
    body = {
        "messages": messages,
        "stream": True,
        "max_tokens": rng.randint(4, 80),
        "temperature": rng.choice((0, 0.3, 0.8, 1.2)),
        "top_p": rng.choice((0.5, 0.9, 1)),
        "top_k": rng.choice((0, 20, 50)),
        "presence_penalty": rng.choice((0, 0.5)),
        "seed": rng.choice((None, rng.randrange(2**63))),
        "stop": rng.choice((None, ["\n\n"], [".", "?"])),
    }
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=key) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return
            if not line.startswith("data: "):
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if text := event["choices"] and event["choices"][0]["delta"].get("content"):
                yield text
    raise EOFError
