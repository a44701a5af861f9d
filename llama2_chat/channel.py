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
