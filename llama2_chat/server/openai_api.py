"""OpenAI's routes for programs, llama.cpp's /infill, /tokenize, /detokenize and /metrics.

What a request may say stands in openai_types.py and item_types.py, how an answer is written in chunks.py and items.py,
how one is refused in errors.py. Lengths, prompts and whose turn it is are the model's affair: here a request becomes
one call of ChatBackend.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Protocol

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST

from llama2_chat.documents.asking import Quoted, Source, quote
from llama2_chat.documents.library import Library
from llama2_chat.errors import BadGrammar, ChatError, ModelUnavailable, NoInfilling
from llama2_chat.server.bodies import JsonRequest
from llama2_chat.server.choices import Choices
from llama2_chat.server.chunks import Chunks
from llama2_chat.server.embeddings import add_embedding_route
from llama2_chat.server.errors import RETRY_AFTER_S, ApiError, as_api_error, error_response, no_such_route
from llama2_chat.server.files import add_file_routes
from llama2_chat.server.infill import InfillRequest, Infills, stream_infill
from llama2_chat.server.item_types import ResponsesRequest
from llama2_chat.server.items import Items
from llama2_chat.server.limits import ConcurrencyLimiter, check_key, client_id
from llama2_chat.server.metrics import Metrics, Question, Record
from llama2_chat.server.neutral_fields import NOTHING_STORED
from llama2_chat.server.openai_types import (
    BaseRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TextRequest,
    TokenizeRequest,
)
from llama2_chat.server.owners import ApiOwners
from llama2_chat.server.responses import (
    AnswerWriter,
    EventStream,
    closed_on_disconnect,
    events,
    reply_headers,
    submit_for,
    whole_texts,
)
from llama2_chat.server.speech import CallIds, Reader, Speech, TextReader
from llama2_chat.settings import Settings
from llama2_chat.tools import CallReader
from llama2_chat.types import ChatBackend, Embedder, Fit, Message, Reply, SamplingParams

SCHEMA_THREADS = 20  # that may wait for their JSON schema to be compiled, which goes one at a time
SEEDS = 2**63
STARTED = int(time.time())


class StartReply(Protocol):
    """stream_reply or stream_completion of a ChatBackend, with its question."""

    def __call__(self, params: SamplingParams, *, to_the_end: bool) -> Reply: ...


def api_router(
    chat: ChatBackend,
    settings: Settings,
    limiter: ConcurrencyLimiter,
    metrics: Metrics,
    library: Library | None = None,
    embedder: Embedder | None = None,
) -> APIRouter:
    """All of them. Without a model they say why there is none. library: where documents are; None for none at all.
    embedder: of texts; without one, their route says so."""
    router = APIRouter(route_class=_route_class(settings, metrics))
    # What is slow to read has threads of its own, or a few such requests would leave none for everybody else.
    schema_threads = anyio.CapacityLimiter(SCHEMA_THREADS)

    @router.get("/v1/models")
    @router.get("/v1/models/", include_in_schema=False)
    async def models() -> dict[str, Any]:
        _check_ready(chat)
        return {"object": "list", "data": [_model_object(chat, name) for name in _models(chat)]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(chat, model)
        return _model_object(chat, model)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        if not body.documents:
            return await answer(body, request, body.said, [functools.partial(_reply, chat, body, body.conversation)])
        quoted = await quote_documents(body, request)
        reply = functools.partial(_reply, chat, body, lambda: quoted.messages)
        return await answer(body, request, body.said, [reply], quoted.sources)

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await answer(body, request, body.said, [functools.partial(_reply, chat, body, body.conversation)])

    @router.api_route("/v1/responses/{id:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def stored_response(id: str) -> None:
        raise ApiError(404, "not_stored", f"{NOTHING_STORED} to POST /v1/responses each time.")

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        def complete(prompt: str | list[int], params: SamplingParams, *, to_the_end: bool) -> Reply:
            ids = _prompt_ids(chat, prompt, body.suffix)
            return chat.stream_completion(ids, params, to_the_end=to_the_end)

        return await answer(body, request, body.prompt, [functools.partial(complete, each) for each in body.prompt])

    @router.post("/infill")
    async def infill(body: InfillRequest, request: Request) -> Response:
        return await answer(body, request, body.said, [functools.partial(stream_infill, chat, body)])

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        _check_model(chat, body.model)
        encode = functools.partial(_encode, chat, body)
        ids = await anyio.to_thread.run_sync(encode, limiter=await threads_for(request))
        return {"tokens": ids, "count": len(ids), "max_model_len": chat.context_length}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
        _check_model(chat, body.model)
        decode = functools.partial(chat.decode, body.tokens)
        return {"prompt": await anyio.to_thread.run_sync(decode, limiter=await threads_for(request))}

    @router.get("/metrics")
    def prometheus_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    owners = ApiOwners(settings)
    if library is not None:
        add_file_routes(router, library, owners, "/v1")
    add_embedding_route(router, embedder, settings, limiter)

    methods = ["GET", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]

    @router.api_route("/v1/{path:path}", methods=methods, include_in_schema=False)
    async def unknown(path: str, request: Request) -> None:
        raise no_such_route(request.method, f"/v1/{path}")

    async def threads_for(request: Request) -> anyio.CapacityLimiter | None:
        return limiter.threads(len(await request.body()))

    async def quote_documents(body: ChatRequest, request: Request) -> Quoted:
        _check_model(chat, body.model)
        owner = owners.document_owner(request)
        if library is None or owner is None:
            raise ApiError(404, "not_found", "There are no documents of yours here.", "documents")
        shelf, ids, params = library.shelf(owner), body.documents or [], body.params(settings.sampling)

        def fit(messages: list[Message]) -> Fit:
            return chat.fit(messages, params, body.offer)

        def search() -> Quoted:
            return quote(chat, shelf, ids, body.conversation(), fit, trim=bool(body.trim))

        try:
            return await anyio.to_thread.run_sync(search, limiter=await threads_for(request))
        except ChatError as error:
            raise as_api_error(error, "documents") from error

    async def answer(
        body: BaseRequest,
        request: Request,
        question: Question,
        starts: Sequence[StartReply],
        sources: Sequence[Source] = (),
    ) -> Response:
        _check_model(chat, body.model)
        body.reject_unsupported()
        record: Record = request.state.record
        record.question = question
        async with AsyncExitStack() as cleanup:
            client = client_id(request, settings)
            cleanup.enter_context(limiter.slot(client, len(starts) * body.choices_each))
            try:
                record.adapter = body.model if body.model in chat.status.adapters else ""
                params = replace(body.params(settings.sampling), client=client, adapter=record.adapter)
                start = functools.partial(_start, chat, body, starts, params)
                has_grammar = params.grammar is not None or body.offer is not None
                threads = await threads_for(request) or (schema_threads if has_grammar else None)
                choices = await submit_for(request, start, threads)
                async with closed_on_disconnect(choices, request):  # a remote server may take a while to accept it
                    record.reply = await cleanup.enter_async_context(choices)
            except ChatError as error:
                raise as_api_error(error, _field_of(error, body)) from error
            writer = _writer(chat, body, params, question, choices, sources)
            if body.stream:
                pieces = events(writer, choices, record)
                return EventStream(pieces, record, cleanup.pop_all(), reply_headers(choices))
            texts = await whole_texts(choices, request)
            for index, text in enumerate(texts):
                record.add(text, index)
            return JSONResponse(writer.whole(texts, choices), headers=reply_headers(choices))

    return router


def _route_class(settings: Settings, metrics: Metrics) -> type[APIRoute]:
    """What every route does first and last: ask for the key, and turn whatever is raised into a response."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable:
            handle = super().get_route_handler()

            async def handle_and_record(request: Request) -> Response:
                record = request.state.record = Record(metrics, self.path)
                try:
                    check_key(request, settings)  # before the body is read
                    request = JsonRequest(request.scope, request.receive)
                    if self.body_field is not None:
                        await request.json()
                    response = await handle(request)
                except Exception as error:
                    problem = as_api_error(error)
                    record.end(problem.code)
                    return error_response(problem)
                if not isinstance(response, EventStream):
                    record.end()
                return response

            return handle_and_record

    return Route


