"""The same promise as ChatModel, kept by OpenAI-compatible servers: vLLM and its kin, or another of these pages.

INFERENCE_URL names them. One thread runs an event loop in which every answer is a task, so that no thread waits for
readers, however many there are. Prompts and tokens are the servers' affair: each writes its prompt with its own chat
template, and lengths are known from what it reports.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import (
    AsyncInferenceClient,
    ChatCompletionStreamOutput,
    get_async_session,
    set_async_client_factory,
)
from huggingface_hub.errors import TextGenerationError

from llama2_chat.errors import Busy, ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.prompt import Turn, check_messages
from llama2_chat.settings import Settings
from llama2_chat.types import (
    Capabilities,
    ChatBackend,
    FinishReason,
    Message,
    Occupancy,
    Reply,
    SamplingParams,
    ServerStatus,
    Status,
    Timing,
    Usage,
)

log = logging.getLogger(__name__)

CONNECT_S = 5.0
SILENT_S = 120.0  # a question may wait in the server's own line for this long before anything is heard of it
IDLE_S = 30.0  # a server that nothing was heard of for this long is asked for one token
UNWELL_S = 5.0  # so is one that failed, this often
LAST_WORDS_S = 5.0  # after the end of an answer its usage may still come
LINE_BYTES = 2**20  # no event, and no error's text, is longer
CHARACTERS_PER_TOKEN = 4.0  # hardly any language has more
GREETING: list[Message] = [{"role": "user", "content": "Hello"}]
EXTRAS = ("top_k", "repetition_penalty")  # not in OpenAI's API, and some servers refuse what is not
NOT_WHOLE = "What is above is not the whole answer."
NO_TOKENS = "Only the server that has the model knows its tokens. Ask for a chat completion, or ask that server itself."
OWN_TEMPLATE = "The prompt is written by the server's own chat template."


class RemoteModel:
    """Servers that have one model, which of them are healthy, and how their answers are read."""

    capabilities = Capabilities(supports_token_ids=False, knows_queue=False, can_fail_over=True)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.status = Status(phase="connect", model=settings.inference_model or "")
        self.context_length = 0  # tokens, as the server says it; 0 if it does not
        self.mode = ""
        self.occupancy: Occupancy | None = None  # servers do not say who waits there
        self.gpu_memory: list[tuple[int, int]] = []  # none of theirs is here
        self._servers = list({server.url: server for server in map(Server, settings.inference_urls)}.values())
        key = settings.inference_key
        # Without one, huggingface_hub would send these servers the HF_TOKEN of this machine.
        self._headers = {"authorization": f"Bearer {key}" if key else None}
        self._known = threading.Event()  # whether anybody can answer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        """Of `status`; it may change at any time."""
        return self.status.state

    @property
    def servers(self) -> list[ServerStatus]:
        return [ServerStatus(server.name, server.healthy, server.running) for server in self._servers]

    @property
    def faults(self) -> list[tuple[str, str]]:
        """The name of each server that cannot answer, and why, in a sentence."""
        return [(server.name, server.fault) for server in self._servers if server.fault]

    def start(self) -> threading.Thread:
        """Look after the servers, in a thread of its own, until close()."""
        set_async_client_factory(_http_client)
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), name="remote", daemon=True)
        self._thread.start()
        started.wait()
        return self._thread

    def load(self) -> RemoteModel:
        """self, once it is known whether anybody can answer."""
        self.start()
        self._known.wait()
        return self

    def probe(self) -> RemoteModel:
        """self, once every server has been probed, without start(): nothing can be answered afterwards."""
        set_async_client_factory(_http_client)

        async def look_at_all() -> None:
            await asyncio.gather(*map(self._look_at, self._servers))

        asyncio.run(look_at_all())
        return self

    def close(self, timeout_s: float = 5) -> None:
        """Close all connections, within timeout_s seconds. Readers see their replies end as cancelled."""
        if self._thread is not None:
            with suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join(timeout_s)

    def stream_reply(
        self, messages: list[Message], params: SamplingParams, *, trim: bool = True, to_the_end: bool = False
    ) -> RemoteReply:
        """The answer to a conversation, on its way. Entering the reply waits until a server has accepted it.

        trim: leave out the oldest exchanges if the conversation is too long; reply.usage.dropped_messages counts them.
        to_the_end: the answer may be as long as the server lets it, instead of params.max_new_tokens.
        Raises ModelUnavailable if no server is well, ChatError for malformed messages. Entering or reading raises
        PromptTooLong, Busy, ModelUnavailable, and ChatError for what the server refuses.
        """
        if self.state != "ready":
            raise ModelUnavailable(self.status.error or "The model's server is still being asked. Please try again.")
        system, turns = check_messages(messages)
        reply = RemoteReply()
        try:
            task = self._answer(reply, system, turns, _fields(params, to_the_end), trim)
            reply.task = asyncio.run_coroutine_threadsafe(task, self._loop)
        except RuntimeError:
            task.close()
            raise ModelUnavailable("The server is being stopped.") from None
        return reply

    def stream_completion(self, input_ids: Sequence[int], params: SamplingParams, *, to_the_end: bool = False) -> Reply:
        raise ChatError(NO_TOKENS)

    def encode(self, messages: list[Message]) -> list[int]:
        raise ChatError(NO_TOKENS)

    def encode_text(self, text: str) -> list[int]:
        raise ChatError(NO_TOKENS)

    # ---- In the loop: answers ----

    async def _answer(
        self, reply: RemoteReply, system: str | None, turns: list[Turn], fields: dict[str, Any], trim: bool
    ) -> None:
        """Ask one server after another until one has said a word; what happens then is final."""
        tried: set[Server] = set()
        fault: ChatError = ModelUnavailable(self.status.error or "No server can answer now. Please try again.")
        try:
            while server := self._least_loaded(tried):
                server.running += 1
                try:
                    await self._read(server, reply, _messages(system, turns), fields)
                    return reply.end(reply.last_reason)
                except PromptTooLong as error:
                    again = reply.usage.dropped_messages > 0
                    shorter = _shortened(system, turns, error, fields, again) if trim and not reply.begun else []
                    if not shorter:
                        return reply.end("error", _too_long_for(turns, error, fields))
                    reply.drop(sum(turn.messages for turn in turns[: -len(shorter)]))
                    turns = shorter
                except (_Fault, Busy) as error:
                    fault = error
                    tried.add(server)
                    log.warning("%s: %s", server.name, _for_the_log(error))
                    if not isinstance(error, Busy):
                        server.doubted.set()
                    if reply.begun:
                        return reply.end("error", ModelUnavailable(f"{error} {NOT_WHOLE}"))
                finally:
                    server.running -= 1
            reply.end("error", fault)
        except asyncio.CancelledError:
            reply.end("cancelled")
            raise
        except Exception as error:  # what is wrong with the question would be so elsewhere
            reply.end("error", error)

    def _least_loaded(self, tried: set[Server]) -> Server | None:
        """The first of those: a visitor who is alone stays where the conversation is in the KV cache.

        One that has just failed comes last until it was asked for a token: the question may have been at fault.
        """
        untried = (server for server in self._servers if server.healthy and server not in tried)
        return min(untried, key=lambda server: (server.doubted.is_set(), server.running), default=None)

    async def _read(self, server: Server, reply: RemoteReply, messages: list[Message], fields: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(None) as limit, self._asked(server, messages, fields) as chunks:
                reply.accept()
                async for chunk in chunks:
                    server.heard = time.monotonic()
                    reply.put(chunk)
                    if reply.last_reason and limit.when() is None:
                        limit.reschedule(asyncio.get_running_loop().time() + LAST_WORDS_S)
        except (ChatError, TimeoutError):
            if not reply.last_reason:
                raise
        if not reply.last_reason:
            raise _Fault("The model's server ended this answer without saying why; it may not be whole.")

    @asynccontextmanager
    async def _asked(
        self, server: Server, messages: list[Message], fields: dict[str, Any]
    ) -> AsyncIterator[AsyncIterator[ChatCompletionStreamOutput]]:
        """The chunks of an answer. Leaving closes the connection, by which the server knows that nobody reads."""
        fields = {name: value for name, value in fields.items() if server.knows_extras or name not in EXTRAS}
        extras = {name: fields.pop(name) for name in EXTRAS if name in fields}
        # A client for each answer: it keeps every stream that it has opened until it is closed itself.
        client = AsyncInferenceClient(base_url=server.url, headers=self._headers, timeout=_timeout())
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with client:
                chunks = await client.chat_completion(
                    messages, model=self.status.model, extra_body=extras, **fields, **stream
                )
                async with aclosing(chunks):
                    yield chunks
        except Exception as error:
            raise _as_chat_error(error) from error

    # ---- In the loop: who is well ----

    async def _run(self, started: threading.Event) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        started.set()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*map(self._look_after, self._servers))

    async def _look_after(self, server: Server) -> None:
        while True:
            await self._look_at(server)
            server.doubted.clear()
            pause_s = IDLE_S if server.healthy else UNWELL_S
            while pause_s > 0 and not server.doubted.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):  # wait_for of Python 3.11 can lose a cancel
                        await server.doubted.wait()
                pause_s = server.heard + IDLE_S - time.monotonic() if server.healthy else 0  # an answer is a probe too

    async def _look_at(self, server: Server) -> None:
        """Ask it for one token, and whatever is still unknown before."""
        before, words = server.fault, ""
        try:
            async with asyncio.timeout(SILENT_S):
                await self.learn(server)
                await self.complete(server)
            server.fault = ""
        except Exception as error:
            fault = _as_chat_error(error)
            server.fault, words = str(fault), _for_the_log(fault)
        server.heard = time.monotonic()
        if server.fault != before:
            log.info("%s: %s", server.name, words or f"answers with {self.status.model}")
        self._tell()

    async def learn(self, server: Server) -> None:
        """Which model it has, unless INFERENCE_MODEL says so, and how much that can hold. Raises ChatError."""
        if server.listed:
            return
        cards: list[dict[str, Any]] = []
        try:
            async with get_async_session() as client:
                headers = {name: value for name, value in self._headers.items() if value}
                answer = await client.get(server.models_url, headers=headers, timeout=_timeout())
                cards = [card for card in answer.json()["data"] if isinstance(card["id"], str)]
        except Exception as error:
            fault = _as_chat_error(error)
            if isinstance(fault, Busy) or str(fault) in (*CONNECTION_FAULTS, WRONG_KEY, STARTING):
                raise fault from error
            if not self.status.model:  # it may well answer, asked by name
                raise _Fault(NO_LIST, _for_the_log(fault)) from error
        if not self.status.model:
            if len(cards) != 1:
                names = ", ".join(card["id"] for card in cards[:5])
                raise _Fault(f"INFERENCE_MODEL must say which model to use. The server has {names or 'none'}.")
            self.status = replace(self.status, model=cards[0]["id"])
        server.listed = True
        for card in cards:
            if card["id"] == self.status.model:
                self.context_length = self.context_length or _count(card.get("max_model_len"))

    async def complete(self, server: Server) -> None:
        """A real completion of one token. Raises ChatError."""
        fields = _fields(replace(self.settings.sampling, max_new_tokens=1))
        try:
            await self._read(server, RemoteReply(), GREETING, fields)
        except _Refused as error:
            if not server.knows_extras or not any(name in str(error) for name in EXTRAS):
                raise
            server.knows_extras = False
            await self._read(server, RemoteReply(), GREETING, fields)

    def _tell(self) -> None:
        """Put into words who is well."""
        well = [server for server in self._servers if server.healthy]
        if well:
            why = [OWN_TEMPLATE]
            if len(well) < len(self._servers):
                why.append(f"{len(self._servers) - len(well)} of {len(self._servers)} servers cannot answer now.")
            if not all(server.knows_extras for server in well):
                why.append("Top-k and repetition penalty have no effect there.")
            count = "a server" if len(well) == 1 else f"{len(well)} servers"  # whose names no visitor needs
            self.status = replace(self.status, state="ready", device=count, why=" ".join(why), error="")
        elif all(server.fault for server in self._servers):
            self.status = replace(self.status, state="failed", error=self._servers[0].fault)
        if self.state != "loading":
            self._known.set()


if TYPE_CHECKING:
    _keeps_the_promise: type[ChatBackend] = RemoteModel


class Server:
    """One address, and what is known about it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        # Its scheme in small letters: huggingface_hub takes HTTP:// for a model of its hub, and sends questions there.
        self.url = parts._replace(path=f"{path}/v1").geturl()
        self.models_url = parts._replace(path=f"{path}/v1/models").geturl()
        self.name = parts.netloc.rpartition("@")[2] + path  # without a password
        self.fault: str | None = None  # a sentence; "" if it is well, None if it has not been asked yet
        self.running = 0  # answers of this process
        self.heard = 0.0  # when it last gave a sign of life
        self.doubted = asyncio.Event()  # an answer failed, and it was not asked for a token since
        self.knows_extras = True
        self.listed = False  # whether it was asked which models it has

    @property
    def healthy(self) -> bool:
        return self.fault == ""


