"""From a reply to a response over HTTP: all of it, or its pieces as server-sent events; how they are written, the
writers say (chunks.py, items.py).

submit() is how a reply comes about, for the page and the API alike. Nobody keeps the model busy who no longer reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llama2_chat.server.choices import Choices
from llama2_chat.server.errors import ApiError, generation_error
from llama2_chat.server.metrics import Record

HEARTBEAT_S = 5.0  # proxies cut a connection that is silent for a minute, some sooner


class Closable(Protocol):
    """A reply, or all choices of a request."""

    def close(self) -> None: ...


ReplyT = TypeVar("ReplyT", bound=Closable)
ResultT = TypeVar("ResultT")


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
    if not submitting.cancelled() and submitting.exception() is None and (reply := submitting.result()):
        reply.close()


async def submit_for(request: Request, start: Callable[[], ReplyT], threads: anyio.CapacityLimiter | None) -> ReplyT:
    """submit(), given up when the reader leaves. Raises ApiError then."""
    return await unless_left(request, submit(start, threads))


async def unless_left(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The work of a request whose body has been read, cancelled when the reader leaves: that alone cancels no route.
    Raises ApiError then."""
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "client_left", "The reader left before there was an answer.")
        return working.result()
    finally:
        working.cancel()
        disconnected.cancel()


class AnswerWriter(Protocol):
    """How the answers to one request are written. Those of a stream are written piece by piece, as events."""

    def whole(self, texts: Sequence[str], choices: Choices) -> Any: ...  # JSON
    def begin(self, choices: Choices) -> Iterator[str]: ...
    def piece(self, index: int, piece: str, choices: Choices) -> Iterator[str]: ...
    def ended(self, index: int, choices: Choices) -> Iterator[str]: ...  # one of the answers
    def failed(self, problem: ApiError) -> Iterator[str]: ...  # in place of all that would come
    def end(self, choices: Choices) -> Iterator[str]: ...


def reply_headers(choices: Choices) -> dict[str, str]:
    """What of their JSON schema, which is the same for all, the answers may violate."""
    relaxed = choices.replies[0].relaxed
    return {"X-Schema-Relaxed": ", ".join(relaxed)} if relaxed else {}


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


async def events(writer: AnswerWriter, choices: Choices, record: Record) -> AsyncIterator[str]:
    """Server-sent events. The first of them is written at once, however many requests wait."""
    for event in writer.begin(choices):
        yield event
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
                written = writer.piece(index, piece, choices)
            elif choices.replies[index].finish_reason == "cancelled":
                raise _server_is_stopping()
            else:
                written = writer.ended(index, choices)
            for event in written:
                yield event
    except Exception as error:
        problem = generation_error(error)
        record.error = problem.code
        written = writer.failed(problem)
    else:
        written = writer.end(choices)
    for event in written:
        yield event


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