def _check_ready(chat: ChatBackend) -> None:
    if chat.state == "loading":
        sentence = "The model is still loading. Please try again in a minute."
        raise ApiError(503, "model_loading", sentence, headers={"Retry-After": str(RETRY_AFTER_S)})
    if chat.state == "failed":
        raise ModelUnavailable(chat.status.error)


def _models(chat: ChatBackend) -> list[str]:
    """The names that a request may give as its model: the model's own, and its adapters'."""
    return [chat.status.model, *chat.status.adapters]


def _check_model(chat: ChatBackend, name: str | None) -> None:
    _check_ready(chat)
    if name is not None and name not in _models(chat):
        sentence = f"There is no model {name!r:.100} here; this server has {', '.join(_models(chat))}."
        raise ApiError(404, "model_not_found", sentence, "model")


def _model_object(chat: ChatBackend, name: str) -> dict[str, Any]:
    parent = {"parent": chat.status.model} if name in chat.status.adapters else {}
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "llama-2-chat",
        "max_model_len": chat.context_length or None,  # what a remote server does not say
        **parent,
    }


def _start(chat: ChatBackend, body: BaseRequest, starts: Sequence[StartReply], params: SamplingParams) -> Choices:
    """All answers to a request. Of several with a seed, each has its own: the next number after the one before."""
    each = body.choices_each
    seeds = [None if params.seed is None else (params.seed + n) % SEEDS for n in range(each)]
    to_the_end = body.requested_tokens is None
    openings = [text for prompt in body.echoed for text in [_prompt_text(chat, prompt)] * each]
    return Choices.started(
        [
            functools.partial(start, replace(params, seed=seed), to_the_end=to_the_end)
            for start in starts
            for seed in seeds
        ],
        each,
        openings,
    )