class RemoteReply:
    """One answer on its way, as chat_types.Reply promises: the loop's thread puts chunks in, one reader takes text."""

    queue_position = 0  # servers do not tell

    def __init__(self) -> None:
        self.task: Future[None]  # set by whoever submits, before anyone reads
        self.finish_reason: FinishReason | None = None
        self.last_reason: FinishReason | None = None  # what the server says; more of it may still come
        self.usage = Usage()
        self.begun = False  # whether there was any text
        self._accepted = False
        self._error: Exception | None = None
        self._pieces: deque[str] = deque()
        self._times = [time.perf_counter()]  # of the submit, the first piece and the latest
        self._lock = threading.Lock()
        self._news: Future[None] = Future()  # done when something happens, and then replaced

    # What the loop's thread calls.

    def accept(self) -> None:
        self._accepted = True
        self._wake()

    def put(self, chunk: ChatCompletionStreamOutput) -> None:
        for choice in chunk.choices or ():
            if text := choice.delta and choice.delta.content:
                self._times[2:] = []
                self._times.append(time.perf_counter())
                self._pieces.append(_unicode(text))
                self.begun = True
                # Counted until the server does, which may never come: a piece is a token, or a few.
                self.usage = replace(self.usage, completion_tokens=self.usage.completion_tokens + 1)
                self._wake()
            if choice.finish_reason in ("abort", "error"):
                raise _Fault("The model's server gave this answer up.")
            if choice.finish_reason:
                self.last_reason = "length" if choice.finish_reason == "length" else "stop"
        if chunk.usage:
            details = getattr(chunk.usage, "prompt_tokens_details", None) or {}
            self.usage = replace(
                self.usage,
                prompt_tokens=_count(chunk.usage.prompt_tokens),
                completion_tokens=_count(chunk.usage.completion_tokens) or self.usage.completion_tokens,
                cached_tokens=_count(details.get("cached_tokens")),
            )

    def drop(self, messages: int) -> None:
        self.usage = replace(self.usage, dropped_messages=self.usage.dropped_messages + messages)

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Only the first call does anything."""
        with self._lock:
            if self.finish_reason is None:
                self._error, self.finish_reason = error, reason
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            news, self._news = self._news, Future()
        news.set_result(None)

    # What readers see.

    @property
    def timing(self) -> Timing:
        submitted, *times = self._times
        seconds = times[-1] - times[0] if times else 0
        later_tokens = self.usage.completion_tokens - 1
        return Timing(times[0] - submitted if times else None, later_tokens / seconds if seconds else None)

    def close(self) -> None:
        self.end("cancelled")
        self.task.cancel()

    def __iter__(self) -> RemoteReply:
        return self

    def __next__(self) -> str:
        while True:
            news = self._news  # before looking: what comes after the look must wake
            if piece := self._take():
                return piece
            if piece is None:
                raise StopIteration
            news.result()

    def __aiter__(self) -> RemoteReply:
        return self

    async def __anext__(self) -> str:
        while True:
            news = self._news
            if piece := self._take():
                return piece
            if piece is None:
                raise StopAsyncIteration
            await _arrival(news)

    def _take(self) -> str | None:
        """The text that has come since the last call; None when there is no more."""
        ended = self.finish_reason is not None  # before looking, as above
        if text := "".join(self._pieces.popleft() for _ in range(len(self._pieces))):
            return text
        if ended and self._error:
            raise self._error
        return None if ended else ""

    # Entering waits until a server has accepted the question, so that a refusal is raised before anything is shown.

    def __enter__(self) -> RemoteReply:
        while True:
            news = self._news
            if self._entered():
                return self
            news.result()

    async def __aenter__(self) -> RemoteReply:
        try:
            while True:
                news = self._news
                if self._entered():
                    return self
                await _arrival(news)
        except asyncio.CancelledError:
            self.close()
            raise

    def _entered(self) -> bool:
        if self._error and not self._accepted:
            raise self._error
        return self._accepted or self.finish_reason is not None

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aexit__(self, *exc: object) -> None:
        self.close()


async def _arrival(news: Future[None]) -> None:
    await asyncio.shield(asyncio.wrap_future(news))  # whose cancelling would reach the loop's thread otherwise


# ---- A question, as it is sent ----


def _fields(params: SamplingParams, to_the_end: bool = False) -> dict[str, Any]:
    """All of them, each time: what is left out a server may take from the model's generation_config.json."""
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
    fields = {name: getattr(params, name) for name in names}
    fields |= {"top_k": params.top_k or -1, "stop": list(params.stop) or None}  # -1 is everybody's word for all
    if params.grammar is not None:
        fields["response_format"] = _schema_format(json.loads(params.grammar))
    return fields if to_the_end else {**fields, "max_tokens": params.max_new_tokens}


