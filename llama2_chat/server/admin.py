"""GET /admin/ for the operator: who is answered, who waits, how fast, how full, and the errors of the last hour.

Every number is one of /metrics, and no word of a visitor is on it. It only shows: whatever another site makes a browser
ask for here changes nothing. The key is ADMIN_KEY, by a browser's own dialog or as Authorization: Bearer.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterator, Sequence
from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from llama2_chat.server.errors import ApiError, as_api_error, error_response
from llama2_chat.server.guesses import Guesses
from llama2_chat.server.limits import client_address, given_key
from llama2_chat.server.metrics import Metrics, Numbers
from llama2_chat.server.responses import unless_left
from llama2_chat.settings import Settings
from llama2_chat.types import ChatBackend

REFRESH_S = 10
LONGEST_KEY = 1_000  # characters
LOGIN = {"WWW-Authenticate": 'Basic realm="admin", charset="UTF-8"', "Cache-Control": "no-store"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 400; text-align: start; }
td { padding-inline-start: 1rem; text-align: end; font-variant-numeric: tabular-nums; }
p { margin: 0; opacity: .75; overflow-wrap: anywhere; }
table + p, p + p { margin-top: 2rem; }
"""
Row = tuple[str, str]


def admin_router(chat: ChatBackend, settings: Settings, metrics: Metrics) -> APIRouter:
    """For a server that has an ADMIN_KEY."""
    router, key = APIRouter(), settings.admin_key.encode()

    async def is_key(_: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), key)

    guesses = Guesses(is_key)  # a wrong one makes the next wait

    @router.get("/admin")
    async def lead() -> Response:
        """Into a folder of its own: browsers send the key along to all that lies beside the page."""
        return RedirectResponse("admin/", headers={"Cache-Control": "no-store"})

    @router.get("/admin/")
    async def admin(request: Request) -> Response:
        try:
            given = _given(request)
            # A browser that asks for the first time has none, which is no guess.
            if not given or not await unless_left(request, guesses.fits(client_address(request), "admin", given)):
                raise ApiError(401, "not_admin", "This page needs the server's ADMIN_KEY as a password.", headers=LOGIN)
            return HTMLResponse(page(chat, metrics), headers={"Cache-Control": "no-store"})
        except Exception as error:
            return error_response(as_api_error(error))

    return router


def _given(request: Request) -> str:
    """The password, with whatever name, or the token; "" where there is none."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return given_key(request).encode("latin-1").decode("utf-8", "replace")[:LONGEST_KEY]  # Starlette reads latin-1
    try:
        return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2][:LONGEST_KEY]
    except binascii.Error:
        return ""


def page(chat: ChatBackend, metrics: Metrics) -> str:
    """The document, as things are now."""
    status, now, hour = chat.status, metrics.now(), metrics.gained(60)
    how = " on ".join(filter(None, [status.precision, status.device]))
    tables = (
        ("Now", [*_running(now), *_servers(now), *_memory(now)]),
        ("Last hour", [*_counts(hour), *_together(metrics.gained(5), 5)]),
        ("Errors of the last hour", [*_errors(hour)]),
        ("Since the start", [*_counts(now)]),
    )
    return "".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">',
            '<meta name="viewport" content="width=device-width"><title>Server</title>',
            f"<style>{STYLE}</style><h1>{escape(status.model or 'No model yet')}</h1>",
            f"<p>{escape(' · '.join(filter(None, [status.state, how, chat.mode, status.error])))}</p>",
            *(_table(title, rows) for title, rows in tables),
            f"<p>Anew every {REFRESH_S} seconds. Each answer counts once it has ended.</p>",
        ]
    )


def _table(title: str, rows: Sequence[Row]) -> str:
    lines = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows]
    return f"<h2>{escape(title)}</h2>" + (f"<table>{''.join(lines)}</table>" if lines else "<p>None.</p>")


def _running(now: Numbers) -> Iterator[Row]:
    """Nothing where the model does not say who waits."""
    if capacity := now.total("chat_kv_cache_capacity_tokens"):
        used = now.total("chat_kv_cache_used_tokens")
        yield "Being answered", _count(now.total("chat_requests_running"))
        yield "Waiting", _count(now.total("chat_requests_waiting"))
        yield "KV cache in use", f"{used:,.0f} of {capacity:,.0f} tokens, {used / capacity:.0%}"
        yield "Put back into the queue since the start", _count(now.total("chat_preemptions_total"))


def _servers(now: Numbers) -> Iterator[Row]:
    healthy = now.by("server", "chat_server_healthy")
    for server, running in now.by("server", "chat_server_requests_running").items():
        yield f"Server {server}", f"{_count(running)} being answered" if healthy[server] else "cannot answer"


def _memory(now: Numbers) -> Iterator[Row]:
    capacity = now.by("gpu", "chat_gpu_memory_capacity_bytes")
    for gpu, used in now.by("gpu", "chat_gpu_memory_used_bytes").items():
        yield f"Memory of GPU {gpu} in use", f"{used / 1e9:.1f} of {capacity[gpu] / 1e9:.1f} GB"


def _counts(numbers: Numbers) -> Iterator[Row]:
    for label, name in (
        ("Requests", "requests"),
        ("Errors", "errors"),
        ("Tokens of prompts", "prompt_tokens"),
        ("Tokens of prompts from the KV cache", "cached_tokens"),
        ("Tokens of answers", "completion_tokens"),
    ):
        yield label, _count(numbers.total(f"chat_{name}_total"))
    for label, name, unit in (
        ("Time to the first token, mean", "chat_time_to_first_token_seconds", "s"),
        ("Speed of an answer, mean", "chat_tokens_per_second", "tokens/s"),
    ):
        if count := numbers.total(f"{name}_count"):
            yield label, f"{numbers.total(f'{name}_sum') / count:,.2f} {unit}"


def _together(newest: Numbers, minutes: int) -> Iterator[Row]:
    speed = newest.total("chat_completion_tokens_total") / (60 * minutes)
    yield f"All answers together, last {minutes} minutes", f"{speed:,.1f} tokens/s"


def _errors(numbers: Numbers) -> Iterator[Row]:
    counts = numbers.by("code", "chat_errors_total")
    yield from ((code, _count(count)) for code, count in sorted(counts.items(), key=lambda each: -each[1]) if count)


def _count(number: float) -> str:
    return f"{number:,.0f}"