def _reply(
    chat: ChatBackend,
    body: ChatRequest | ResponsesRequest,
    conversation: Callable[[], list[Message]],
    params: SamplingParams,
    *,
    to_the_end: bool,
) -> Reply:
    return chat.stream_reply(conversation(), params, trim=bool(body.trim), to_the_end=to_the_end, tools=body.offer)


def _field_of(error: ChatError, body: BaseRequest) -> str:
    """What in the request an error is about."""
    if isinstance(error, BadGrammar):
        return body.grammar_field if body.offer is None else "tools"
    if isinstance(error, NoInfilling) and isinstance(body, TextRequest):
        return body.suffix_field
    return body.question_field


def _writer(
    chat: ChatBackend,
    body: BaseRequest,
    params: SamplingParams,
    question: Question,
    choices: Choices,
    sources: Sequence[Source],
) -> AnswerWriter:
    if isinstance(body, InfillRequest):
        return Infills(params.adapter or chat.status.model, chat.context_length, with_text=body.max_tokens != 0)
    ids = CallIds(None if body.seed is None else f"{body.seed} {json.dumps(question)}")
    readers = [_reader(chat, body, params, reply) for reply in choices.replies]
    with_logprobs, model = params.logprobs is not None, params.adapter or chat.status.model
    if isinstance(body, ResponsesRequest):
        return Items(model, body.settings(params), readers[0], ids, with_logprobs)
    speech = Speech(readers, ids, isinstance(body, ChatRequest) and body.has_functions)
    return Chunks(model, isinstance(body, ChatRequest), speech, with_logprobs, body.usage_in, sources)


def _reader(chat: ChatBackend, body: BaseRequest, params: SamplingParams, reply: Reply) -> Reader:
    if (offer := body.offer) is None or not offer.may_call:
        return TextReader()

    def may_be_cut() -> bool:
        return bool(params.stop) or not (body.requested_tokens is None or reply.json_ends)

    return CallReader(chat.call_style, [tool.name for tool in offer.callable], may_be_cut, offer.must_call)


def _prompt_text(chat: ChatBackend, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else chat.decode(prompt)


def _prompt_ids(chat: ChatBackend, prompt: str | list[int], suffix: str | None) -> list[int]:
    if suffix and isinstance(prompt, str):
        return chat.encode_infilling(prompt, suffix)
    return chat.encode_text(prompt) if isinstance(prompt, str) else prompt


def _encode(chat: ChatBackend, body: TokenizeRequest) -> list[int]:
    """The ids of whichever of the two was sent."""
    match body.prompt, body.messages:
        case str(prompt), None:
            return chat.encode_text(prompt)
        case None, list():
            return chat.encode(body.conversation(), body.offer)
    raise ApiError(400, "invalid_value", "Send either a prompt or messages.", "prompt")
