"""An encoder on a server that speaks OpenAI's API: vLLM, llama.cpp, Text Embeddings Inference, or this program.

Each call has an event loop of its own: it is made in a thread that has nothing else to do meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np

from llama2_chat.embeddings.prefixes import prefixes_of
from llama2_chat.errors import ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.remote.client import Timeouts, use_our_http
from llama2_chat.remote.faults import NO_API, NO_LIST, RequestRejected, ServerFault
from llama2_chat.remote.server import Server
from llama2_chat.types import Embedded, EmbeddingPurpose

log = logging.getLogger("llama2_chat")

SILENCE_S = 30.0
PAUSE_S = 20.0  # after a failure, before it is asked again: questions would wait for it
SHORTEST = 32  # letters of a text that is still cut where the server finds it too long
CONNECTING = "The encoder's server has not been reached yet. Please try again in a minute."
OTHER_LENGTH = "The model's server sends vectors of another length than before."


class RemoteEmbedder:
    """Keeps the promise of Embedder."""

    state: Literal["loading", "ready", "failed"] = "loading"
    error = ""
    identity = ""
    dimensions = 0

    def __init__(self, url: str, model: str = "", key: str = "", timeouts: Timeouts | None = None) -> None:
        """model: "" is the server's only one."""
        server = Server(url, key, timeouts or Timeouts(silence_s=SILENCE_S))
        self._client, self.name = server.client, model
        self._lock = threading.Lock()
        self._is_connecting = False
        self._failed_at = 0.0  # time.monotonic()

    def start(self) -> None:
        with self._lock:
            if self._is_connecting or self.state == "ready":
                return
            self._is_connecting = True
        threading.Thread(target=self._connect, name="embeddings", daemon=True).start()

    def close(self) -> None:
        """A call that is under way ends by itself."""

    def check(self) -> None:
        """Be ready if the server gives a vector. Raises ChatError."""
        use_our_http()
        self.dimensions = 0
        try:
            self.name = self.name or asyncio.run(self._only_model())
            self._ask(["Good morning!"], cut=False)
        except ChatError as error:
            raise self._fail(error) from error
        self.identity, self.state, self.error = f"{self.name} {self.dimensions}", "ready", ""

    def embed(self, texts: Sequence[str], purpose: EmbeddingPurpose) -> Embedded:
        if self.state != "ready":
            if time.monotonic() - self._failed_at > PAUSE_S:
                self.start()
            raise ModelUnavailable(self.error or CONNECTING)
        prefix = prefixes_of(self.name)[purpose]
        try:
            return self._ask([prefix + text for text in texts], cut=purpose != "request")
        except RequestRejected as error:  # of this request alone
            raise RequestRejected(_words(str(error))) from error
        except PromptTooLong:
            raise
        except ChatError as error:
            log.warning("Documents are found by their words alone: %s", _words(error.detail))
            raise self._fail(error) from error

    def _connect(self) -> None:
        try:
            self.check()
            log.info("%s answers: documents are found by their meaning, too", self.name)
        except ChatError as error:
            log.warning("Documents are found by their words alone: %s", error.detail)
        finally:
            self._is_connecting = False

    def _fail(self, error: ChatError) -> ModelUnavailable:
        failure = ModelUnavailable(_words(str(error)))
        failure.detail = _words(error.detail)
        self._failed_at, self.error, self.state = time.monotonic(), str(failure), "failed"
        return failure

    async def _only_model(self) -> str:
        models = await self._client.list_models()
        if len(models) != 1:
            raise ServerFault(NO_LIST if not models else "The model's server has several models. Set INFERENCE_MODEL.")
        return str(models[0]["id"])

    def _ask(self, texts: Sequence[str], cut: bool) -> Embedded:
        """cut: what the server refuses is sent by itself, and then its first half."""
        try:
            vectors, tokens = asyncio.run(self._client.embed(self.name, list(texts)))
            return Embedded(self._checked(vectors), tokens)
        except (RequestRejected, PromptTooLong):
            longest = max(map(len, texts))
            if not cut or longest < SHORTEST:
                raise
        parts = texts if len(texts) > 1 else [texts[0][: longest // 2]]
        found = [self._ask([part], cut) for part in parts]
        return Embedded(np.concatenate([each.vectors for each in found]), sum(each.tokens for each in found))

    def _checked(self, vectors: list[list[float]]) -> np.ndarray:
        try:
            found = np.array(vectors, np.float32)
        except (ValueError, TypeError) as error:
            raise ServerFault(NO_API, str(error)) from error
        if found.ndim != 2 or not found.shape[1] or not np.isfinite(found).all():
            raise ServerFault(NO_API, "It sent what are no vectors.")
        self.dimensions = self.dimensions or found.shape[1]
        if found.shape[1] != self.dimensions:
            raise ServerFault(OTHER_LENGTH, f"{found.shape[1]} instead of {self.dimensions}")
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _words(sentence: str) -> str:
    """The faults of servers are worded for the one that has the model."""
    words = {"The model's server": "The encoder's server", "INFERENCE_URL": "EMBEDDINGS", "INFERENCE_": "EMBEDDINGS_"}
    for old, new in words.items():
        sentence = sentence.replace(old, new)
    return sentence
