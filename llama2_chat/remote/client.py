"""HTTP to one server, through huggingface_hub's client, with an httpx2 client of our own beneath it."""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
from huggingface_hub import (
    AsyncInferenceClient,
    ChatCompletionStreamOutput,
    get_async_session,
    set_async_client_factory,
)

from llama2_chat.remote.faults import NO_API, ServerFault, from_status, translate

MAX_LINE_BYTES = 2**20  # of an event, and of an error's text


@dataclass(frozen=True)
class Timeouts:
    """How long servers are waited for and left alone."""

    connect_s: float = 5.0
    silence_s: float = 120.0  # a question may wait in the server's own queue for this long before its first byte
    idle_s: float = 30.0  # a server that has sent nothing for this long is probed
    unhealthy_s: float = 5.0  # a server that failed is probed this often
    usage_s: float = 5.0  # after its finish_reason an answer may still be followed by its usage


@dataclass(frozen=True)
class Client:
    """What is sent to one server, and what comes back; everything that goes wrong is raised as a ChatError."""

    url: str  # up to /v1
    key: str = field(repr=False)
    timeouts: Timeouts

    @asynccontextmanager
    async def stream_chat(
        self, model: str, messages: list[dict[str, Any]], fields: dict[str, Any], extras: dict[str, Any]
    ) -> AsyncIterator[AsyncIterator[ChatCompletionStreamOutput]]:
        """The chunks of an answer. Leaving closes the connection, by which the server knows that nobody reads.

        fields: as OpenAI's API has them; extras: those that it does not have.
        """
        # huggingface_hub adds the HF_TOKEN of this machine unless there is an authorization, even one of None.
        headers: Any = {"authorization": None, **self._authorization}
        # A client for each answer: it keeps every stream that it has opened until it is closed itself.
        client = AsyncInferenceClient(base_url=self.url, headers=headers, timeout=self._timeout)
        sent: list[Any] = list(messages)
        options: Any = {"include_usage": True}
        try:
            async with client:
                chunks: Any = await client.chat_completion(
                    sent, model=model, stream=True, stream_options=options, extra_body=extras, **fields
                )
                async with aclosing(chunks):
                    yield chunks
        except Exception as error:
            raise translate(error) from error

    async def list_models(self) -> list[dict[str, Any]]:
        """The model objects of /v1/models; each has an id."""
        try:
            async with get_async_session() as client:
                answer = await client.get(f"{self.url}/models", headers=self._authorization, timeout=self._timeout)
                return [model_object for model_object in answer.json()["data"] if isinstance(model_object["id"], str)]
        except Exception as error:
            raise translate(error) from error

    async def count(self, model: str, messages: list[dict[str, Any]], fields: dict[str, Any]) -> tuple[int, int]:
        """The tokens of a prompt, and those of the server's context window, as vLLM's /tokenize has them."""
        timeout = httpx2.Timeout(self.timeouts.connect_s)
        asked = {"model": model, "messages": messages, **fields}
        try:
            async with get_async_session() as client:
                url = f"{self.url.removesuffix('/v1')}/tokenize"
                answer = await client.post(url, json=asked, headers=self._authorization, timeout=timeout)
                counted = answer.json()
                return int(counted["count"]), int(counted["max_model_len"])
        except Exception as error:
            raise translate(error) from error

    async def embed(self, model: str, texts: list[str]) -> tuple[list[list[float]], int]:
        """The vectors of texts, in their order, and how many tokens the server says they have."""
        asked = {"model": model, "input": texts, "encoding_format": "float"}
        try:
            async with get_async_session() as client:
                url = f"{self.url}/embeddings"
                answer = await client.post(url, json=asked, headers=self._authorization, timeout=self._timeout)
                said = answer.json()
                found = sorted(said["data"], key=lambda each: each["index"])
                if [each["index"] for each in found] != list(range(len(texts))):
                    raise ServerFault(NO_API, f"It sent {len(found)} vectors for {len(texts)} texts.")
                return [each["embedding"] for each in found], int((said.get("usage") or {}).get("prompt_tokens") or 0)
        except Exception as error:
            raise translate(error) from error

    @property
    def _authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def _timeout(self) -> Any:  # huggingface_hub hands it to httpx2, though it declares a float
        return httpx2.Timeout(self.timeouts.silence_s, connect=self.timeouts.connect_s)


def use_our_http() -> None:
    """Have huggingface_hub ask with _HttpClient: its own obeys HF_HUB_OFFLINE and follows redirects."""
    set_async_client_factory(_http_client)


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema as OpenAI's `response_format` has it."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _http_client() -> httpx2.AsyncClient:
    return _HttpClient(event_hooks={"response": [_check]}, verify=_ssl_context())


class _HttpClient(httpx2.AsyncClient):
    def build_request(self, *args: Any, json: Any = None, **more: Any) -> httpx2.Request:
        # huggingface_hub rewrites a schema into the shape that TGI alone reads.
        if json and (schema := json.get("response_format", {}).get("value")) is not None:
            json = {**json, "response_format": schema_format(schema)}
        return super().build_request(*args, json=json, **more)


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx2.create_ssl_context()  # 20 ms


async def _check(response: httpx2.Response) -> None:
    """Let only a stream of events go on to huggingface_hub, and only a 200 to anybody else."""
    if response.status_code != 200:
        body = b""
        async for data in response.aiter_bytes():
            body += data
            if len(body) > MAX_LINE_BYTES:
                break
        raise from_status(response.status_code, body)
    if response.request.url.path.endswith("/chat/completions"):
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise ServerFault(NO_API, f"It sent {kind or 'something without a type'}.")
        response.aiter_lines = functools.partial(_lines, response)  # type: ignore[method-assign]  # one response's own


async def _lines(response: httpx2.Response) -> AsyncIterator[str]:
    """Lines as server-sent events have them. httpx2 also splits at U+2028, which JSON may hold as it is."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
        if len(rest) > MAX_LINE_BYTES:
            raise ServerFault(NO_API, "It sent a line without an end.")
    if rest:
        yield rest.decode("utf-8", "replace")
