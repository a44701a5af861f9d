"""All answers to one request, read as one: each piece comes with the index of its choice. Who leaves frees them all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Self

from llama2_chat.types import FinishReason, Reply, Timing, TokenLogprob, Usage


class Choices:
    """Replies in the order of their indices.

    per_prompt: how many answers to one prompt stand beside each other.
    openings: what is shown of each before its answer begins: the prompt that is echoed, or nothing.
    """

    def __init__(self, replies: Sequence[Reply], per_prompt: int = 1, openings: Sequence[str] = ()) -> None:
        self.replies = replies
        self.openings = openings or [""] * len(replies)
        self._per_prompt = per_prompt
        self._shown_logprobs = [0] * len(replies)
        self._unread = list(range(len(replies)))  # those whose end has not been read, the next to read first
        self._reading: dict[int, asyncio.Future[str]] = {}  # their next pieces
        self._entered = AsyncExitStack()

    @classmethod
    def started(cls, starts: Iterable[Callable[[], Reply]], per_prompt: int, openings: Sequence[str]) -> Self:
        """All of them, or none: what one raises closes the others."""
        with ExitStack() as opened:
            replies = []
            for start in starts:
                replies.append(start())
                opened.callback(replies[-1].close)
            opened.pop_all()
        return cls(replies, per_prompt, openings)

    # As one of them.

    @property
    def finish_reason(self) -> FinishReason | None:
        """The worst: what failed, what has not ended, what was cut off."""
        reasons = [reply.finish_reason for reply in self.replies]
        return min(reasons, key=("error", None, "cancelled", "length", "stop").index)

    @property
    def usage(self) -> Usage:
        """Of all together; a prompt counts once, however many answers it has."""
        prompts = [reply.usage for reply in self.replies[:: self._per_prompt]]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            completion_tokens=sum(reply.usage.completion_tokens for reply in self.replies),
            cached_tokens=sum(usage.cached_tokens for usage in prompts),
            dropped_messages=sum(usage.dropped_messages for usage in prompts),
        )

    @property
    def timing(self) -> Timing:
        """Of the first."""
        return self.replies[0].timing

    def close(self) -> None:
        for reply in self.replies:
            reply.close()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as entered:
            entered.callback(self.close)  # also of those that were not entered
            for reply in self.replies:
                await entered.enter_async_context(reply)
            self._entered = entered.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for piece in self._reading.values():
            piece.cancel()
        await asyncio.gather(*self._reading.values(), return_exceptions=True)
        await self._entered.aclose()

    def new_logprobs(self, index: int) -> Sequence[TokenLogprob]:
        """Of the tokens of one answer that have been read since this was last asked; before them, of its prompt."""
        reply = self.replies[index]
        tokens = [*reply.prompt_logprobs, *reply.logprobs][self._shown_logprobs[index] :]
        self._shown_logprobs[index] += len(tokens)
        return tokens

    # Their pieces.

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, str | None]:
        """The next piece of any of them, with its index, and None in its place once that answer has ended."""
        if not self._unread:
            raise StopAsyncIteration
        index = self._unread[0] if len(self.replies) == 1 else await self._first_ready()
        self._unread.remove(index)
        try:
            piece = await (self._reading.pop(index, None) or anext(self.replies[index]))
        except StopAsyncIteration:
            return index, None
        except asyncio.CancelledError:  # nothing was read
            self._unread.insert(0, index)
            raise
        self._unread.append(index)
        return index, piece

    async def _first_ready(self) -> int:
        """The answer that has a piece, or has ended; of several, the one that was read the longest ago."""
        for index in self._unread:
            if index not in self._reading:
                self._reading[index] = asyncio.ensure_future(anext(self.replies[index]))
        await asyncio.wait(self._reading.values(), return_when=asyncio.FIRST_COMPLETED)
        return next(index for index in self._unread if self._reading[index].done())
