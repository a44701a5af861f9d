"""The answers that the page has asked for: each runs on while its reader reloads, and is there to be read again.

An answer belongs to whoever asked: to a login, or to the cookie of a browser. Its id comes from the page, 128 random
bits, so that asking twice with the same id is asking once. Used from the event loop alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import asdict
from typing import Any

from llama2_chat.agent import Call, Step
from llama2_chat.errors import Busy
from llama2_chat.page import wording
from llama2_chat.page.answering import End, Progress
from llama2_chat.page.confirming import Confirming
from llama2_chat.server.errors import ApiError

KEPT_S = 600.0  # after its end, for a reader who was cut off
MOST_ANSWERS = 1_000  # running and kept
MOST_OF_ONE = 250  # running, of one address: one alone shall not keep everybody else out
ALIVE_EVERY_S = 5.0  # a line in a silent stream: proxies cut connections on which nothing moves

AllProgress = AsyncGenerator[Progress | End, None]


class Answer:
    """One answer on its way or at its end, for any number of readers."""

    def __init__(
        self,
        owner: str,
        client: str,
        start: Callable[[Callable[[], bool]], AllProgress],
        confirming: Confirming,
    ) -> None:
        """start: given a function that says whether somebody listens, makes the answer."""
        self.owner, self.client, self.end, self.confirming = owner, client, None, confirming
        self._text: list[str] = []
        self._steps: list[dict[str, Any]] = []
        self._sources: list[dict[str, Any]] = []
        self._waiting: dict[str, Any] = {}
        self._readers = 0
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._run(start(lambda: self._readers > 0)))

    end: End | None

    async def _run(self, all_progress: AllProgress) -> None:
        try:
            async with contextlib.aclosing(all_progress):
                async for progress in all_progress:
                    if isinstance(progress, End):
                        self.end = progress
                    else:
                        self._take(progress)
        finally:
            self.end = self.end or End("cancelled")
            self.confirming.close()
            self._tell()

    def _take(self, progress: Progress) -> None:
        waiting = self._waits_for(progress) if not progress.piece and not self._text else {}
        if progress.piece:
            self._text.append(progress.piece)
        if progress.step:
            self._steps.append(_step(progress.step))
        if progress.sources:
            self._sources = [asdict(source) for source in progress.sources]
        if progress.piece or progress.step or progress.sources or waiting != self._waiting:
            self._waiting = waiting
            self._tell()

    def _waits_for(self, progress: Progress) -> dict[str, Any]:
        line = wording.waiting(progress.loading, progress.queue_position, progress.has_steps, progress.reading)
        if progress.calling is None:
            return {"waiting": line}
        calling = _call(progress.calling)
        if progress.calling.asks and (number := self.confirming.number(progress.calling)):
            described = {"description": progress.calling.description, "version": progress.calling.version}
            calling["asks"] = {"call": number, **described}
            line = wording.ASKING
        return {"waiting": line, "calling": calling}

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """End it at once; what is written of it stays."""
        self.task.cancel()

    def _so_far(self) -> dict[str, Any]:
        """Beside the text."""
        known = {"steps": self._steps, "sources": self._sources}
        return {name: value for name, value in known.items() if value}

    async def lines(self) -> AsyncIterator[str]:
        """JSON, a line each: all of the steps and the text so far, then every step and piece, what it waits for
        meanwhile, and its end. The excerpts that it was made from come once, as soon as they are known."""
        self._readers += 1
        try:
            sent, steps, sources, waiting = len(self._text), len(self._steps), self._sources, self._waiting
            yield _line({"text": "".join(self._text), **self._so_far(), **waiting})
            while (
                self.end is None or sent < len(self._text) or steps < len(self._steps) or sources is not self._sources
            ):
                changed = self._changed
                if sources is not self._sources:
                    sources = self._sources
                    yield _line({"sources": sources})
                elif steps < len(self._steps):
                    steps += 1
                    yield _line({"step": self._steps[steps - 1]})
                elif sent < len(self._text):
                    sent, more = len(self._text), self._text[sent:]
                    yield _line({"more": "".join(more)})
                elif self._waiting != waiting:
                    waiting = self._waiting
                    yield _line(waiting)
                else:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ALIVE_EVERY_S):
                            await changed.wait()
                            continue
                    yield "\n"
            yield _line({"end": _end(self.end)})
        finally:
            self._readers -= 1


def _call(call: Call | Step) -> dict[str, Any]:
    """As the page keeps it: the input is JSON, however the model made it."""
    return {"name": call.name, "input": json.dumps(call.input, ensure_ascii=False)}


def _step(step: Step) -> dict[str, Any]:
    return {**_call(step), "result": step.result, "seconds": round(step.seconds, 3), "failed": step.failed}


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":")) + "\n"


def _end(end: End) -> dict[str, Any]:
    """In the names of the page's records."""
    return {
        "reason": end.reason,
        "error": end.error,
        "refused": end.refused,
        "promptTokens": end.usage.prompt_tokens,
        "completionTokens": end.usage.completion_tokens,
        "cachedTokens": end.usage.cached_tokens,
        "droppedMessages": end.usage.dropped_messages,
        "firstTokenS": end.timing.time_to_first_token_s,
        "tokensPerS": end.timing.tokens_per_second,
    }


class Answers:
    """All of them, by their ids."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}

    def start(
        self,
        id: str,
        owner: str,
        client: str,
        start: Callable[[Callable[[], bool]], AllProgress],
        confirming: Confirming,
    ) -> Answer:
        """The answer with this id, made now if there is none. Raises Busy if there are too many, ApiError if it is
        somebody else's."""
        if id in self._answers:
            return self.get(id, owner)
        if self._running_of(client) >= MOST_OF_ONE:
            raise Busy("Too many questions from your address are being answered. Please try again in a minute.")
        if len(self._answers) >= MOST_ANSWERS and not self._drop_oldest_ended():
            raise Busy("This server is answering as many questions as it can. Please try again in a minute.")
        answer = self._answers[id] = Answer(owner, client, start, confirming)
        answer.task.add_done_callback(lambda task: self._ended(id, task))
        return answer

    def get(self, id: str, owner: str) -> Answer:
        """Raises ApiError where this owner has no such answer; somebody else's is not told from none."""
        answer = self._answers.get(id)
        if answer is None or answer.owner != owner:
            raise ApiError(404, "not_found", "There is no such answer here, or no longer.")
        return answer

    def _running_of(self, client: str) -> int:
        return sum(answer.client == client and answer.end is None for answer in self._answers.values())

    def _ended(self, id: str, task: asyncio.Task[None]) -> None:
        task.get_loop().call_later(KEPT_S, self._answers.pop, id, None)

    def _drop_oldest_ended(self) -> bool:
        """Of whoever has the most of them: many of one client push out none of another's."""
        clients = Counter(answer.client for answer in self._answers.values() if answer.end)
        if not clients:
            return False
        ((most, _),) = clients.most_common(1)
        del self._answers[next(id for id, answer in self._answers.items() if answer.end and answer.client == most)]
        return True
