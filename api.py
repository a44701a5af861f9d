"""The HTTP side of the page: is the model ready, is the process alive, and which headers guard every answer.

Health only looks at `chat.status`; it never waits for the model. The page itself is mounted by app.py.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model import ChatModel

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


def health_router(chat: ChatModel) -> APIRouter:
    """GET /healthz: 200 once the model can answer, else 503 and why. GET /livez: 200 while the process lives."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        status = chat.status
        if status.state == "ready":
            ready = {"model": status.model, "precision": status.precision, "device": status.device, "mode": chat.mode}
            return JSONResponse({"status": "ready", **ready})
        if status.state == "failed":
            return JSONResponse({"status": "failed", "error": status.error}, 503)
        progress = {"phase": status.phase, "done_bytes": status.done_bytes, "total_bytes": status.total_bytes}
        return JSONResponse({"status": "loading", **progress}, 503)

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    return router


def guard(app: FastAPI, on_space: bool) -> None:
    """No other site may read from or act on this server, nor may an answer reach out from the page."""
    headers = {
        "Content-Security-Policy": f"{CONTENT_SECURITY_POLICY} {HUGGING_FACE if on_space else ''}".strip(),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    # Gradio allows every origin, with credentials, unless the app around it has a CORSMiddleware.
    app.add_middleware(CORSMiddleware, allow_origins=[])
    app.add_middleware(_SecurityHeaders, headers=headers)


class _SecurityHeaders:
    """Plain ASGI, because Starlette's BaseHTTPMiddleware gets in the way of streams that the reader cuts."""

    def __init__(self, app: ASGIApp, headers: dict[str, str]) -> None:
        self.app, self.headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, send_guarded if scope["type"] == "http" else send)
