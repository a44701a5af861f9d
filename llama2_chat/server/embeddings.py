"""POST /v1/embeddings: texts as vectors, in OpenAI's words, by the encoder that finds documents by their meaning.

A request is computed a few texts at a time: others get their turn in between, and a reader who has left is noticed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import anyio
import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llama2_chat.errors import ChatError
from llama2_chat.server.errors import RETRY_AFTER_S, ApiError, as_api_error
from llama2_chat.server.limits import ConcurrencyLimiter, client_id
from llama2_chat.server.neutral_fields import asks_for_nothing, why_refused
from llama2_chat.server.openai_types import ModelName
from llama2_chat.server.responses import unless_left
from llama2_chat.settings import Settings
from llama2_chat.types import Embedder

MOST_TEXTS = 2048  # of one request, as OpenAI has it
BATCH = 8  # texts
THREADS = 8  # that may wait for vectors
DECIMALS = 8  # float32 has no more, of numbers up to 1
NO_ENCODER = "This server has no encoder: its operator can name one with EMBEDDINGS."
IDS = (
    "it must be text: the token ids of another tokenizer mean nothing here. LangChain sends text with "
    "check_embedding_ctx_length=False"
)


def _texts(input: Any) -> list[str]:
    """A list, also of one text by itself."""
    texts = input if isinstance(input, list) else [input]
    if any(isinstance(each, (int, list)) and not isinstance(each, bool) for each in texts):
        raise ValueError(IDS)
    if not texts or not all(isinstance(each, str) and each for each in texts):
        raise ValueError("it must be a text or a list of texts, and nothing empty")
    if len(texts) > MOST_TEXTS:
        raise ValueError(f"it may have {MOST_TEXTS:,} texts, and has {len(texts):,}. Send it in parts")
    return texts


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    input: Annotated[list[str], BeforeValidator(_texts)]
    model: ModelName = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None

    def reject_unsupported(self) -> None:
        """Raise ApiError for a field that asks for something else than what is given here."""
        for name, value in (self.model_extra or {}).items():
            if not asks_for_nothing(name, value):
                raise ApiError(400, "unsupported_parameter", why_refused(name), name[:60])


def add_embedding_route(
    router: APIRouter, embedder: Embedder | None, settings: Settings, limiter: ConcurrencyLimiter
) -> None:
    """embedder: None where there is none, which the route says."""
    threads = anyio.CapacityLimiter(THREADS)  # of its own: they wait long, and others would wait for one behind them

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        if embedder is None:
            raise ApiError(404, "no_encoder", NO_ENCODER)
        body.reject_unsupported()
        _check(embedder, body)
        with limiter.slot(client_id(request, settings)):
            try:
                return await unless_left(request, _answer(embedder, body, threads))
            except ChatError as error:
                raise as_api_error(error, "input") from error


def _check(embedder: Embedder, body: EmbeddingsRequest) -> None:
    if embedder.state == "loading":
        sentence = "The encoder is still loading. Please try again in a minute."
        raise ApiError(503, "model_loading", sentence, headers={"Retry-After": str(RETRY_AFTER_S)})
    if body.model is not None and embedder.name and body.model != embedder.name:
        sentence = f"There is no encoder {body.model!r:.100} here; this server has {embedder.name}."
        raise ApiError(404, "model_not_found", sentence, "model")
    if embedder.dimensions and body.dimensions not in (None, embedder.dimensions):
        sentence = f"This encoder gives {embedder.dimensions:,} dimensions, and fewer would mean less. Leave it out."
        raise ApiError(400, "invalid_value", sentence, "dimensions")


async def _answer(embedder: Embedder, body: EmbeddingsRequest, threads: anyio.CapacityLimiter) -> Response:
    vectors: list[str] = []  # as JSON, which takes a while to write
    tokens = 0

    def some(first: int) -> tuple[list[str], int]:
        embedded = embedder.embed(body.input[first : first + BATCH], "request")
        return list(_written(embedded.vectors, body.encoding_format or "float")), embedded.tokens

    for first in range(0, len(body.input), BATCH):
        written, more = await anyio.to_thread.run_sync(some, first, limiter=threads)
        vectors += written
        tokens += more
    return Response(_whole(vectors, embedder.name, tokens), media_type="application/json")


def _written(vectors: np.ndarray, encoding_format: Literal["float", "base64"]) -> Iterator[str]:
    """base64: of float32, the lowest byte first, as the openai library reads it."""
    for vector in vectors:
        if encoding_format == "base64":
            yield json.dumps(base64.b64encode(vector.astype("<f4").tobytes()).decode())
        else:
            yield json.dumps(vector.astype(float).round(DECIMALS).tolist())


def _whole(vectors: Sequence[str], model: str, tokens: int) -> bytes:
    data = ", ".join(
        f'{{"object": "embedding", "index": {index}, "embedding": {vector}}}' for index, vector in enumerate(vectors)
    )
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    rest = f'"model": {json.dumps(model)}, "usage": {json.dumps(usage)}'
    return f'{{"object": "list", "data": [{data}], {rest}}}'.encode()
