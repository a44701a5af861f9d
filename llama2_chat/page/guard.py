"""What Gradio may do here: only the routes that the page and gradio_client need, and no file of a visitor's.

Gradio can fetch addresses, take uploads, serve files and build components, all of it from the JSON of a request. This
page needs none of that. `Listeners` knows who still reads what they asked Gradio for. The page's document gets a
Content-Security-Policy that lets its own scripts run and no others.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import gradio as gr
from fastapi import Request
from gradio.routes import App
from gradio.state_holder import SessionState
from starlette.datastructures import MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from llama2_chat.page.assets import compressed
from llama2_chat.page.calls import FOR_PROGRAMS, checked_call
from llama2_chat.page.language import IN_DOCUMENT, language_of
from llama2_chat.page.sessions import NOT_FOUND, Sessions
from llama2_chat.server.errors import ApiError, as_api_error, error_response, no_such_route
from llama2_chat.server.limits import counted
from llama2_chat.server.security import content_security_policy
from llama2_chat.text import first_line

log = logging.getLogger("llama2_chat")

TAKES_NO_FILES = "This chat takes text only: no files, links to files or components."
# Of Gradio's queue at once; its own limit is 40. Who is answered and who waits is the engine's to say.
MOST_JOBS = 1_000
MOST_PROGRAMS = 1_000  # whose conversations are remembered, with what Gradio keeps of its components for each

READ = r"/|/(config|login_check|user|token|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon)/?"
READ += r"|/(static|assets|svelte|pwa_icon)/.{1,200}"  # no longer than a file's name may be: Gradio would fail at it
READ += r"|/gradio_api/(info|app_id|user|login_check|startup-events|theme\.css|queue/data)/?"
READ += r"|/gradio_api/call/[^/]+/[^/]+"
ASK = r"/gradio_api/(queue/join|cancel|reset/?|(run|call)/[^/]+/?)"
FILES = "/static/", "/assets/", "/svelte/"
# Gradio writes all that a visitor could put into these as JSON with < escaped.
INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)
# Ours runs first and starts it (startGradio in static/main.js), so that nobody waits for Gradio to type a message.
GRADIOS_CODE, HELD_BACK = b'<script type="module"', b'<script type="text/plain" id="gradio"'
GRADIOS_LANGUAGE = b'lang="en"'
HEAD = b"<head>"
ROUTES = {"GET": re.compile(READ), "HEAD": re.compile("/"), "POST": re.compile(ASK)}


class TextBlocks(gr.Blocks):
    """Blocks whose functions take text and numbers, whichever route they are called through."""

    def get_config_file(self) -> Any:
        """Without the stream by which Gradio would notice that a tab has closed: a browser has six for all its tabs."""
        return {**super().get_config_file(), "connect_heartbeat": False}

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> list[Any]:
        if names_a_file(inputs):
            raise gr.Error(TAKES_NO_FILES, print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *args, **options)

    async def process_api(
        self, block_fn: Any, inputs: list[Any], state: SessionState | None = None, *args: Any, **options: Any
    ) -> dict[str, Any]:
        try:
            return await super().process_api(block_fn, inputs, state, *args, **options)
        finally:
            # Gradio would remember what each box held last, in each session: a refused megabyte for good.
            for config in state.config_values.values() if state else ():
                config.get("props", {}).pop("value", None)


def names_a_file(value: Any) -> bool:
    """Whether there is something in a JSON value that Gradio would open, fetch or build a component from."""
    unseen = [value]
    while unseen:
        value = unseen.pop()
        if isinstance(value, dict):
            if not value.keys().isdisjoint(("component", "file", "meta")):  # every FileData has a meta
                return True
            unseen += value.values()
        elif isinstance(value, (list, tuple)):
            unseen += value
    return False


class Listeners:
    """The sessions of Gradio whose messages somebody reads at this moment. Used from the event loop alone."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()

    def listening(self, session: str) -> contextlib.AbstractContextManager[None]:
        return counted(self._streams, session)

    def __contains__(self, session: object) -> bool:
        return session in self._streams


