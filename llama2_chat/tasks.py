"""Answers that are tasks of an event loop in a thread of its own: those of other servers, and those that are judged."""

from __future__ import annotations

import asyncio
import threading
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self, TypeVar

from llama2_chat.channel import Channel, ChannelReply
from llama2_chat.errors import ModelUnavailable
from llama2_chat.types import FinishReason

T = TypeVar("T")

STOPPED = "The server is being stopped."
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


class TaskLoop:
    """The thread, and the loop in which its tasks run until close()."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._stopped = False  # the loop takes no more tasks

    def start(self, work: Callable[[], Coroutine[Any, Any, object]]) -> threading.Thread:
        """work: what runs in the loop for as long as there is one."""
        started = threading.Event()
        run = self._run
        self._thread = threading.Thread(target=lambda: asyncio.run(run(work, started)), name=self._name, daemon=True)
        self._thread.start()
        started.wait()
        return self._thread

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Raises ModelUnavailable before start() and after close()."""
        with self._lock:
            if self._loop is None or self._stopped:
                raise ModelUnavailable(STOPPED)
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def answer(self, reply: TaskReply, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let a task write a reply. Raises as submit()."""
        reply.task = self.submit(work)
        reply.task.add_done_callback(lambda _: reply.end("cancelled"))  # if it was cancelled before its first step

    def close(self, timeout_s: float) -> None:
        """Cancel all tasks, and wait no longer than that for them to end."""
        if self._thread and self._loop and self._main:
            with suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join(timeout_s)

    async def _run(self, work: Callable[[], Coroutine[Any, Any, object]], started: threading.Event) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        started.set()
        try:
            with suppress(asyncio.CancelledError):
                await work()
        finally:
            # What was submitted before this is in the loop's queue: as the loop ends it becomes a task, which is then
            # cancelled. Anything later would wait in a queue that nobody reads.
            with self._lock:
                self._stopped = True
