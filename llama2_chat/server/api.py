"""The HTTP side beside the page: OpenAI's routes for programs, health, metrics, and headers that guard every answer.

What a request may say stands in openai_types.py. Health only looks at `chat.status`; it never waits for the model. The
page itself is mounted by app.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2_chat.errors import BadGrammar, Busy, ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.remote import RemoteModel
from llama2_chat.remote.remote_model import NO_TOKENS
from llama2_chat.server.metrics import Metrics, Record
from llama2_chat.server.openai_types import MOST_NEW_TOKENS, ApiError, ChatRequest, CompletionRequest, TokenizeRequest
from llama2_chat.settings import Settings
from llama2_chat.types import Reply

if TYPE_CHECKING:
    from model import ChatModel

    Chat = ChatModel | RemoteModel

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0  # proxies cut a connection that is silent for a minute, some sooner
RETRY_AFTER_S = 5
SCHEMA_THREADS = 20  # that may wait for their JSON schema to be compiled, which goes one at a time
LONG_BODY = 2**18  # bytes, from which on one text is encoded at a time: 10 MB take seconds and more than 1 GB
STARTED = int(time.time())
FAILED = "Something went wrong on the server, and its log says what."

# An answer is shown as Markdown and may hold images, forms and links that a model made up or a visitor asked for:
# nothing in it may reach another host. Gradio itself needs inline code and, for its event handlers, eval.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-src 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'self'",
    )
)
# A Space is shown in a frame on huggingface.co. Elsewhere anybody's Space could frame this page to steer clicks on it.
HUGGING_FACE = "https://huggingface.co https://*.huggingface.co https://*.hf.space"


def health_router(chat: Chat) -> APIRouter:
    """GET /healthz: 200 once the model can answer, else 503 and why. GET /livez: 200 while the process lives."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        status = chat.status
        if status.state == "ready":
            ready = {"model": status.model, "precision": status.precision, "device": status.device, "mode": chat.mode}
            return JSONResponse({"status": "ready", **ready})
        if status.state == "failed":
            return JSONResponse({"status": "failed", "error": status.error}, 503)
        progress = {"phase": status.phase, "done_bytes": status.done_bytes, "total_bytes": status.total_bytes}
        return JSONResponse({"status": "loading", **progress}, 503)

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    return router


def api_router(chat: Chat, settings: Settings, clients: Clients, metrics: Metrics) -> APIRouter:
    """OpenAI's routes, /tokenize and /metrics."""
    door = _door(chat, settings, metrics)
    router = APIRouter(route_class=door)
    # What is slow to read has threads of its own, or a few of them would leave none for everybody else.
    for_schemas, for_long = anyio.CapacityLimiter(SCHEMA_THREADS), anyio.CapacityLimiter(1)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        _check_ready(chat)
        return {"object": "list", "data": [_card(chat)]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(chat, model)
        return _card(chat)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await answer(body, request, body.plain())

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(body, request, body.prompt)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        _check_model(chat, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "invalid_value", "Send either a prompt or messages.", "prompt")
        messages = None if body.messages is None else [message.plain() for message in body.messages]
        question, threads = body.prompt if messages is None else messages, await threads_for(request)
        ids = await anyio.to_thread.run_sync(_encode, chat, question, limiter=threads)
        return {"tokens": ids, "count": len(ids), "max_model_len": chat.context_length}

    @router.get("/metrics")
    def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    methods = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]

    @router.api_route("/v1/{path:path}", methods=methods, include_in_schema=False)
    async def unknown(path: str, request: Request) -> None:
        raise ApiError(404, "unknown_url", f"There is no {request.method} /v1/{path:.60} here.")

    async def threads_for(request: Request) -> anyio.CapacityLimiter | None:
        return for_long if len(await request.body()) > LONG_BODY else None

    async def answer(body: ChatRequest | CompletionRequest, request: Request, question: Any) -> Response:
        _check_model(chat, body.model)
        body.refuse_what_would_be_missed()
        record: Record = request.state.record
        record.question = question
        async with AsyncExitStack() as leaving:
            leaving.enter_context(clients.place(_client(request, settings)))
            try:
                threads = await threads_for(request) or (for_schemas if body.response_format else None)
                reply = await submit(lambda: _submit(chat, body, question, settings), threads)
                async with _listening(reply, request):  # a remote server may take a while to accept it
                    record.reply = await leaving.enter_async_context(reply)
            except ChatError as error:
                raise as_api_error(error, body.question) from error
            form = _Form(chat.status.model, isinstance(body, ChatRequest))
            if body.stream:
                events = _events(form, reply, record, body.wants_usage)
                return _EventStream(events, record, leaving.pop_all())
            record.answer = await _whole(reply, request)
            return JSONResponse(form.whole(record.answer, reply))

    return router


