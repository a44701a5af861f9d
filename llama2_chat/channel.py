"""From the thread that makes an answer to the one reader who takes it, who may wait in a thread or in an event loop.

No thread waits on behalf of an async reader: it is woken in its own loop. All kinds of Reply read this way: the local
one puts token ids on its channel, the others pieces of text. What an item means is theirs to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Generic, Self, TypeVar

from llama2_chat.types import FinishReason, Timing

T = TypeVar("T")


class Channel(Generic[T]):
    """Items in the order in which they were put, from any thread, for one reader."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiter: asyncio.Future[None] | None = None  # an async reader that has nothing to read

    def put(self, item: T) -> None:
        with self._lock:  # both at once: else a reader who has taken the item and waits anew is woken for nothing
            self._items.put(item)
            if self._waiter is not None:
                with contextlib.suppress(RuntimeError):  # its loop has closed: nobody reads any more
                    self._waiter.get_loop().call_soon_threadsafe(_resolve, self._waiter)

    def get(self) -> T:
        """The next item, once there is one."""
        return self._items.get()

    def get_nowait(self) -> T:
        """The next item. Raises queue.Empty if there is none."""
        return self._items.get_nowait()

    async def wait(self) -> None:
        """Return once there is an item."""
        waiter = asyncio.get_running_loop().create_future()
        with self._lock:
            if not self._items.empty():
                return
            self._waiter = waiter
        try:
            await waiter
        finally:
            with self._lock:  # put() may be about to wake it
                self._waiter = None


class ChannelReply(ABC, Generic[T]):
    """The reader's half of types.Reply, over a channel."""

    finish_reason: FinishReason | None = None  # None until the reader has read the end, or close()
    relaxed: Sequence[str] = ()
    _finishing = threading.Lock()  # one for all replies: it is only held for a comparison

    @property
    def json_ends(self) -> bool:
        return False

    @property
    @abstractmethod
    def channel(self) -> Channel[T]: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _read(self, item: T) -> str:
        """The text that one more item makes certain; the last item sets finish_reason."""

    @abstractmethod
    def _raise_error(self) -> None:
        """Raise what the visitor is to be told, if the answer has failed."""

    def _finish(self, reason: FinishReason) -> None:
        """The first reason stays, be it the reader's or that of close()."""
        with self._finishing:
            self.finish_reason = self.finish_reason or reason

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while self.finish_reason is None:
            if piece := self._read(self.channel.get()):
                return piece
        self._raise_error()
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """All the text that has become certain since the last piece, waiting only if there is none."""
        pieces = []
        while self.finish_reason is None:
            try:
                pieces.append(self._read(self.channel.get_nowait()))
            except queue.Empty:
                if any(pieces):
                    break
                await self.channel.wait()
        if text := "".join(pieces):
            return text
        self._raise_error()
        raise StopAsyncIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


ACCEPTED = ""  # the first item of a TaskReply whose question has been taken; text follows
END = None  # the last item


class TaskReply(ChannelReply[str | None]):
    """A reply that a task in another thread's event loop writes.

    Entering it waits until the question has been accepted, so that a refusal is raised before anything is shown.
    """

    def __init__(self) -> None:
        self.task: Future[None] | None = None
        self._channel: Channel[str | None] = Channel()
        self._accepted = False  # as far as the reader knows
        self._ending: tuple[FinishReason, Exception | None] | None = None
        self._lock = threading.Lock()

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """From any thread. Only the first call does anything."""
        with self._lock:
            first = self._ending is None
            self._ending = self._ending or (reason, error)
        if first:
            self._channel.put(END)

    @abstractmethod
    def _read_text(self, text: str) -> str:
        """The text that one more item, ACCEPTED or a piece, makes certain."""

    def _read_rest(self) -> str:
        """What was held back so far, at the end."""
        return ""

    @property
    def channel(self) -> Channel[str | None]:
        return self._channel

    def close(self) -> None:
        self._finish("cancelled")
        if self.task:
            self.task.cancel()
        self.end("cancelled")  # wakes a reader

    def __enter__(self) -> Self:
        while self._is_entering():
            self._read(self._channel.get())
        return self

    async def __aenter__(self) -> Self:
        try:
            while self._is_entering():
                await self._channel.wait()
                self._read(self._channel.get_nowait())
        except asyncio.CancelledError:
            self.close()
            raise
        return self

    def _is_entering(self) -> bool:
        if not self._accepted and self.finish_reason is not None:
            self._raise_error()
        return not self._accepted and self.finish_reason is None

    def _read(self, item: str | None) -> str:
        if item is END:
            if self._ending:
                self._finish(self._ending[0])
            return self._read_rest()
        text = self._read_text(item)
        self._accepted = True
        return text

    def _raise_error(self) -> None:
        if self.finish_reason == "error" and self._ending and self._ending[1]:
            raise self._ending[1]


class Stopwatch:
    """When a reply was submitted, which is now, and when its first and its latest token were put."""

    def __init__(self) -> None:
        self._submitted = time.perf_counter()
        self._first: float | None = None
        self._latest = self._submitted

    def lap(self) -> None:
        self._latest = time.perf_counter()
        if self._first is None:
            self._first = self._latest

    def timing(self, tokens: int) -> Timing:
        if self._first is None:
            return Timing()
        seconds = self._latest - self._first
        return Timing(self._first - self._submitted, (tokens - 1) / seconds if seconds > 0 else None)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
