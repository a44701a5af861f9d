"""What Gradio may do here: only the routes that the page and gradio_client need, and no file of a visitor's.

Gradio can fetch addresses, take uploads, serve files and build components, all of it from the JSON of a request. This
page needs none of that. `Listeners` knows who still reads what they asked Gradio for.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import re
import secrets
from collections import Counter
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App
from gradio.state_holder import SessionState
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from llama2_chat.server.errors import ApiError, error_response
from llama2_chat.server.limits import counted

log = logging.getLogger("llama2_chat")

TAKES_NO_FILES = "This chat takes text only: no files, links to files or components."
FOR_PROGRAMS = (
    "This is not what the page sends. Programs ask POST /v1/chat/completions, or /gradio_api/call/chat with as many "
    "values as GET /gradio_api/info names."
)
# Of Gradio's queue at once; its own limit is 40. Who is answered and who waits is the engine's to say.
MOST_JOBS = 1_000

READ = r"/|/(config|login_check|user|token|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon)/?"
READ += r"|/(static|assets|svelte|pwa_icon)/.+"
READ += r"|/gradio_api/(info|app_id|user|login_check|startup-events|theme\.css|queue/data)/?"
READ += r"|/gradio_api/(heartbeat/[^/]+|call/[^/]+/[^/]+)"
ASK = r"/login/?|/gradio_api/(queue/join|cancel|reset/?|(run|call)/[^/]+/?)"
ROUTES = {"GET": re.compile(READ), "HEAD": re.compile("/"), "POST": re.compile(ASK)}


class TextBlocks(gr.Blocks):
    """Blocks whose functions take text and numbers, whichever route they are called through."""

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
            # Gradio would remember what each box held last, in each of 10,000 sessions: a refused megabyte for good.
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

    def __init__(self, app: App, listeners: Listeners) -> None:
        self.app, self.listeners = app, listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        allowed = ROUTES.get(scope.get("method", ""))
        if not (allowed and allowed.fullmatch(path)):
            sentence = f"There is no {scope.get('method', 'WebSocket')} {path:.60} here."
            return await error_response(ApiError(404, "not_found", sentence))(scope, receive, send)
        with contextlib.ExitStack() as stack:
            if session := self._session_read(scope, path):
                stack.enter_context(self.listeners.listening(session))
            return await _with_a_sentence(self.app, scope, receive, send)

    def _session_read(self, scope: Scope, path: str) -> str | None:
        """The session whose messages this request reads, if it reads any."""
        if path.startswith("/gradio_api/queue/data"):
            return QueryParams(scope["query_string"]).get("session_hash")
        if scope["method"] == "GET" and path.startswith("/gradio_api/call/"):
            event_id = path.rpartition("/")[2]
            event = self.app.get_blocks()._queue.event_ids_to_events.get(event_id)
            return event.session_hash if event else event_id
        return None


async def _with_a_sentence(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Gradio's answer; where it fails at what somebody wrote by hand, a sentence instead of its 500."""
    failed = False

    async def send_if_right(message: Message) -> None:
        nonlocal failed
        failed |= message.get("status", 200) >= 500
        if not failed:
            await send(message)

    try:
        await app(scope, receive, send_if_right if scope.get("method") == "POST" else send)
    except Exception:
        if not failed:
            raise
        log.warning("Gradio failed at a request", exc_info=True)
    if failed:
        await error_response(ApiError(400, "invalid_request", FOR_PROGRAMS))(scope, receive, send)


def add_log_out(app: FastAPI, gradio: App) -> None:
    """POST /log-out in place of Gradio's GET /logout, which any image in an answer could ask for.

    It takes the token that GET /log-out gives to whoever is logged in: no page of another site can read that one.
    """
    cookies = [f"access-token-{kind}{gradio.cookie_id}" for kind in ("", "unsecure-")]
    secret = secrets.token_bytes(32)

    def token(request: Request) -> str:
        session = next((value for name in cookies if (value := request.cookies.get(name, "")) in gradio.tokens), "")
        return hmac.new(secret, session.encode(), hashlib.sha256).hexdigest() if session else ""

    async def log_out(request: Request) -> Response:
        expected = token(request)
        if request.method != "POST":
            return PlainTextResponse(expected, 200 if expected else 401)
        if not expected or not hmac.compare_digest(request.headers.get("x-token", "").encode(), expected.encode()):
            return error_response(ApiError(403, "wrong_token", "Please log out with the button on the page."))
        response = Response(status_code=204)
        for name in cookies:
            gradio.tokens.pop(request.cookies.get(name, ""), None)  # of this device only
            response.delete_cookie(name)
        return response

    # Before the page, which is mounted at / and would take it.
    app.router.routes.insert(0, Route("/log-out", log_out, methods=["GET", "POST"]))