def _door(chat: Chat, settings: Settings, metrics: Metrics) -> type[APIRoute]:
    """What every route of the API does first and last: ask for the key, and turn whatever is raised into an answer."""

    class Door(APIRoute):
        def get_route_handler(self) -> Callable:
            handle = super().get_route_handler()

            async def handle_at_the_door(request: Request) -> Response:
                record = request.state.record = Record(metrics, self.path)
                try:
                    _check_key(request, settings)  # before the body is read
                    response = await handle(request)
                except Exception as error:
                    problem = as_api_error(error)
                    record.end(problem.code)
                    return JSONResponse(problem.body, problem.status, problem.headers)
                if not isinstance(response, _EventStream):
                    record.end()
                return response

            return handle_at_the_door

    return Door


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """The same in OpenAI's words; what is not meant for visitors goes to the log. param: what a ChatError is about."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error.errors()[0])
        case HTTPException(status_code=413):
            return ApiError(413, "request_too_large", "This request is larger than the server reads.")
        case HTTPException():
            return ApiError(error.status_code, "invalid_request", str(error.detail))
        case PromptTooLong():
            return ApiError(400, "context_length_exceeded", str(error), param)
        case Busy():
            return ApiError(429, "rate_limit_exceeded", str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
        case BadGrammar():
            return ApiError(400, "invalid_value", str(error), "response_format")
        case ModelUnavailable():
            return ApiError(503, "model_unavailable", str(error))
        case ChatError():
            return ApiError(400, "invalid_value", str(error), param)
    log.error("Answering failed", exc_info=error)
    return ApiError(500, "internal_error", FAILED)


def _invalid(error: dict[str, Any]) -> ApiError:
    if error["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"The body is not JSON: {error['ctx']['error']}.")
    path = [str(part) for part in error["loc"][1:]]
    if not path:
        return ApiError(400, "invalid_request", "The body must be a JSON object, sent as application/json.")
    if error["type"] == "missing":
        return ApiError(400, "missing_parameter", f"{'.'.join(path)} is missing.", path[0])
    what = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    came = repr(error["input"])
    came = f"; it was {came}" if len(came) < 60 else ""
    param = path[0] if path[0] != "messages" else ".".join(path)
    return ApiError(400, "invalid_value", f"{'.'.join(path)}: {what}{came}.", param)


def _check_key(request: Request, settings: Settings) -> None:
    """Without API_KEY everybody may ask, unless the page has a login: the API would be a way around it."""
    if not settings.api_keys and not settings.auth_file:
        return
    given = _given_key(request).encode("latin-1")  # as Starlette decoded it
    known = [hmac.compare_digest(given, key.encode()) for key in settings.api_keys]  # all of them: time tells nothing
    if not any(known):
        sentence = "Send one of the server's API keys, as Authorization: Bearer."
        if not settings.api_keys:
            sentence = (
                "This server has a login and no API key, so programs cannot ask it. Its operator can set API_KEY."
            )
        raise ApiError(401, "invalid_api_key", sentence, headers={"WWW-Authenticate": "Bearer"})


def _given_key(request: Request) -> str:
    """The key alone: "bearer  KEY" is "Bearer KEY"."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _check_ready(chat: Chat) -> None:
    if chat.state == "loading":
        sentence = "The model is still loading. Please try again in a minute."
        raise ApiError(503, "model_loading", sentence, headers={"Retry-After": str(RETRY_AFTER_S)})
    if chat.state == "failed":
        raise ModelUnavailable(chat.status.error)