class OnlyOurRoutes:
    """Gradio's app with the routes in ROUTES, and a note of who listens. Any other path is answered with 404."""

    def __init__(
        self, app: App, sessions: Sessions, listeners: Listeners, head: Callable[[str], bytes], on_space: bool
    ) -> None:
        """head: for a language, HTML before all else in the document of the page, and of the login, where
        gr.Blocks has none."""
        self.app, self.sessions, self.listeners = app, sessions, listeners
        self.files = compressed(app)
        self.head, self.on_space = head, on_space

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        allowed = ROUTES.get(scope.get("method", ""))
        if not (allowed and allowed.fullmatch(path)):
            problem = no_such_route(scope.get("method", "WebSocket"), path)
            return await error_response(problem)(scope, receive, send)
        if path.startswith(FILES):
            return await self.files(scope, receive, send)
        if path == "/":
            language = language_of(HTTPConnection(scope))
            return await self.app(scope, receive, _Document(send, language, self.head(language), self.on_space))
        try:
            if scope["method"] == "POST":
                owner = self.sessions.who(scope)
                call = checked_call(path, await Request(scope, receive).body(), self.app.get_blocks())
                ids = [call[name] for name in ("session_hash", "event_id") if call.get(name)]
                self.sessions.asks(owner, ids, claim="data" in call)
                scope, receive = _with_body(scope, json.dumps(call).encode(), receive)
                return await _with_a_sentence(self.app, scope, receive, self.sessions.claiming(send, owner))
            self.sessions.reads(scope, _ids_read(scope, path))
            session = self._session_read(scope, path)
        except (ApiError, HTTPException) as error:
            return await error_response(as_api_error(error))(scope, receive, send)
        with self.listeners.listening(session) if session else contextlib.nullcontext():
            return await self.app(scope, receive, send)

    def _session_read(self, scope: Scope, path: str) -> str | None:
        """The session whose messages this request reads, if it reads any. Raises ApiError if they have been read:
        Gradio would fail in the middle of its answer."""
        ids, queue = _ids_read(scope, path), self.app.get_blocks()._queue
        if not path.startswith(("/gradio_api/call/", "/gradio_api/queue/data")) or not ids:
            return None
        event = queue.event_ids_to_events.get(ids[-1])
        pending = (session for session, events in queue.pending_event_ids_session.items() if ids[-1] in events)
        session = event.session_hash if event else next(pending, ids[-1])
        if session not in queue.pending_messages_per_session:
            raise NOT_FOUND
        return session


def _ids_read(scope: Scope, path: str) -> list[str]:
    """The ids of sessions and events that a GET names."""
    named = QueryParams(scope["query_string"]).getlist("session_hash")
    return [*named, path.rpartition("/")[2]] if path.startswith("/gradio_api/call/") else named


def _with_body(scope: Scope, body: bytes, receive: Receive) -> tuple[Scope, Receive]:
    """The request with another body, which is JSON."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    headers = MutableHeaders(raw=[*scope["headers"]])
    headers["content-type"], headers["content-length"] = "application/json", str(len(body))
    del headers["transfer-encoding"]

    async def receive_body() -> Message:
        return messages.pop() if messages else await receive()

    return {**scope, "headers": headers.raw}, receive_body


async def _with_a_sentence(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Gradio's answer; a sentence instead of its 500, should it fail at what has been checked."""
    failed = False

    async def send_if_right(message: Message) -> None:
        nonlocal failed
        failed |= message.get("status", 200) >= 500
        if not failed:
            await send(message)

    try:
        await app(scope, receive, send_if_right)
    except Exception as error:
        if not failed:
            raise
        log.warning("Gradio failed at a request: %s", first_line(error))
    if failed:
        await error_response(ApiError(400, "invalid_request", FOR_PROGRAMS))(scope, receive, send)


class _Document:
    """Sends the page's document with what our code needs in its head, and with a policy that names the scripts in it:
    no other inline script may run."""

    def __init__(self, send: Send, language: str, head: bytes, on_space: bool) -> None:
        self._send, self._language, self._head, self._on_space = send, language, head, on_space
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        match message["type"]:
            case "http.response.start":
                self._start = message
            case "http.response.body":
                self._body += message.get("body", b"")
                if not message.get("more_body"):
                    await self._send_document()
            case _:  # Starlette tells its test client of templates
                await self._send(message)

    async def _send_document(self) -> None:
        body = self._body.replace(GRADIOS_LANGUAGE, f'lang="{self._language}"'.encode(), 1)
        body = body.replace(GRADIOS_CODE, HELD_BACK, 1)
        body = body.replace(HEAD, HEAD + self._head, 1)
        no_script = f"<noscript><p>{IN_DOCUMENT[self._language]['noScript']}</p></noscript></body>"
        body = no_script.encode().join(body.rsplit(b"</body>", 1))
        scripts = [_hash(script) for script in INLINE_SCRIPT.findall(body)]
        headers = MutableHeaders(scope=self._start)
        headers["Content-Security-Policy"] = content_security_policy(self._on_space, scripts)
        headers["Content-Length"] = str(len(body))
        headers.add_vary_header("Accept-Language")
        headers.add_vary_header("Cookie")
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})


def _hash(script: bytes) -> str:
    """As a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"
