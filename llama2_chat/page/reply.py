"""From a visitor's message to the answer as it grows: one generator, which every way to ask goes through.

Typed messages, retries, edits and examples of the page come here, and so do programs that use Gradio's /chat. On the
page no exception leaves it: that would lock the box until a reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container
from typing import Any

import anyio
import gradio as gr

from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.page import wording
from llama2_chat.page.messages import Shown, Turn, plain_messages
from llama2_chat.server.errors import as_api_error
from llama2_chat.server.limits import ConcurrencyLimiter, client_address
from llama2_chat.server.metrics import Metrics, Record
from llama2_chat.server.responses import submit
from llama2_chat.types import ChatBackend, Message, Reply, SamplingParams

SHOW_EVERY_S = 0.08  # shown token by token, a long answer keeps the browser busier than the model
UNREAD_S = 10.0  # after which whoever asked and does not listen loses the answer, or the place in line
REFRESH_EVERY_S = 0.4  # while nothing new comes; Stop and a closed tab cancel an async generator at once

ReplyFunction = Callable[..., AsyncGenerator[Any, None]]  # yields turns to the page, and plain text to programs


def make_reply(
    chat: ChatBackend, limiter: ConcurrencyLimiter, metrics: Metrics, listeners: Container[str | None]
) -> ReplyFunction:
    """What gr.ChatInterface calls. Programs send their settings by the names of its parameters.

    listeners: the sessions whose messages somebody reads; an answer that nobody reads is given up.
    """

    async def reply(
        message: str,
        history: list[Turn],
        system_prompt: str | None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        seed: str | None,
        request: gr.Request,
    ) -> AsyncGenerator[Any, None]:
        """The answer as it grows. The server remembers each client's conversation."""
        on_page = request.headers.get("x-gradio-user") == "app"  # as Gradio's own page signs its requests
        shown, record = Shown(), Record(metrics, "page")
        try:
            messages = plain_messages(message, history, system_prompt)
            params = SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                repetition_penalty=repetition_penalty,
                seed=_seed(seed),
            )
            slot = limiter.slot(client_address(request))
            threads = limiter.threads(sum(len(message["content"].encode()) for message in messages))
            async with contextlib.aclosing(_answer(chat, messages, params, record, slot, threads)) as steps:
                last_read = time.monotonic()
                async for shown in steps:
                    if request.session_hash in listeners:
                        last_read = time.monotonic()
                    elif time.monotonic() - last_read > UNREAD_S:
                        break
                    yield shown.turns() if on_page else shown.text
        except Exception as error:
            sentence = wording.error_sentence(error)
            record.error = as_api_error(error).code
            if not on_page:
                raise gr.Error(sentence, print_exception=False) from None
            gr.Warning(html.escape(sentence))
            refused = record.reply is None and isinstance(error, ChatError) and not isinstance(error, ModelUnavailable)
            yield Shown(shown.text, remark=f"Not sent: {sentence}" if refused else sentence, refused=refused).turns()
        finally:
            record.answer = shown.text
            record.end()

    return reply


async def _answer(
    chat: ChatBackend,
    messages: list[Message],
    params: SamplingParams,
    record: Record,
    slot: contextlib.AbstractContextManager[None],
    threads: anyio.CapacityLimiter | None,
) -> AsyncGenerator[Shown, None]:
    """What to show, step by step. A message that arrives while the model loads waits for it."""
    while chat.state == "loading":
        yield Shown(waiting=wording.progress(chat.status))
        await asyncio.sleep(REFRESH_EVERY_S)
    record.question = messages
    if not chat.capabilities.knows_queue:  # its server may take a while to accept the question
        yield Shown(waiting=wording.READING)
    text = ""
    with slot:
        async with await submit(lambda: chat.stream_reply(messages, params), threads) as reply:
            record.reply = reply
            async for text in _texts(reply):
                yield Shown(text, waiting=wording.waiting(reply))
    yield Shown(text, remark=wording.closing_remark(text, reply))


async def _texts(reply: Reply) -> AsyncIterator[str]:
    """The whole text so far, at a pace for the eye; the same text again when nothing new comes for a while."""
    text = ""
    with contextlib.suppress(StopAsyncIteration):
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_EVERY_S):
                    text += await anext(reply)
            yield text
            await asyncio.sleep(SHOW_EVERY_S if text else 0)


def _seed(text: str | None) -> Any:
    """The number in it; None for an empty text. SamplingParams refuses, in words, whatever else it holds."""
    text = (text or "").strip()
    return int(text) if re.fullmatch("[0-9]{1,40}", text) else text or None