def _check_model(chat: Chat, name: str | None) -> None:
    _check_ready(chat)
    if name is not None and name != chat.status.model:
        sentence = f"There is no model {name!r:.100} here; this server has {chat.status.model}."
        raise ApiError(404, "model_not_found", sentence, "model")


def _card(chat: Chat) -> dict[str, Any]:
    return {
        "id": chat.status.model,
        "object": "model",
        "created": STARTED,
        "owned_by": "llama-2-chat",
        "max_model_len": chat.context_length or None,  # what a remote server does not say
    }


def _client(request: Request, settings: Settings) -> str:
    """Who counts as one client: the key, or the address where there are none."""
    return _given_key(request) if settings.api_keys else address(request)


def address(request: Any) -> str:
    """Where a request comes from; uvicorn has looked at X-Forwarded-For if a trusted proxy sent it."""
    return request.client.host if request.client else ""


class Clients:
    """Who has how many answers on their way. Used from the event loop alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._answers: Counter[str] = Counter()

    @contextlib.contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Room for one more answer, or Busy."""
        if self._limit and self._answers[client] >= self._limit:
            raise Busy(f"You have {self._limit} answers on their way, and no more are allowed. Wait for one to end.")
        self._answers[client] += 1
        try:
            yield
        finally:
            self._answers[client] -= 1
            if not self._answers[client]:
                del self._answers[client]


# ---- From a request to a reply ----


async def submit(start: Callable[[], Reply], threads: anyio.CapacityLimiter | None = None) -> Reply:
    """start() in a thread: a long text takes a while to encode. Cancelled, it leaves nothing running."""
    submitting = asyncio.ensure_future(anyio.to_thread.run_sync(start, limiter=threads))
    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:
        submitting.add_done_callback(lambda done: done.exception() or done.result().close())
        raise


def _submit(chat: Chat, body: ChatRequest | CompletionRequest, question: Any, settings: Settings) -> Reply:
    """The reply, with the length that was asked for or, by default, all that the context window leaves."""
    if isinstance(chat, RemoteModel) and isinstance(body, ChatRequest):  # its server counts the tokens
        wanted = body.most_new_tokens
        params = body.params(settings.sampling, wanted or MOST_NEW_TOKENS)
        return chat.stream_reply(question, params, trim=body.trim, to_the_end=wanted is None)
    ids, wanted = _encode(chat, question), body.most_new_tokens
    room = chat.context_length - len(ids)
    if isinstance(body, ChatRequest) and body.trim:
        enough = wanted or settings.sampling.max_new_tokens
        if room < enough:
            return chat.stream_reply(question, body.params(settings.sampling, enough), trim=True)
    if room < (wanted or 1):
        answer = f", and {wanted:,} more are asked for as the answer" if wanted else ""
        raise ApiError(
            400,
            "context_length_exceeded",
            f"This model's maximum context length is {chat.context_length:,} tokens, prompt and answer together. "
            f"The prompt is {len(ids):,} tokens{answer}. Shorten it{', or lower max_tokens' if wanted else ''}.",
            body.question,
        )
    return chat.stream_completion(ids, body.params(settings.sampling, wanted or min(room, MOST_NEW_TOKENS)))


def _encode(chat: Chat, question: Any) -> list[int]:
    """question: messages, a text, or ids."""
    if isinstance(chat, RemoteModel):
        raise ChatError(NO_TOKENS)
    if isinstance(question, str):
        return chat.encode_text(question)
    return chat.encode(question) if question and isinstance(question[0], dict) else question


# ---- From a reply to a response ----


