"""Whose each session and event of Gradio is: whoever asked under an id may read, go on and cancel, and nobody else.

Gradio takes any id of a session that a program names, and remembers the conversation under it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from fastapi import Request
from starlette.datastructures import QueryParams
from starlette.types import Message, Receive, Scope, Send

from llama2_chat.page.visitors import Visitors
from llama2_chat.server.errors import ApiError

REMEMBERED = 10_000  # ids, ten times as many as Gradio keeps
READS, RESETS = ("/gradio_api/queue/data", "/gradio_api/call/"), ("/gradio_api/cancel", "/gradio_api/reset")
ASKS = ("/gradio_api/queue/join", "/gradio_api/call/", "/gradio_api/run/")


class Sessions:
    """Used from the event loop alone."""

    def __init__(self, visitors: Visitors) -> None:
        self._visitors = visitors
        self._owners: OrderedDict[str, str] = OrderedDict()

    async def guarded(self, scope: Scope, path: str, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """What Gradio shall receive and send in place of these. Raises ApiError for what is somebody else's."""
        if not path.startswith((*READS, *RESETS, *ASKS)):
            return receive, send
        body = b""
        if scope["method"] == "POST":
            body, receive = await _read(receive)
        owner, named = self._visitors.program(Request(scope)), [*_named(scope, path, body)]
        if any(self._owners.get(id, owner) != owner for id in named):
            raise ApiError(404, "not_found", "There is no such answer here, or no longer.")
        if scope["method"] == "GET" or not path.startswith(ASKS):
            return receive, send
        self._claim(named, owner)
        return receive, self._claiming(send, owner)

    def _claim(self, ids: Iterable[str], owner: str) -> None:
        for id in ids:
            self._owners[id] = owner
            self._owners.move_to_end(id)
        while len(self._owners) > REMEMBERED:
            self._owners.popitem(last=False)

    def _claiming(self, send: Send, owner: str) -> Send:
        async def send_claimed(message: Message) -> None:
            answer = _parsed(message.get("body", b"")[:1_000])
            self._claim(_texts(answer, "event_id"), owner)
            await send(message)

        return send_claimed


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """A whole body, and what gives it once more."""
    body, messages = b"", []
    while True:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if not message.get("more_body"):
            break

    async def receive_again() -> Message:
        return messages.pop(0) if messages else await receive()

    return body, receive_again


def _named(scope: Scope, path: str, body: bytes) -> Iterable[str]:
    """The ids of sessions and events in a request."""
    yield from QueryParams(scope["query_string"]).getlist("session_hash")
    if scope["method"] == "GET" and path.startswith("/gradio_api/call/"):
        yield path.rpartition("/")[2]
    if b"session_hash" in body or b"event_id" in body or b"\\u" in body:
        yield from _texts(_parsed(body), "session_hash", "event_id")


def _texts(value: Any, *names: str) -> Iterable[str]:
    found = [value.get(name) for name in names] if isinstance(value, dict) else []
    return [text for text in found if isinstance(text, str)]


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # Gradio refuses it, too
        return None
