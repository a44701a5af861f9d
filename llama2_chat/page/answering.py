"""From a conversation to its answer as it grows: one generator, which the page and programs go through.

Messages sent, tried again, edited or continued on the page come here through answers.py, and programs that use Gradio's
/chat through programs.py. No exception leaves the generator: what went wrong is in the End of the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import anyio.to_thread

from llama2_chat.agent import AgentReply, Call, Step
from llama2_chat.documents.asking import Source
from llama2_chat.documents.store import Document
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.page import wording
from llama2_chat.page.questions import AboutDocuments, Asked
from llama2_chat.server.errors import as_api_error
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.metrics import Answered, Metrics, Record
from llama2_chat.server.responses import submit
from llama2_chat.types import ChatBackend, Reply, Status, Timing, Usage

SHOW_EVERY_S = 0.05  # between two pieces: shown token by token, a long answer keeps the browser busier than the model
REFRESH_EVERY_S = 0.4  # while nothing new comes
# After which whoever asked and does not listen loses the place in line, or the answer.
UNREAD_WAITING_S = 20.0  # a tab in the background reads every five
UNREAD_S = 120.0  # long enough for a phone that was locked, or a line that was down


@dataclass(frozen=True)
class Progress:
    """The next piece of an answer, or a call of a tool that has ended, or what it waits for while there is none."""

    piece: str = ""
    step: Step | None = None
    calling: Call | None = None  # a tool, just now
    has_steps: bool = False  # one has ended before
    loading: Status | None = None  # the model, which is not ready yet
    reading: Document | None = None  # that the question is about
    sources: Sequence[Source] = ()  # what was quoted in the question
    queue_position: int = 0  # place in line


@dataclass(frozen=True)
class End:
    """How an answer ended, and what it cost."""

    reason: str  # "stop", "length", "cancelled", "error", or "unread": nobody listened
    error: str = ""  # a sentence for the visitor
    refused: bool = False  # the message never reached the model
    usage: Usage = field(default_factory=Usage)
    timing: Timing = field(default_factory=Timing)


class Answering:
    """Answers conversations of the page and of Gradio's /chat, within the limits that every way to ask has."""

    def __init__(self, chat: ChatBackend, limiter: ConcurrencyLimiter, metrics: Metrics) -> None:
        self.chat, self._limiter, self._metrics = chat, limiter, metrics

    async def answer(
        self, make_question: Callable[[], Asked], client: str, listened: Callable[[], bool]
    ) -> AsyncGenerator[Progress | End, None]:
        """Progress, several times a second, and at last an End. One that is closed before leaves nothing running.

        make_question: may raise ChatError.
        client: whose limit it counts in, and whose share of the model it takes.
        listened: whether somebody reads this now.
        """
        record, end = Record(self._metrics, "page"), None
        try:
            question = make_question()
            async with contextlib.aclosing(self._progress(question, client, record)) as all_progress:
                last_read, begun = time.monotonic(), False
                async for progress in all_progress:
                    begun = begun or bool(progress.piece or progress.step)
                    record.add(progress.piece)
                    if listened():
                        last_read = time.monotonic()
                    elif time.monotonic() - last_read > (UNREAD_S if begun else UNREAD_WAITING_S):
                        end = End("unread")
                        break
                    yield progress
        except Exception as error:
            record.error = as_api_error(error).code
            refused = record.reply is None and isinstance(error, ChatError) and not isinstance(error, ModelUnavailable)
            end = End("error", wording.error_sentence(error), refused)
        finally:
            record.end()
        yield _with_costs(end, record.reply)

    async def _progress(self, question: Asked, client: str, record: Record) -> AsyncGenerator[Progress, None]:
        """A message that arrives while the model loads, or a document that it is about is being read, waits for it."""
        with self._limiter.slot(client):
            while self.chat.state == "loading":
                yield Progress(loading=self.chat.status)
                await asyncio.sleep(REFRESH_EVERY_S)
            record.question, record.adapter = question.messages, question.params.adapter
            about = question if isinstance(question, AboutDocuments) else None
            while about and (unread := await anyio.to_thread.run_sync(about.unread)):
                yield Progress(reading=unread)
                await asyncio.sleep(REFRESH_EVERY_S)
            yield Progress()
            threads = self._limiter.threads(question.size)
            submitting = asyncio.ensure_future(submit(lambda: question.ask(self.chat, client), threads))
            try:
                while not (await asyncio.wait([submitting], timeout=REFRESH_EVERY_S))[0]:
                    yield Progress()  # a long text waits for others and takes a while to encode
            finally:
                submitting.cancel()
            async with submitting.result() as reply:
                record.reply = reply
                if about and about.sources:
                    yield Progress(sources=about.sources)
                has_steps = False
                async for event in _events(reply):
                    if isinstance(event, Step):
                        record.add_call(event.name, failed=event.failed)
                        has_steps = True
                        yield Progress(step=event, has_steps=True)
                    else:
                        calling = reply.calling if isinstance(reply, AgentReply) else None
                        yield Progress(event, None, calling, has_steps, queue_position=reply.queue_position)


async def _events(reply: Reply | AgentReply) -> AsyncIterator[str | Step]:
    """Steps and pieces at a pace for the eye; an empty piece when nothing new comes for a while."""
    with contextlib.suppress(StopAsyncIteration):
        while True:
            event: str | Step = ""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_EVERY_S):
                    event = await anext(reply)
            yield event
            if event:
                await asyncio.sleep(SHOW_EVERY_S)


def _with_costs(end: End | None, reply: Answered | None) -> End:
    if reply is None:
        return end or End("cancelled")
    return replace(end or End(reply.finish_reason or "cancelled"), usage=reply.usage, timing=reply.timing)
