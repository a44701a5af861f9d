"""What stands around every answer: no other site may read from or act on this server, nor may an answer reach out.

Headers with a Content-Security-Policy, own names only, no foreign origins, strict cookies, and a limit to the size of
requests.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2_chat.process import trim_memory
from llama2_chat.server.errors import ApiError, error_response, no_such_route
from llama2_chat.server.files import is_upload
from llama2_chat.server.hosts import AllowedHosts, host_of, own_hosts
from llama2_chat.settings import Settings

LARGE_BODY = 2**20  # bytes
WHOLE_ADDRESS = re.compile(r"https?://[^/]*/?", re.IGNORECASE)  # up to its path
TRIM_AFTER_S = 5

# A Space is shown in a frame on huggingface.co. Elsewhere anybody's Space could frame this page to steer clicks on it.
HUGGING_FACE = "https://huggingface.co https://*.huggingface.co https://*.hf.space"


def content_security_policy(on_space: bool, scripts: Sequence[str] = ()) -> str:
    """An answer may hold images and links that a model made up: nothing in it may reach another host.

    scripts: the hashes of those that stand in the document itself.
    """
    directives = {
        "default-src": "'self'",
        "script-src": " ".join(["'self'", *scripts]),
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "data: blob:",
        "media-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "connect-src": "'self'",
        "worker-src": "'self' blob:",
        "frame-src": "'none'",
        "object-src": "'none'",
        "base-uri": "'self'",
        "form-action": "'none'",
        "frame-ancestors": f"'self' {HUGGING_FACE}" if on_space else "'self'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in directives.items())


def add_security_middleware(app: FastAPI, settings: Settings, certificate_hosts: Iterable[str] = ()) -> None:
    """Around all routes of the app, the page's included. certificate_hosts: names that its certificate is good for."""
    headers = {
        "Content-Security-Policy": content_security_policy(settings.on_space),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    given = (*settings.allowed_hosts.split(","), settings.space_host)
    # Gradio allows every origin, with credentials, unless the app around it has a CORSMiddleware.
    app.add_middleware(CORSMiddleware, allow_origins=[])
    if settings.body_limit_mb is not None:
        app.add_middleware(_BodyLimit, max_bytes=int(settings.body_limit_mb * 1e6))
    app.add_middleware(_MemoryBack)
    app.add_middleware(
        _OwnSite,
        hosts=AllowedHosts([*own_hosts(), settings.host, *certificate_hosts, *given]),
        origins=AllowedHosts(given),
    )
    app.add_middleware(_SecurityHeaders, headers=headers, in_frame=settings.on_space)


class _OwnSite:
    """Lets in who asks for this server by a name of its own, and no page of another site that would change things."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts, origins: AllowedHosts) -> None:
        """origins: whose pages may post even if a proxy has put another name in the Host header."""
        self.app, self.hosts, self.origins = app, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = _with_path(scope)
        problem = self._problem(scope) if scope["type"] == "http" else None
        await (error_response(problem) if problem else self.app)(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        netloc = headers.get("host", "")
        if (host := host_of(netloc)) not in self.hosts:
            sentence = f"This server does not answer for {host:.100}. If that is its name, set ALLOWED_HOSTS to it."
            if not host:
                sentence = (
                    "This server answers only where the header Host has a name or an address of it. If it has others, "
                    "set ALLOWED_HOSTS to them."
                )
            return ApiError(421, "misdirected_request", sentence)
        if not scope["path"].startswith("/"):  # "OPTIONS *", or CONNECT with an address
            return no_such_route(scope["method"], scope["path"])
        origin = headers.get("origin")
        if origin is None or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        sender = origin.partition("://")[2]
        if sender == netloc or (sender and host_of(sender) in self.origins):
            return None
        return ApiError(403, "foreign_origin", "A page of another site may not send anything here.")


def _with_path(scope: Scope) -> Scope:
    """The same, asked by its path if it was by a whole address, as programs ask what they take for a proxy."""
    if scope["type"] != "http" or not WHOLE_ADDRESS.match(scope["path"]):
        return scope
    raw = scope["raw_path"].decode("ascii")
    paths = [WHOLE_ADDRESS.sub("/", each) for each in (scope["path"], raw)]
    return {**scope, "path": paths[0], "raw_path": paths[1].encode()}


class _BodyLimit:
    """Stops reading a body that is too large. FastAPI's own max_body_size would answer programs in plain text.

    Uploads of documents have a limit of their own, in files.py.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_upload(scope["method"], path_of(scope)):
            return await self.app(scope, receive, send)
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413)
            return message

        return await self.app(scope, receive_limited if scope["type"] == "http" else receive, send)


def path_of(scope: Scope) -> str:
    """Without that of a proxy in front."""
    return scope["path"].removeprefix(scope.get("root_path", "")) or "/"


class _MemoryBack:
    """After a large body the process gives its memory back, soon and not at once: that takes some hundredths of a
    second, and whoever sends one often sends more."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._is_due = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            length = Headers(scope=scope).get("content-length", "0") if scope["type"] == "http" else "0"
            if length.isdecimal() and int(length) > LARGE_BODY and not self._is_due:
                self._is_due = True
                asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._is_due = False
        asyncio.get_running_loop().run_in_executor(None, trim_memory)


class _SecurityHeaders:
    """Plain ASGI, because Starlette's BaseHTTPMiddleware gets in the way of streams that the reader cuts."""

    def __init__(self, app: ASGIApp, headers: dict[str, str], in_frame: bool) -> None:
        """in_frame: whether another site shows the page in a frame, in which it would get no stricter cookie."""
        self.app, self.headers, self.in_frame = app, headers, in_frame

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers.setdefault(name, value)  # the page's document names its own scripts
                encrypted = scope["scheme"] == "https"
                message["headers"] = [
                    (name, value if name != b"set-cookie" else self._strict(value, encrypted))
                    for name, value in message["headers"]
                    if name != b"set-cookie" or not _for_the_other_scheme(value, encrypted)
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)

    def _strict(self, cookie: bytes, encrypted: bool) -> bytes:
        """A Set-Cookie header that no other site and no script can use."""
        value, *attributes = cookie.split(b";")
        kept = [
            each for each in attributes if not each.strip().lower().startswith((b"samesite", b"secure", b"httponly"))
        ]
        same_site = b" SameSite=None" if self.in_frame and encrypted else b" SameSite=Lax"
        return b";".join([value, *kept, b" HttpOnly", same_site, *([b" Secure"] if encrypted else [])])


def _for_the_other_scheme(cookie: bytes, encrypted: bool) -> bool:
    """Gradio sends each login twice: for HTTPS, and as a cookie that HTTP carries too."""
    return cookie.startswith(b"access-token-") and cookie.startswith(b"access-token-unsecure-") == encrypted
