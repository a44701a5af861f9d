"""Whose each session and event of Gradio is: whoever asked under an id may read, go on and cancel, and nobody else.

Gradio takes any id of a session that a program names, and remembers the conversation under it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection

from fastapi import Request
from starlette.types import Message, Scope, Send

from llama2_chat.page.visitors import Visitors
from llama2_chat.server.errors import ApiError

REMEMBERED = 10_000  # ids, ten times as many as Gradio keeps
NOT_FOUND = ApiError(404, "not_found", "There is no such answer here, or no longer.")
_EVENT_ID = re.compile('"event_id":"([0-9a-f]{32})"')


class Sessions:
    """Used from the event loop alone."""

    def __init__(self, visitors: Visitors) -> None:
        self._visitors = visitors
        self._owners: OrderedDict[str, str] = OrderedDict()

    def who(self, scope: Scope) -> str:
        """Who sends a request. Raises ApiError without a login where one is needed."""
        return self._visitors.program(Request(scope))

    def asks(self, owner: str, ids: Collection[str], *, claim: bool) -> None:
        """A request names these ids; claim: from now on they are the owner's. Raises ApiError for somebody else's."""
        if any(self._owners.get(id, owner) != owner for id in ids):
            raise NOT_FOUND
        if claim:
            self._claim(ids, owner)

    def reads(self, scope: Scope, ids: Collection[str]) -> None:
        """Raises ApiError where a request names an id under which nobody has asked, or somebody else, who is not told
        from nobody."""
        if ids and any(self._owners.get(id) != self.who(scope) for id in ids):
            raise NOT_FOUND

    def claiming(self, send: Send, owner: str) -> Send:
        """Sends Gradio's answer to a question, whose id is the owner's."""

        async def send_claimed(message: Message) -> None:
            self._claim(_EVENT_ID.findall(message.get("body", b"")[:1_000].decode("latin-1")), owner)
            await send(message)

        return send_claimed

    def _claim(self, ids: Collection[str], owner: str) -> None:
        for id in ids:
            self._owners[id] = owner
            self._owners.move_to_end(id)
        while len(self._owners) > REMEMBERED:
            self._owners.popitem(last=False)
