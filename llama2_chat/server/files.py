"""Documents over HTTP, in OpenAI's words: upload, list, content, pages, delete; for programs under /v1, and for
the page under /page.

A file is written to disk while it comes in; only pieces of it are ever in memory.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal
from urllib.parse import quote

import anyio
import anyio.to_thread
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile
from starlette.types import Message

from llama2_chat.documents.library import MAX_FILE_BYTES, Library
from llama2_chat.documents.store import Document, State
from llama2_chat.documents.texts import shown_name
from llama2_chat.server.errors import ApiError
from llama2_chat.server.limits import Turns, client_address
from llama2_chat.server.owners import Owners

MOST_UPLOADS = 16  # of one address, which are received one after another
MOST_DELETES = 64  # of one address, which go one after another as well: each merges all of its owner's indexes
DELETING = 4  # at once, of all
FORM_BYTES = 100_000  # around the file
LARGEST_PAGE = 1_000_000  # number of one; far more than a document may have
PURPOSES = ("user_data", "assistants")
STATUS: dict[State, str] = {"waiting": "uploaded", "ready": "processed", "failed": "error"}
TOO_LARGE = f"A file may have {MAX_FILE_BYTES / 1e6:g} MB."
NO_FILE = "Send a form (multipart/form-data) with the file in the field file."


def add_file_routes(router: APIRouter, library: Library, owners: Owners, prefix: str = "") -> None:
    """POST and GET /files, and what is below. prefix: on top of the router's own."""
    uploads, deletes, deleting = Turns(MOST_UPLOADS), Turns(MOST_DELETES), anyio.CapacityLimiter(DELETING)

    @router.post(f"{prefix}/files")
    async def upload(request: Request, response: Response) -> dict[str, Any]:
        owner = owners.keep_owner(request, response)
        async with uploads.turn(client_address(request)), _limited(request).form(max_files=1) as form:
            file, purpose = form.get("file"), form.get("purpose") or PURPOSES[0]
            if not isinstance(file, UploadFile):
                raise ApiError(400, "missing_parameter", NO_FILE, "file")
            if purpose not in PURPOSES:
                raise ApiError(400, "invalid_value", f"purpose must be one of {', '.join(PURPOSES)}.", "purpose")
            if file.size is not None and file.size > MAX_FILE_BYTES:
                raise ApiError(413, "request_too_large", TOO_LARGE, "file")
            name = shown_name(file.filename or "")
            add = functools.partial(library.add, owner, file.file, name, purpose)
            return _file_object(library, await anyio.to_thread.run_sync(add))

    @router.get(f"{prefix}/files")
    def files(
        request: Request,
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        owner = owners.document_owner(request)
        documents = library.shelf(owner).all() if owner else []
        found = [document for document in documents if purpose in (None, document.purpose)]
        found = found[::-1] if order == "desc" else found
        if after is not None:
            place = next((n for n, document in enumerate(found, 1) if document.id == after), len(found))
            found = found[place:]
        data = [_file_object(library, document) for document in found[:limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, "has_more": len(found) > limit, **ends}

    @router.get(prefix + "/files/{id}")
    def file(id: str, request: Request) -> dict[str, Any]:
        return _file_object(library, _one(id, request))

    @router.get(prefix + "/files/{id}/content")
    def content(id: str, request: Request) -> Response:
        document = _one(id, request)
        # As an attachment of no type, so that no browser shows what a stranger wrote as a page of this site.
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(document.name, safe='')}"}
        pieces = library.shelf(owners.document_owner(request) or "").original(id)
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    @router.get(prefix + "/files/{id}/pages/{page}")
    def page(id: str, page: Annotated[int, Path(ge=0, le=LARGEST_PAGE)], request: Request) -> dict[str, Any]:
        document = _one(id, request)
        text = library.shelf(owners.document_owner(request) or "").page(id, page)
        return {"object": "file.page", "file_id": id, "filename": document.name, "page": page, "text": text}

    @router.delete(prefix + "/files/{id}")
    async def delete(id: str, request: Request) -> dict[str, Any]:
        async with deletes.turn(client_address(request)):
            await anyio.to_thread.run_sync(_delete, id, request, limiter=deleting)
        return {"id": id, "object": "file", "deleted": True}

    def _delete(id: str, request: Request) -> None:
        _one(id, request)
        library.shelf(owners.document_owner(request) or "").delete(id)

    def _one(id: str, request: Request) -> Document:
        owner = owners.document_owner(request)
        if owner is None:
            raise ApiError(404, "not_found", f"There is no document {id!r:.60} here.", "id")
        return library.shelf(owner).get(id)


def is_upload(method: str, path: str) -> bool:
    return method == "POST" and path in ("/v1/files", "/page/files")


def _file_object(library: Library, document: Document) -> dict[str, Any]:
    """As OpenAI has it, and what a visitor wants to know of a document."""
    left = library.seconds_left(document)
    return {
        "id": document.id,
        "object": "file",
        "bytes": document.bytes,
        "created_at": document.created,
        "expires_at": None,
        "filename": document.name,
        "purpose": document.purpose,
        "status": STATUS[document.state],
        "status_details": document.error or None,
        "pages": document.pages,
        "pages_done": document.pages_done,
        "seconds_left": None if left is None else round(left),
        "notes": document.notes,
    }


def _limited(request: Request) -> Request:
    """The same, whose body ends with an ApiError where it becomes too large, or its sender leaves."""
    received = 0
    if int(request.headers.get("content-length", "0") or 0) > MAX_FILE_BYTES + FORM_BYTES:
        raise ApiError(413, "request_too_large", TOO_LARGE, "file")

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ApiError(499, "client_left", "The reader left before the whole file was here.")
        received += len(message.get("body", b""))
        if received > MAX_FILE_BYTES + FORM_BYTES:
            raise ApiError(413, "request_too_large", TOO_LARGE, "file")
        return message

    return Request(request.scope, receive)
