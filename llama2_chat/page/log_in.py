"""POST /login, in place of Gradio's: the same fields and answers, behind a line that guesses do not block."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llama2_chat.page.visitors import Visitors
from llama2_chat.server.errors import as_api_error, error_response
from llama2_chat.server.guesses import Guesses
from llama2_chat.server.limits import client_address
from llama2_chat.server.login import Users
from llama2_chat.server.responses import unless_left

LONGEST = 1_000  # characters of a name or a password


def login_router(users: Users, visitors: Visitors) -> APIRouter:
    router, guesses = APIRouter(), Guesses(users.knows)

    @router.post("/login")
    @router.post("/login/")
    async def log_in(request: Request) -> Response:
        """Who has left is no longer in line."""
        try:
            async with request.form(max_files=0, max_fields=10) as form:
                name, password = (str(form.get(field, ""))[: LONGEST + 1] for field in ("username", "password"))
            name = name.strip()
            fits = max(len(name), len(password)) <= LONGEST and await unless_left(
                request, guesses.fits(client_address(request), name, password)
            )
            if not fits:
                return JSONResponse({"detail": "Incorrect credentials."}, 400)  # as Gradio's client reads it
            response = JSONResponse({"success": True})
            visitors.log_in(name, response)
            return response
        except HTTPException as error:  # what is no form
            return JSONResponse({"detail": str(error.detail)}, error.status_code)
        except Exception as error:
            return error_response(as_api_error(error))

    return router
