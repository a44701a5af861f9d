"""Which servers can answer, and with which model.

A server may list its models and call itself healthy while its GPU is gone: a probe is a real completion of one token.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from llama2_chat.errors import Busy, ChatError
from llama2_chat.remote.client import Timeouts
from llama2_chat.remote.faults import (
    CONNECTION_FAULTS,
    NO_LIST,
    STARTING,
    WRONG_KEY,
    RequestRejected,
    ServerFault,
    translate,
)
from llama2_chat.remote.question import EXTRAS, Question
from llama2_chat.remote.reply import RemoteReply, count
from llama2_chat.remote.server import Server
from llama2_chat.types import Message, SamplingParams, Status

log = logging.getLogger("llama2_chat")

GREETING: list[Message] = [{"role": "user", "content": "Hello"}]
OWN_TEMPLATE = "The prompt is written with the server's own chat template."


class Health:
    """Probes the servers, and puts into `status` what that says of the model."""

    def __init__(self, servers: Sequence[Server], model: str, sampling: SamplingParams, timeouts: Timeouts) -> None:
        self.status = Status(phase="connect", model=model)
        self.context_length = 0  # tokens, as a server reports it; 0 if none does
        self.known = threading.Event()  # whether any server can answer
        self._servers = servers
        self._greeting = Question.of(GREETING, replace(sampling, max_new_tokens=1))
        self._timeouts = timeouts

    async def watch(self) -> None:
        """Probe each server now and then, until cancelled."""
        await asyncio.gather(*map(self._watch, self._servers))

    async def probe_all(self) -> None:
        await asyncio.gather(*map(self._probe, self._servers))

    async def _watch(self, server: Server) -> None:
        timeouts = self._timeouts
        while True:
            await self._probe(server)
            server.suspect.clear()
            pause_s = timeouts.idle_s if server.healthy else timeouts.unhealthy_s
            while pause_s > 0 and not server.suspect.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):  # wait_for of Python 3.11 can swallow a cancellation
                        await server.suspect.wait()
                # An answer that arrived meanwhile is as good as a probe.
                pause_s = server.last_seen + timeouts.idle_s - time.monotonic() if server.healthy else 0

    async def _probe(self, server: Server) -> None:
        """Ask for one token, after whatever is still unknown."""
        before, for_the_log = server.fault, ""
        try:
            async with asyncio.timeout(self._timeouts.silence_s):
                await self._discover_model(server)
                await self._complete(server)
                server.counts_tokens = await self._counts_tokens(server)
            server.fault = ""
        except Exception as error:
            fault = translate(error)
            server.fault, for_the_log = str(fault), fault.detail
        server.last_seen = time.monotonic()
        if server.fault != before:
            log.info("%s: %s", server.name, for_the_log or f"answers with {self.status.model}")
        self._update_status()

    async def _discover_model(self, server: Server) -> None:
        """Which model it has, unless INFERENCE_MODEL says so, and the length of its context. Raises ChatError."""
        if server.has_listed:
            return
        model_objects: list[dict[str, Any]] = []
        try:
            model_objects = await server.client.list_models()
        except ChatError as error:
            if isinstance(error, Busy) or str(error) in (*CONNECTION_FAULTS, WRONG_KEY, STARTING):
                raise
            if not self.status.model:  # with a name, it may answer without having listed it
                raise ServerFault(NO_LIST, error.detail) from error
        if not self.status.model:
            self.status = replace(self.status, model=_only_model(model_objects))
        server.has_listed = True
        for model_object in model_objects:
            if model_object["id"] == self.status.model:
                self.context_length = self.context_length or count(model_object.get("max_model_len"))

    async def _complete(self, server: Server) -> None:
        """Have it answer with one token. Raises ChatError."""
        try:
            await server.answer(self.status.model, self._greeting, RemoteReply())
        except RequestRejected as error:
            if not server.takes_extras or not any(name in str(error) for name in EXTRAS):
                raise
            server.takes_extras = False
            await server.answer(self.status.model, self._greeting, RemoteReply())

    async def _counts_tokens(self, server: Server) -> bool:
        try:
            return min(await server.count(self.status.model, self._greeting)) > 0
        except ChatError:
            return False

    def _update_status(self) -> None:
        healthy = [server for server in self._servers if server.healthy]
        faults = [server.fault for server in self._servers if server.fault]
        if healthy:
            device = "a server" if len(healthy) == 1 else f"{len(healthy)} servers"  # visitors are not told their names
            self.status = replace(self.status, state="ready", device=device, why=self._notes(healthy), error="")
        elif STARTING in faults:  # it waits for a model of its own, and questions wait for it
            self.status = replace(self.status, state="loading", error="")
        elif len(faults) == len(self._servers):
            self.status = replace(self.status, state="failed", error=faults[0])
        if all(server.fault is not None for server in self._servers) or healthy:
            self.known.set()

    def _notes(self, healthy: list[Server]) -> str:
        notes = [OWN_TEMPLATE]
        if len(healthy) < len(self._servers):
            notes.append(f"{len(self._servers) - len(healthy)} of {len(self._servers)} servers cannot answer now.")
        if not all(server.takes_extras for server in healthy):
            notes.append("Top-k and repetition penalty have no effect there.")
        return " ".join(notes)


def _only_model(model_objects: list[dict[str, Any]]) -> str:
    if len(model_objects) == 1:
        return str(model_objects[0]["id"])
    names = ", ".join(model_object["id"] for model_object in model_objects[:5])
    raise ServerFault(f"Set INFERENCE_MODEL to the model to use. The server has {names or 'none'}.")
