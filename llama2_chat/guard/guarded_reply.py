"""One answer that nobody reads before it has been judged, as types.Reply promises it.

Entering it waits until the question has been judged and the model has taken it, so that a refusal is raised first.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Self

from llama2_chat.channel import Channel, ChannelReply
from llama2_chat.types import FinishReason, Reply, Timing, TokenLogprob, Usage

ACCEPTED = ""  # the first item of an answer that the model has begun; the text follows, all at once
END = None  # the last item


class GuardedReply(ChannelReply[str | None]):
    def __init__(self) -> None:
        self.task: Future[None] | None = None  # what asks the guard and the model
        self._channel: Channel[str | None] = Channel()
        self._reply: Reply | None = None  # the model's, once it is asked
        self._accepted = self._judged = False  # as far as the reader knows
        self._ending: tuple[FinishReason, Exception | None] | None = None
        self._lock = threading.Lock()

    # What the guard's event loop calls.

    def accept(self, reply: Reply) -> None:
        self._reply, self.relaxed = reply, reply.relaxed
        self._channel.put(ACCEPTED)

    def show(self, text: str) -> None:
        """What has been judged."""
        self._channel.put(text)

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Only the first call does anything."""
        with self._lock:
            first = self._ending is None
            self._ending = self._ending or (reason, error)
        if first:
            self._channel.put(END)

    # What readers see.

    @property
    def channel(self) -> Channel[str | None]:
        return self._channel

    @property
    def queue_position(self) -> int:
        return self._reply.queue_position if self._reply else 0

    @property
    def usage(self) -> Usage:
        return self._reply.usage if self._reply else Usage()

    @property
    def timing(self) -> Timing:
        return self._reply.timing if self._reply else Timing()

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        return self._reply.logprobs if self._reply and self._judged else ()

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        return self._reply.prompt_logprobs if self._reply and self._judged else ()

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
            return ""
        self._judged = self._accepted
        self._accepted = True
        return item

    def _raise_error(self) -> None:
        if self.finish_reason == "error" and self._ending and self._ending[1]:
            raise self._ending[1]
