"""GET /healthz and /livez, for whoever watches over the server. They need no key and never wait for the model."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from llama2_chat.types import ChatBackend


def health_router(chat: ChatBackend) -> APIRouter:
    """GET /healthz: 200 once the model can answer, else 503 and why. GET /livez: 200 while the process lives."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        status = chat.status
        if status.state == "ready":
            how = {"precision": status.precision, "kv_cache": status.kv_cache, "device": status.device}
            return JSONResponse({"status": "ready", "model": status.model, **how, "mode": chat.mode})
        if status.state == "failed":
            return JSONResponse({"status": "failed", "error": status.error}, 503)
        progress = {"phase": status.phase, "done_bytes": status.done_bytes, "total_bytes": status.total_bytes}
        return JSONResponse({"status": "loading", **progress}, 503)

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    return router
