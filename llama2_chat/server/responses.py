"""From a reply to a response: the whole answer as one JSON document, or its pieces as server-sent events.

submit() is how a reply comes about, for the page and the API alike. Nobody keeps the model busy who no longer reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, Literal

import anyio
import anyio.to_thread
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llama2_chat.server.errors import ApiError, generation_error
from llama2_chat.server.metrics import Record
from llama2_chat.types import Reply

UsageIn = Literal["none", "last", "every"]  # chunk of a stream
HEARTBEAT_S = 5.0  # proxies cut a connection that is silent for a minute, some sooner


async def submit(start: Callable[[], Reply], threads: anyio.CapacityLimiter | None = None) -> Reply:
    """start() in a thread: a long text takes a while to encode. Cancelled, it leaves nothing running."""
    gone = threading.Event()

    def start_if_awaited() -> Reply | None:
        return None if gone.is_set() else start()  # after waiting for a thread, perhaps behind longer texts

    submitting = asyncio.ensure_future(anyio.to_thread.run_sync(start_if_awaited, limiter=threads))
    try:
        reply = await asyncio.shield(submitting)
    except asyncio.CancelledError:
        gone.set()
        submitting.add_done_callback(_close_unread)
        raise
    assert reply is not None
    return reply


def _close_unread(submitting: asyncio.Future[Reply | None]) -> None:
    if submitting.exception() is None and (reply := submitting.result()):
        reply.close()


async def submit_for(request: Request, start: Callable[[], Reply], threads: anyio.CapacityLimiter | None) -> Reply:
    """submit(), given up when the reader leaves: that alone cancels no route. Raises ApiError then."""
    submitting = asyncio.ensure_future(submit(start, threads))
    disconnected = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((submitting, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not submitting.done():
            raise ApiError(499, "client_left", "The reader left before there was an answer.")
        return submitting.result()
    finally:
        submitting.cancel()
        disconnected.cancel()


class AnswerFormat:
    """How one answer is written: as a chat's or as a text's, whole or in chunks."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created, self._model = int(time.time()), model

    def whole(self, text: str, reply: Reply) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        name = "chat.completion" if self._is_chat else "text_completion"
        return self._write(name, content, reply.finish_reason) | {"usage": usage_object(reply)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        content = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._write(name, content, finish_reason)

    def _write(self, name: str, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        head = {"id": self._id, "created": self._created, "model": self._model}
        return {**head, "object": name, "choices": [choice]}


def usage_object(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "dropped_messages": usage.dropped_messages,
    }


async def whole_text(reply: Reply, request: Request) -> str:
    """The text of the whole answer. It is cancelled when the reader leaves. Raises ApiError if it fails."""
    try:
        async with closed_on_disconnect(reply, request) as disconnected:
            text = "".join([piece async for piece in reply])
            if reply.finish_reason == "cancelled" and not disconnected.done():
                raise _server_is_stopping()
            return text
    except Exception as error:
        raise generation_error(error) from error


@contextlib.asynccontextmanager
async def closed_on_disconnect(reply: Reply, request: Request) -> AsyncIterator[asyncio.Future[None]]:
    """The reply is closed, and the future done, when the reader leaves."""

    def close(disconnected: asyncio.Future[None]) -> None:
        if not disconnected.cancelled():
            reply.close()

    disconnected = asyncio.ensure_future(_disconnect(request))
    disconnected.add_done_callback(close)
    try:
        yield disconnected
    finally:
        disconnected.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _server_is_stopping() -> ApiError:
    return ApiError(503, "model_unavailable", "The server is being stopped, and this answer with it.")


async def events(answer: AnswerFormat, reply: Reply, record: Record, usage_in: UsageIn) -> AsyncIterator[str]:
    """Server-sent events. The first is written at once, however many requests wait."""

    def usage() -> dict[str, Any]:
        return {} if usage_in == "none" else {"usage": usage_object(reply) if usage_in == "every" else None}

    yield _event(answer.chunk({"role": "assistant", "content": ""}) | usage())
    try:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    piece = await anext(reply)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            except StopAsyncIteration:
                break
            record.add(piece)
            yield _event(answer.chunk({"content": piece}) | usage())
        if reply.finish_reason == "cancelled":
            raise _server_is_stopping()
    except Exception as error:
        problem = generation_error(error)
        record.error = problem.code
        yield _event(problem.body)
        return
    yield _event(answer.chunk({}, reply.finish_reason) | usage())
    if usage_in != "none":
        yield _event(answer.chunk({}) | {"choices": [], "usage": usage_object(reply)})
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Frees the model when the stream ends, also when its reader left before the first event."""

    def __init__(self, events: AsyncIterator[str], record: Record, cleanup: AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold events back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._record, self._cleanup = record, cleanup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._cleanup:
                await super().__call__(scope, receive, send)
        finally:
            self._record.end()
