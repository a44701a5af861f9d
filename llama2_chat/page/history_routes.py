"""A login's conversations over HTTP: what is new since a revision, and what a browser wants to be kept.

The browser's side is static/syncing.js.
"""

from __future__ import annotations

import functools
import json
from typing import Annotated, Any
from urllib.parse import unquote

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from llama2_chat.page.history import PAGE_BYTES, Change, Histories, History, Kind, Record
from llama2_chat.page.visitors import Visitors
from llama2_chat.server.errors import ApiError
from llama2_chat.server.limits import Turns

MOST_CHANGES = 1_000  # in one request
MAX_RECORD_BYTES = 4_000_000
MOST_WAITING = 64  # writes of one login, which go one after another
THREADS = 8  # for all logins
LIMITS = {"records": MOST_CHANGES, "bytes": PAGE_BYTES}  # of one request, as the page is told
TOO_LARGE = f"This message has more than {MAX_RECORD_BYTES / 1e6:g} MB, so it stays in this browser."
OTHER_LOGIN = "Somebody else has logged in in this browser. Reload the page."

Id = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Revision = Annotated[int, Field(ge=0, lt=2**62)]


class ChangedRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Id
    kind: Kind
    conversation: Id
    base: Revision
    record: dict[str, Any] | None

    def change(self) -> Change:
        """Raises ApiError for one that is too large."""
        # In one order of fields, whichever browser wrote it.
        body = None if self.record is None else json.dumps(self.record, ensure_ascii=False, sort_keys=True)
        if body is not None and len(body.encode()) > MAX_RECORD_BYTES:
            raise ApiError(413, "record_too_large", TOO_LARGE, self.id)
        return Change(self.id, self.kind, self.conversation, self.base, body)


class Changes(BaseModel):
    model_config = ConfigDict(extra="forbid")

    epoch: Annotated[str, Field(max_length=32)]
    records: Annotated[list[ChangedRecord], Field(max_length=MOST_CHANGES)]


def add_history_routes(router: APIRouter, histories: Histories, visitors: Visitors) -> None:
    """GET and PUT /history."""
    turns, threads = Turns(MOST_WAITING), anyio.CapacityLimiter(THREADS)

    @router.get("/history")
    async def after(
        request: Request,
        epoch: Annotated[str, Query(max_length=32)] = "",
        revision: Annotated[int, Query(ge=0, lt=2**62)] = 0,
    ) -> Response:
        read = functools.partial(_of(request).after, epoch, revision)
        page = await anyio.to_thread.run_sync(read, limiter=threads)
        answer = {"epoch": page.epoch, "after": page.after, "revision": page.revision, "isLast": page.is_last}
        records = list(map(_told, page.records))
        return JSONResponse({**answer, "records": records}, headers={"Cache-Control": "no-store"})

    @router.put("/history")
    async def put(changes: Changes, request: Request) -> dict[str, Any]:
        history = _of(request)
        records = [record.change() for record in changes.records]
        async with turns.turn(visitors.owner(request)):
            write = functools.partial(history.put, records, changes.epoch)
            saved = await anyio.to_thread.run_sync(write, limiter=threads)
        return {"epoch": saved.epoch, "kept": saved.kept, "others": list(map(_told, saved.others))}

    def _of(request: Request) -> History:
        """Raises ApiError where the page is another login's than the cookie: another tab has logged somebody in."""
        owner, page_of = visitors.owner(request), request.headers.get("x-login", "")
        if unquote(page_of) != visitors.profile(request):
            raise ApiError(409, "other_login", OTHER_LOGIN)
        return histories.of(owner)


def _told(record: Record) -> dict[str, Any]:
    body = None if record.body is None else json.loads(record.body)
    told = {"id": record.id, "kind": record.kind, "conversation": record.conversation, "revision": record.revision}
    return {**told, "record": body}