class _Form:
    """How one answer is written: as a chat's or as a text's, whole or in chunks."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time())}
        self._head["model"] = model

    def whole(self, text: str, reply: Reply) -> dict[str, Any]:
        says = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        name = "chat.completion" if self._is_chat else "text_completion"
        return self._write(name, says, reply.finish_reason) | {"usage": _usage(reply)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        says = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._write(name, says, finish_reason)

    def _write(self, name: str, says: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **says, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": name, "choices": [choice]}


def _usage(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "dropped_messages": usage.dropped_messages,
    }


async def _whole(reply: Reply, request: Request) -> str:
    """The text of the whole answer. It is cancelled when the reader leaves."""
    try:
        async with _listening(reply, request) as gone:
            text = "".join([piece async for piece in reply])
            if reply.finish_reason == "cancelled" and not gone.done():
                raise _stopped()
            return text
    except Exception as error:
        raise _failure(error) from error


@contextlib.asynccontextmanager
async def _listening(reply: Reply, request: Request) -> AsyncIterator[asyncio.Future[None]]:
    """The reply is closed, and the future done, when the reader leaves."""
    gone = asyncio.ensure_future(_disconnected(request))
    gone.add_done_callback(lambda done: done.cancelled() or reply.close())
    try:
        yield gone
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(error: Exception) -> ApiError:
    """Of an answer on its way: the request was fine, or there would be no reply."""
    return ApiError(500, "generation_failed", str(error)) if isinstance(error, ChatError) else as_api_error(error)


def _stopped() -> ApiError:
    return ApiError(503, "model_unavailable", "The server is being stopped, and this answer with it.")


async def _events(form: _Form, reply: Reply, record: Record, wants_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. The first is written at once, whatever the line."""
    more = {"usage": None} if wants_usage else {}
    yield _event(form.chunk({"role": "assistant", "content": ""}) | more)
    try:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    piece = await anext(reply)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            except StopAsyncIteration:
                break
            record.add(piece)
            yield _event(form.chunk({"content": piece}) | more)
        if reply.finish_reason == "cancelled":
            raise _stopped()
    except Exception as error:
        problem = _failure(error)
        record.error = problem.code
        yield _event(problem.body)
        return
    yield _event(form.chunk({}, reply.finish_reason) | more)
    if wants_usage:
        yield _event(form.chunk({}) | {"choices": [], "usage": _usage(reply)})
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


class _EventStream(StreamingResponse):
    """Lets go of the model when the stream ends, also when its reader left before the first event."""

    def __init__(self, events: AsyncIterator[str], record: Record, leaving: AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold events back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._record, self._leaving = record, leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._leaving:
                await super().__call__(scope, receive, send)
        finally:
            self._record.end()


def guard(app: FastAPI, settings: Settings) -> None:
    """No other site may read from or act on this server, nor may an answer reach out from the page."""
    on_space = settings.on_space
    headers = {
        "Content-Security-Policy": f"{CONTENT_SECURITY_POLICY} {HUGGING_FACE if on_space else ''}".strip(),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    # Gradio allows every origin, with credentials, unless the app around it has a CORSMiddleware.
    app.add_middleware(CORSMiddleware, allow_origins=[])
    if settings.body_limit_mb is not None:
        app.add_middleware(_BodyLimit, most_bytes=int(settings.body_limit_mb * 1e6))
    app.add_middleware(_SecurityHeaders, headers=headers)


class _BodyLimit:
    """Stops reading a body that is too large. FastAPI's own max_body_size would answer programs in plain text."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        came = 0

        async def receive_at_most() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most_bytes:
                raise HTTPException(413)
            return message

        await self.app(scope, receive_at_most if scope["type"] == "http" else receive, send)


class _SecurityHeaders:
    """Plain ASGI, because Starlette's BaseHTTPMiddleware gets in the way of streams that the reader cuts."""

    def __init__(self, app: ASGIApp, headers: dict[str, str]) -> None:
        self.app, self.headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, send_guarded if scope["type"] == "http" else send)
