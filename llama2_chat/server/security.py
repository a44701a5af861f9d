"""What stands around every answer: no other site may read from or act on this server, nor may an answer reach out.

Headers with a Content-Security-Policy, no foreign origins, and a limit to the size of requests.
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2_chat.settings import Settings

# An answer is shown as Markdown and may hold images, forms and links that a model made up or a visitor asked for:
# nothing in it may reach another host. Gradio itself needs inline code and, for its event handlers, eval.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-src 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'self'",
    )
)
# A Space is shown in a frame on huggingface.co. Elsewhere anybody's Space could frame this page to steer clicks on it.
HUGGING_FACE = "https://huggingface.co https://*.huggingface.co https://*.hf.space"


def add_security_middleware(app: FastAPI, settings: Settings) -> None:
    """Around all routes of the app, the page's included."""
    policy = f"{CONTENT_SECURITY_POLICY} {HUGGING_FACE}" if settings.on_space else CONTENT_SECURITY_POLICY
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    # Gradio allows every origin, with credentials, unless the app around it has a CORSMiddleware.
    app.add_middleware(CORSMiddleware, allow_origins=[])
    if settings.body_limit_mb is not None:
        app.add_middleware(_BodyLimit, max_bytes=int(settings.body_limit_mb * 1e6))
    app.add_middleware(_SecurityHeaders, headers=headers)


class _BodyLimit:
    """Stops reading a body that is too large. FastAPI's own max_body_size would answer programs in plain text."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413)
            return message

        await self.app(scope, receive_limited if scope["type"] == "http" else receive, send)


class _SecurityHeaders:
    """Plain ASGI, because Starlette's BaseHTTPMiddleware gets in the way of streams that the reader cuts."""

    def __init__(self, app: ASGIApp, headers: dict[str, str]) -> None:
        self.app, self.headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
