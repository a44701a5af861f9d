"""The promise of ChatBackend, kept only for what a guard finds safe: the newest message before the model sees it, and
the whole answer before anybody else does.

What is judged is what was said since the last answer, without the system prompt. The questions of an agent's steps and
the results of tools are messages like any other here, and so are the texts that a completion goes on with.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from prometheus_client import Counter

from llama2_chat.errors import ChatError, ModelUnavailable, Unsafe
from llama2_chat.guard.guarded_reply import GuardedReply
from llama2_chat.guard.judge import Judge, sentence_of
from llama2_chat.guard.verdict import Verdict
from llama2_chat.remote.client import use_our_http
from llama2_chat.settings import Settings
from llama2_chat.tasks import TaskLoop
from llama2_chat.types import (
    CallStyle,
    Capabilities,
    ChatBackend,
    Fit,
    Message,
    Occupancy,
    Reply,
    SamplingParams,
    ServerStatus,
    Status,
    ToolOffer,
)

log = logging.getLogger("llama2_chat")

Subject = Literal["message", "answer"]
UNSAFE: dict[Subject, str] = {
    "message": "The guard of this server judged this message unsafe, so the model has not been asked.",
    "answer": "The guard of this server judged the answer unsafe, so it is not shown.",
}
NO_VERDICT: dict[Subject, str] = {
    "message": "The guard of this server cannot judge messages now, so none is answered. Please try again later.",
    "answer": "The guard of this server could not judge the answer, so it is not shown. Please try again later.",
}


class GuardedChat:
    """Another chat behind a guard. One thread runs an event loop in which every answer is a task.

    judge: None asks the server of GUARD_URL. verdicts: how many there were, for /metrics.
    """

    def __init__(self, chat: ChatBackend, settings: Settings, judge: Judge | None = None) -> None:
        self._chat, self._judge = chat, judge or Judge(settings)
        self._fails_open = settings.guard_fails == "open"
        self.verdicts = Counter(
            "chat_guard_verdicts", "What the guard was asked to judge.", ("subject", "verdict"), registry=None
        )
        self._tasks = TaskLoop("guard")

    def start(self) -> threading.Thread:
        use_our_http()
        self._tasks.start(lambda: asyncio.Event().wait())
        log.info("A guard judges each message and each answer; what has no verdict is %s", self._consequence)
        return self._chat.start()

    def close(self, timeout_s: float = 5) -> None:
        self._tasks.close(timeout_s)
        self._chat.close(timeout_s)

    def stream_reply(
        self,
        messages: list[Message],
        params: SamplingParams,
        *,
        trim: bool = True,
        to_the_end: bool = False,
        tools: ToolOffer | None = None,
    ) -> Reply:
        """As the chat's; what may be refused is refused when the reply is entered. Raises Unsafe then, too."""
        begun = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""
        return self._reply(
            lambda: self._chat.stream_reply(messages, params, trim=trim, to_the_end=to_the_end, tools=tools),
            lambda: newest(messages),
            begun,
        )

    def stream_completion(self, input_ids: Sequence[int], params: SamplingParams, *, to_the_end: bool = False) -> Reply:
        return self._reply(
            lambda: self._chat.stream_completion(input_ids, params, to_the_end=to_the_end),
            lambda: self._chat.decode(input_ids),
        )

    def _reply(self, start: Callable[[], Reply], read_question: Callable[[], str], begun: str = "") -> GuardedReply:
        reply = GuardedReply()
        self._tasks.answer(reply, lambda: self._answer(reply, start, read_question, begun))
        return reply

    # What runs in the event loop.

    async def _answer(
        self, reply: GuardedReply, start: Callable[[], Reply], read_question: Callable[[], str], begun: str
    ) -> None:
        try:
            question = await asyncio.to_thread(read_question)
            await self._check("message", question)
            async with await _started(start) as unjudged:
                reply.accept(unjudged)
                text = "".join([piece async for piece in unjudged])
            if unjudged.finish_reason != "cancelled":
                await self._check("answer", question, begun + text)
                reply.show(text)
            reply.end(unjudged.finish_reason or "cancelled")
        except asyncio.CancelledError:
            reply.end("cancelled")
            raise
        except Exception as error:
            reply.end("error", error)

    async def _check(self, subject: Subject, question: str, answer: str | None = None) -> None:
        """Return for what may pass. Raises Unsafe, and ModelUnavailable where there is no verdict and none may pass."""
        if not (question if answer is None else answer).strip():
            return
        verdict: Verdict | None = None
        try:
            verdict = await self._judge.judge(question, answer)
        except ChatError as error:
            log.warning("No verdict on this %s, which is %s. %s", subject, self._consequence, sentence_of(error))
        outcome = "none" if verdict is None else "safe" if verdict.safe else "unsafe"
        self.verdicts.labels(subject, outcome).inc()
        if verdict is None and not self._fails_open:
            raise ModelUnavailable(NO_VERDICT[subject])
        if verdict is not None and not verdict.safe:
            log.info("The guard judged this %s unsafe: %s", subject, ", ".join(verdict.categories) or "no category")
            raise Unsafe(UNSAFE[subject])

    @property
    def _consequence(self) -> str:
        return "let through, for GUARD_FAILS is open" if self._fails_open else "refused, for GUARD_FAILS is closed"

    # As the chat.

    @property
    def capabilities(self) -> Capabilities:
        return self._chat.capabilities

    @property
    def status(self) -> Status:
        return self._chat.status

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        return self._chat.state

    @property
    def mode(self) -> str:
        return self._chat.mode

    @property
    def context_length(self) -> int:
        return self._chat.context_length

    @property
    def call_style(self) -> CallStyle:
        return self._chat.call_style

    @property
    def occupancy(self) -> Occupancy | None:
        return self._chat.occupancy

    @property
    def gpu_memory(self) -> list[tuple[int, int]]:
        return self._chat.gpu_memory

    @property
    def servers(self) -> Sequence[ServerStatus]:
        return self._chat.servers

    def fit(self, messages: list[Message], params: SamplingParams, tools: ToolOffer | None = None) -> Fit:
        return self._chat.fit(messages, params, tools)

    def encode(self, messages: list[Message], tools: ToolOffer | None = None) -> list[int]:
        return self._chat.encode(messages, tools)

    def decode(self, input_ids: Sequence[int]) -> str:
        return self._chat.decode(input_ids)

    def encode_text(self, text: str) -> list[int]:
        return self._chat.encode_text(text)

    def encode_infilling(
        self, prefix: str, suffix: str, *, extra: Sequence[str] = (), room: int | None = None
    ) -> list[int]:
        return self._chat.encode_infilling(prefix, suffix, extra=extra, room=room)


def newest(messages: Sequence[Message]) -> str:
    """What was said since the last answer that has ended, without the system prompt; all of it if that is nothing."""
    said = [*messages]
    if said and said[-1]["role"] == "assistant":  # an answer to go on with
        said.pop()
    first = next((i for i, message in enumerate(said) if message["role"] != "system"), len(said))
    last = max((i for i, message in enumerate(said) if message["role"] == "assistant"), default=-1)
    text = "\n\n".join(message["content"] for message in said[max(first, last + 1) :])
    return text if text.strip() else "\n\n".join(message["content"] for message in messages)


async def _started(start: Callable[[], Reply]) -> Reply:
    """start() in a thread: a long text takes a while to encode. Cancelled, it leaves nothing running."""
    starting = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(_close_unread)
        raise


def _close_unread(starting: asyncio.Future[Reply]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().close()


if TYPE_CHECKING:
    _keeps_the_promise: type[ChatBackend] = GuardedChat