def _schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _messages(system: str | None, turns: list[Turn]) -> list[Message]:
    first = [Message(role="system", content=system)] if system is not None else []
    return [*first, *(Message(role=turn.role, content=turn.content) for turn in turns)]


def _shortened(
    system: str | None, turns: list[Turn], error: PromptTooLong, fields: dict[str, Any], again: bool
) -> list[Turn]:
    """Without as many of the oldest exchanges as the server's numbers tell, and one at least; [] if there are none.

    A server that stops counting where its room ends tells too small a number, so at a second try a quarter is left out.
    """
    if len(turns) == 1:
        return []
    if not (error.prompt_tokens and error.context_length):
        return turns[len(turns) // 4 * 2 + 2 :]
    sizes = [len(turn.content) for turn in turns]
    instructions = len(system or "")
    tokens_per_character = max(error.prompt_tokens / (instructions + sum(sizes) + 1), 1 / CHARACTERS_PER_TOKEN)
    room = (error.context_length - fields.get("max_tokens", 1)) / tokens_per_character - instructions
    first = len(turns) // 8 * 2 + 2 if again else 2
    kept = sum(sizes[first:])
    while first < len(turns) - 1 and kept > room:
        kept -= sum(sizes[first : first + 2])
        first += 2
    return turns[first:]


def _too_long_for(turns: list[Turn], error: PromptTooLong, fields: dict[str, Any]) -> PromptTooLong:
    """The server's numbers, and what else the visitor can change: the length of the answer."""
    max_new_tokens = fields.get("max_tokens", 0) if error.prompt_tokens else 0
    subject: Literal["conversation", "message"] = "message" if len(turns) == 1 else "conversation"
    return PromptTooLong(error.prompt_tokens, error.context_length, max_new_tokens, subject=subject)


# ---- What goes wrong, in sentences. Where it happened, and what the server says, is for the log. ----

UNREACHABLE = "The model's server cannot be reached. Please try again later."
REFUSED = "The model's server does not accept connections; it may be starting. Please try again in a minute."
UNTRUSTED = "The certificate of the model's server is not trusted here. Its operator can name a CA in SSL_CERT_FILE."
SILENT = f"The model's server has said nothing for {SILENT_S:.0f} s."
CUT = "The connection to the model's server broke off."
CONNECTION_FAULTS = (UNREACHABLE, REFUSED, UNTRUSTED, SILENT, CUT)
WRONG_KEY = "The model's server does not accept the key. The right one belongs in INFERENCE_KEY."
NO_SUCH_MODEL = "The model's server does not have this model. INFERENCE_MODEL and INFERENCE_URL say where to look."
NO_LIST = "The model's server does not tell which models it has. INFERENCE_MODEL can, if INFERENCE_URL is right."
STARTING = "The model's server cannot answer yet. Please try again in a minute."
NO_API = "What answers at the address of the model's server does not speak OpenAI's API. INFERENCE_URL may be wrong."
FAILED = "The model's server has failed. Please try again."
FULL = "The model's server has too many questions at once. Please try again in a minute."


class _Fault(ModelUnavailable):
    """The server's, so that another one may do better."""

    def __init__(self, sentence: str, detail: str = "") -> None:
        super().__init__(sentence)
        self.detail = detail


class _Refused(ChatError):
    """The question's fault, in the server's words."""


def _for_the_log(error: Exception) -> str:
    detail = getattr(error, "detail", "")
    return f"{error} ({detail})" if detail else str(error)


def _as_chat_error(error: Exception) -> ChatError:
    if isinstance(error, ChatError):
        return error
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    detail = f"{type(error).__name__}: {error}"[:300]
    if caused_by(ssl.SSLCertVerificationError):
        return _Fault(UNTRUSTED, detail)
    if caused_by(ConnectionRefusedError):
        return _Fault(REFUSED, detail)
    if caused_by(httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError):
        return _Fault(UNREACHABLE, detail)
    if caused_by(TimeoutError, httpx2.TimeoutException):
        return _Fault(SILENT, detail)
    if caused_by(httpx2.TransportError):
        return _Fault(CUT, detail)
    if isinstance(error, TextGenerationError):  # in the middle of a stream, where there is no status any more
        said = _said({"error": error.args[0]} if error.args else {})
        return _too_long(said) or _Fault(FAILED, repr(said))
    if isinstance(error, (ValueError, TypeError, LookupError, AttributeError)):  # no JSON, or of another shape
        return _Fault(NO_API, detail)
    log.error("Asking the model's server failed", exc_info=error)
    return _Fault(FAILED, detail)


def _refusal(status: int, body: bytes) -> ChatError:
    """What a status other than 200 means."""
    text = body.decode("utf-8", "replace")
    try:
        said = _said(json.loads(text))
    except ValueError:
        said = ""
    detail = f"HTTP {status}: {said or text[:200]!r}"
    if too_long := status in (400, 413, 422, 500) and _too_long(text):
        return too_long
    if status in (400, 413, 422):
        return _Refused(f"The model's server refuses this: {said or f'HTTP {status}'}")
    if status == 429:
        return Busy(FULL)
    known = {401: WRONG_KEY, 403: WRONG_KEY, 404: NO_SUCH_MODEL, 503: STARTING}
    return _Fault(known.get(status, FAILED if status >= 500 else NO_API), detail)


def _said(body: Any) -> str:
    """The message in an error's JSON; servers disagree where it stands."""
    while body and isinstance(body, (dict, list)):
        names = ("error", "message", "detail", "msg")
        body = body[0] if isinstance(body, list) else next((body[name] for name in names if body.get(name)), "")
    return _unicode(body[:300]) if isinstance(body, str) else ""


def _unicode(text: str) -> str:
    """Without halves of characters, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


# Both numbers as vLLM, SGLang, llama.cpp, TGI, OpenAI and this project write them. Some servers repeat the question
# beside them: a number without bounds would be looked for in each digit of a long one anew.
NUMBER = r"(\d[\d,]{0,15})"
CONTEXT = re.compile(
    rf"""context (?:length|size|window)[^\d"]{{0,20}}{NUMBER}"""
    rf"""|n_ctx"?: ?{NUMBER}|`max_new_tokens` must be <= ?{NUMBER}"""
)
PROMPT = re.compile(
    rf"""{NUMBER} (?:input tokens|tokens from the input|`inputs` tokens|in the (?:messages|prompt))"""
    rf"""|(?:prompt is|input \(|request \(|resulted in|n_prompt_tokens"?:) ?{NUMBER}"""
)


def _too_long(said: str) -> PromptTooLong | None:
    """If that is what the server says."""
    context, prompt = (pattern.search(said) for pattern in (CONTEXT, PROMPT))
    if not context and "context_length_exceeded" not in said:
        return None
    numbers = [int(next(filter(None, found.groups())).replace(",", "")) if found else 0 for found in (prompt, context)]
    return PromptTooLong(*numbers)


# ---- HTTP ----


def _http_client() -> httpx2.AsyncClient:
    """What huggingface_hub asks with. Its own obeys HF_HUB_OFFLINE, follows redirects, and takes 20 ms to be made."""
    return _HttpClient(event_hooks={"response": [_check]}, verify=_ssl_context())


class _HttpClient(httpx2.AsyncClient):
    def build_request(self, *args: Any, json: Any = None, **more: Any) -> httpx2.Request:
        # huggingface_hub writes a schema as TGI reads it, and nobody else.
        if json and (schema := json.get("response_format", {}).get("value")) is not None:
            json = {**json, "response_format": _schema_format(schema)}
        return super().build_request(*args, json=json, **more)


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


def _timeout() -> httpx2.Timeout:
    return httpx2.Timeout(SILENT_S, connect=CONNECT_S)


async def _check(response: httpx2.Response) -> None:
    """Nothing but a stream of events, or for the list of models a 200, goes on to huggingface_hub."""
    if response.status_code != 200:
        body = b""
        async for data in response.aiter_bytes():
            body += data
            if len(body) > LINE_BYTES:
                break
        raise _refusal(response.status_code, body)
    if response.request.method == "POST":
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise _Fault(NO_API, f"It sent {kind or 'something without a type'}.")
        response.aiter_lines = functools.partial(_lines, response)


async def _lines(response: httpx2.Response) -> AsyncIterator[str]:
    """Lines as server-sent events have them. httpx2 would end one at U+2028 too, in the middle of its JSON."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
        if len(rest) > LINE_BYTES:
            raise _Fault(NO_API, "It sent a line without an end.")
    if rest:
        yield rest.decode("utf-8", "replace")


def _count(value: object) -> int:
    """A number that a server reports, if it does."""
    return value if type(value) is int and 0 < value < 2**63 else 0
