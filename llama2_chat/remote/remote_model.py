"""The promise of ChatBackend, kept by servers: which of them is asked, and who is asked next if it fails."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from llama2_chat.errors import Busy, ChatError, ModelUnavailable, NoAdapter, PromptTooLong
from llama2_chat.remote.client import Timeouts, use_our_http
from llama2_chat.remote.faults import INCOMPLETE, ServerFault
from llama2_chat.remote.health import Health
from llama2_chat.remote.question import Question
from llama2_chat.remote.reply import CALLS, RemoteReply
from llama2_chat.remote.server import Server
from llama2_chat.settings import Settings
from llama2_chat.tasks import STOPPED, TaskLoop
from llama2_chat.types import (
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

NO_TOKENS = "Only the server that has the model knows its tokens. Ask for a chat completion, or ask that server itself."


class RemoteModel:
    """Servers that have one model, asked one after another until one answers.

    timeouts: how long they are waited for and left alone.
    """

    call_style = CALLS
    mode = ""
    occupancy: Occupancy | None = None  # servers do not say who waits there

    def __init__(self, settings: Settings, timeouts: Timeouts = Timeouts()) -> None:
        servers = [Server(url, settings.inference_key, timeouts) for url in settings.inference_urls]
        self._servers = list({server.client.url: server for server in servers}.values())
        self._health = Health(self._servers, settings.inference_model or "", settings.sampling, timeouts)
        self._tasks = TaskLoop("remote")

    @property
    def status(self) -> Status:
        return self._health.status

    @property
    def capabilities(self) -> Capabilities:
        """They may change with the servers that are healthy."""
        counts = any(server.counts_tokens for server in self._servers if server.healthy)
        return Capabilities(supports_token_ids=False, knows_queue=False, can_fail_over=True, counts_tokens=counts)

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        """Of `status`; it may change at any time."""
        return self.status.state

    @property
    def context_length(self) -> int:
        return self._health.context_length

    @property
    def gpu_memory(self) -> list[tuple[int, int]]:
        return []  # theirs is not here

    @property
    def servers(self) -> list[ServerStatus]:
        return [server.status for server in self._servers]

    @property
    def faults(self) -> list[tuple[str, str]]:
        """The name of each server that cannot answer, and why, in a sentence."""
        return [(server.name, server.fault) for server in self._servers if server.fault]

    def start(self) -> threading.Thread:
        """Watch the servers, in a thread of its own, until close()."""
        use_our_http()
        return self._tasks.start(self._health.watch)

    def load(self) -> RemoteModel:
        """self, once it is known whether any server can answer."""
        self.start()
        self._health.known.wait()
        return self

    def probe(self) -> RemoteModel:
        """self, once every server has been probed, in place of start(): nothing can be answered afterwards."""
        use_our_http()
        asyncio.run(self._health.probe_all())
        return self

    def close(self, timeout_s: float = 5) -> None:
        """Close all connections, within timeout_s seconds. Readers see their replies end as cancelled."""
        self._tasks.close(timeout_s)

    def stream_reply(
        self,
        messages: list[Message],
        params: SamplingParams,
        *,
        trim: bool = True,
        to_the_end: bool = False,
        tools: ToolOffer | None = None,
    ) -> RemoteReply:
        """The answer to a conversation, on its way. Entering the reply waits until a server has accepted it.

        trim: leave out the oldest exchanges if the conversation is too long; reply.usage.dropped_messages counts them.
        to_the_end: the answer may be as long as the server lets it, instead of params.max_new_tokens.
        tools: passed on, or written as plain turns and a JSON schema for a server that does not take them.

        Raises ModelUnavailable if no server is healthy, ChatError for malformed messages and a server that is none of
        these. Entering or reading raises
        PromptTooLong, Busy, ModelUnavailable, and ChatError for what the server rejects.
        """
        if self.state != "ready":
            raise ModelUnavailable(self.status.error or "Still connecting to the model's server. Please try again.")
        if params.server and params.server not in [server.name for server in self._servers]:
            raise ChatError(f"There is no server {params.server!r:.100} here.")
        if params.adapter:  # of a conversation that had one elsewhere
            raise NoAdapter(params.adapter)
        question, reply = Question.of(messages, params, to_the_end, tools), RemoteReply(params.logprobs)
        self._tasks.answer(reply, lambda: self._answer(reply, question, trim, params.server))
        return reply

    def stream_completion(self, input_ids: Sequence[int], params: SamplingParams, *, to_the_end: bool = False) -> Reply:
        raise ChatError(NO_TOKENS)

    def fit(self, messages: list[Message], params: SamplingParams, tools: ToolOffer | None = None) -> Fit:
        """As a server counts it that has /tokenize, in as many steps as stream_reply would take to leave out what goes.

        Raises ChatError if there is none, or it does not answer.
        """
        question = Question.of(messages, params, tools=tools)
        counting = self._tasks.submit(lambda: self._fit(question, params.max_new_tokens))
        try:
            return counting.result()
        except concurrent.futures.CancelledError as error:
            raise ModelUnavailable(STOPPED) from error

    def encode(self, messages: list[Message], tools: ToolOffer | None = None) -> list[int]:
        raise ChatError(NO_TOKENS)

    def decode(self, input_ids: Sequence[int]) -> str:
        raise ChatError(NO_TOKENS)

    def encode_text(self, text: str) -> list[int]:
        raise ChatError(NO_TOKENS)

    def encode_infilling(
        self, prefix: str, suffix: str, *, extra: Sequence[str] = (), room: int | None = None
    ) -> list[int]:
        raise ChatError(NO_TOKENS)

    # What runs in the event loop.

    async def _answer(self, reply: RemoteReply, question: Question, trim: bool, only: str) -> None:
        """Ask one server after another until one has sent text; what happens to it then is final.

        only: the name of the one that may be asked; "" for all.
        """
        tried = {server for server in self._servers if only and server.name != only}
        nobody = f"{only} cannot answer now." if only else self.status.error or "No server can answer now."
        fault: ChatError = ModelUnavailable(f"{nobody} Please try again.")
        try:
            while server := self._least_loaded(tried):
                try:
                    return await self._ask(server, question, reply)
                except PromptTooLong as error:
                    shorter = None
                    if trim and not reply.has_text:
                        shorter = question.shortened(await self._counted(server, question, error))
                    if shorter is None:
                        raise question.too_long(error) from error
                    question = shorter
                except (ServerFault, Busy) as error:
                    log.warning("%s: %s", server.name, error.detail)
                    if not isinstance(error, Busy):
                        server.suspect.set()
                    if reply.has_text:
                        raise ModelUnavailable(f"{error} {INCOMPLETE}") from error
                    tried.add(server)
                    fault = error
            raise fault
        except asyncio.CancelledError:
            reply.end("cancelled")
            raise
        except Exception as error:
            reply.end("error", error)

    def _least_loaded(self, tried: set[Server]) -> Server | None:
        """The first of those: a visitor who is alone stays where the conversation is in the KV cache.

        A suspect comes last: its question may have been at fault rather than the server, which a probe will tell.
        """
        untried = (server for server in self._servers if server.healthy and server not in tried)
        return min(untried, key=lambda server: (server.suspect.is_set(), server.running), default=None)

    async def _counted(self, server: Server, question: Question, error: PromptTooLong) -> PromptTooLong:
        """The error with the numbers that fit() goes by: what a server says in a refusal may be less exact."""
        if server.counts_tokens:
            with suppress(ChatError):
                return PromptTooLong(*await server.count(self.status.model, question))
        return error

    async def _fit(self, question: Question, max_new_tokens: int) -> Fit:
        counting = [server for server in self._servers if server.healthy and server.counts_tokens]
        if not counting:
            raise ChatError(NO_TOKENS)
        while True:
            tokens, context_length = await counting[0].count(self.status.model, question)
            left = context_length - tokens
            shorter = question.shortened(PromptTooLong(tokens, context_length)) if left < max_new_tokens else None
            if shorter is None:
                fits = left >= max_new_tokens
                return Fit(tokens, question.dropped_messages, max(left, 0), context_length, fits)
            question = shorter

    async def _ask(self, server: Server, question: Question, reply: RemoteReply) -> None:
        reply.count_dropped(question.dropped_messages)
        server.running += 1
        try:
            await server.answer(self.status.model, question, reply)
        finally:
            server.running -= 1
        if reply.server_reason:
            reply.end(reply.server_reason)


if TYPE_CHECKING:
    _keeps_the_promise: type[ChatBackend] = RemoteModel
