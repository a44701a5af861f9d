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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal, Protocol, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llama2_chat.server.choices import Choices
from llama2_chat.server.errors import ApiError, generation_error
from llama2_chat.server.logprobs import chat_logprobs, text_logprobs
from llama2_chat.server.metrics import Record
from llama2_chat.server.speech import Speech
from llama2_chat.types import Usage

UsageIn = Literal["none", "last", "every"]  # chunk of a stream
HEARTBEAT_S = 5.0  # proxies cut a connection that is silent for a minute, some sooner


class Closable(Protocol):
    """A reply, or all choices of a request."""

    def close(self) -> None: ...


ReplyT = TypeVar("ReplyT", bound=Closable)


async def submit(start: Callable[[], ReplyT], threads: anyio.CapacityLimiter | None = None) -> ReplyT:
    """start() in a thread: a long text takes a while to encode. Cancelled, it leaves nothing running."""
    gone = threading.Event()

    def start_if_awaited() -> ReplyT | None:
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


def _close_unread(submitting: asyncio.Future[ReplyT | None]) -> None:
    if submitting.exception() is None and (reply := submitting.result()):
        reply.close()


async def submit_for(request: Request, start: Callable[[], ReplyT], threads: anyio.CapacityLimiter | None) -> ReplyT:
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
    """How the answers to one request are written: as a chat's or as a text's, whole or in chunks."""

    def __init__(self, model: str, is_chat: bool, with_logprobs: bool = False, speech: Speech | None = None) -> None:
        self._is_chat, self._with_logprobs, self.speech = is_chat, with_logprobs, speech or Speech()
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created, self._model = int(time.time()), model

    def whole(self, texts: Sequence[str], choices: Choices) -> dict[str, Any]:
        written = []
        for index, (text, reply) in enumerate(zip(texts, choices.replies, strict=True)):
            content = {"message": self.speech.message(index, text)} if self._is_chat else {"text": text}
            reason = self.speech.finish_reason(index, reply.finish_reason)
            written.append(self._choice(index, content, reason, choices, whole=True))
        name = "chat.completion" if self._is_chat else "text_completion"
        return self._head(name) | {"choices": written, "usage": usage_object(choices.usage)}

    def chunk(
        self, index: int, delta: dict[str, Any], choices: Choices, finish_reason: str | None = None
    ) -> dict[str, Any]:
        content = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        return self._chunk_head | {"choices": [self._choice(index, content, finish_reason, choices)]}

    def last_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._chunk_head | {"choices": [], "usage": usage_object(usage)}

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: str | None,
        choices: Choices,
        whole: bool = False,
    ) -> dict[str, Any]:
        logprobs = None
        if self._with_logprobs and ((tokens := choices.new_logprobs(index)) or whole):
            logprobs = chat_logprobs(tokens) if self._is_chat else text_logprobs(tokens, len(choices.openings[index]))
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self._is_chat else "text_completion")

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self._id, "created": self._created, "model": self._model, "object": name}


def reply_headers(choices: Choices) -> dict[str, str]:
    """What of their JSON schema, which is the same for all, the answers may violate."""
    relaxed = choices.replies[0].relaxed
    return {"X-Schema-Relaxed": ", ".join(relaxed)} if relaxed else {}


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "dropped_messages": usage.dropped_messages,
    }


async def whole_texts(choices: Choices, request: Request) -> list[str]:
    """The text of each whole answer. They are cancelled when the reader leaves. Raises ApiError if one fails."""
    try:
        async with closed_on_disconnect(choices, request) as disconnected:
            pieces = [[opening] for opening in choices.openings]
            async for index, piece in choices:
                pieces[index].append(piece or "")
            if choices.finish_reason == "cancelled" and not disconnected.done():
                raise _server_is_stopping()
            return ["".join(each) for each in pieces]
    except Exception as error:
        raise generation_error(error) from error


@contextlib.asynccontextmanager
async def closed_on_disconnect(reply: Closable, request: Request) -> AsyncIterator[asyncio.Future[None]]:
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


async def events(answer: AnswerFormat, choices: Choices, record: Record, usage_in: UsageIn) -> AsyncIterator[str]:
    """Server-sent events. The first of each choice is written at once, however many requests wait."""

    def usage() -> dict[str, Any]:
        return {} if usage_in == "none" else {"usage": usage_object(choices.usage) if usage_in == "every" else None}

    for index, opening in enumerate(choices.openings):
        yield _event(answer.chunk(index, {"role": "assistant", "content": opening}, choices) | usage())
    try:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    index, piece = await anext(choices)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            except StopAsyncIteration:
                break
            if piece is not None:
                record.add(piece, index)
                for delta in answer.speech.deltas(index, piece):
                    yield _event(answer.chunk(index, delta, choices) | usage())
                continue
            reason = choices.replies[index].finish_reason
            if reason == "cancelled":
                raise _server_is_stopping()
            for delta in answer.speech.rest(index):
                yield _event(answer.chunk(index, delta, choices) | usage())
            told = answer.speech.finish_reason(index, reason)
            yield _event(answer.chunk(index, {}, choices, told) | usage())
    except Exception as error:
        problem = generation_error(error)
        record.error = problem.code
        yield _event(problem.body)
        return
    if usage_in != "none":
        yield _event(answer.last_chunk(choices.usage))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Frees the model when the stream ends, also when its reader left before the first event."""

    def __init__(
        self, events: AsyncIterator[str], record: Record, cleanup: AsyncExitStack, headers: dict[str, str]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}  # nginx would hold events back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._record, self._cleanup = record, cleanup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._cleanup:
                await super().__call__(scope, receive, send)
        finally:
            self._record.end()
