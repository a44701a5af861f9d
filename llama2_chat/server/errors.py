"""OpenAI's way to say no: every exception as a status, a code and a sentence.

ApiError is raised by the routes themselves; as_api_error() makes one of whatever else is raised. What a ChatError says
is written for people and shown as it stands; everything else is logged, and the program gets one calm sentence.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from llama2_chat.errors import (
    DISK_FULL,
    BadGrammar,
    Busy,
    ChatError,
    ModelUnavailable,
    NoRoom,
    NotHere,
    PromptTooLong,
    UnknownToken,
    Unsafe,
)

log = logging.getLogger("llama2_chat")

RETRY_AFTER_S = 5
INTERNAL_ERROR = "Something went wrong on the server. Its log has the details."


class ApiError(Exception):
    """A request that gets no answer, in the error shape that the openai library expects."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers
        kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def no_such_route(method: str, path: str) -> ApiError:
    asked = "Programs ask POST /v1/chat/completions, /v1/responses or /v1/completions: their base URL ends with /v1."
    return ApiError(404, "unknown_url", f"There is no {method} {path:.60} here. {asked}")


def error_response(problem: ApiError) -> JSONResponse:
    return JSONResponse(problem.body, problem.status, problem.headers)


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """The same in OpenAI's words; what is not meant for visitors goes to the log. param: what a ChatError is about."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            # What is missing comes first: without it there is no question that something else could be wrong with.
            return _invalid_request(min(error.errors(), key=lambda each: each["type"] != "missing"))
        case HTTPException(status_code=413):
            return ApiError(413, "request_too_large", "This request is larger than the server accepts.")
        case HTTPException():
            return ApiError(error.status_code, "invalid_request", str(error.detail))
        case PromptTooLong():
            return ApiError(400, "context_length_exceeded", str(error), param)
        case Busy():
            return ApiError(429, "rate_limit_exceeded", str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
        case BadGrammar():
            return ApiError(400, "invalid_value", str(error), param or "response_format")
        case UnknownToken():
            return ApiError(400, "invalid_value", str(error), error.setting)
        case Unsafe():
            return ApiError(400, "content_filter", str(error), param)
        case ModelUnavailable():
            return ApiError(503, "model_unavailable", str(error))
        case NotHere():
            return ApiError(404, "not_found", str(error), param)
        case NoRoom():
            log.warning("%s", error.detail)
            return ApiError(507, "no_room", str(error), param)
        case ChatError():
            return ApiError(400, "invalid_value", str(error), param)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):  # of what a visitor sends, while it comes in
            log.warning("%s", error)
            return ApiError(507, "no_room", DISK_FULL, param)
    log.error("Answering failed", exc_info=error)
    return ApiError(500, "internal_error", INTERNAL_ERROR)


def generation_error(error: Exception) -> ApiError:
    """Of an answer that has begun: but for a grammar that turned out too hard, and a guard, the request was fine."""
    if isinstance(error, ChatError) and not isinstance(error, (BadGrammar, Unsafe)):
        return ApiError(500, "generation_failed", str(error))
    return as_api_error(error)


def _invalid_request(error: dict[str, Any]) -> ApiError:
    """What pydantic found, as a sentence that names the field."""
    path = [str(part) for part in error["loc"][1:]]
    if not path:
        return ApiError(400, "invalid_request", "The body must be a JSON object.")
    if error["type"] == "missing":
        return ApiError(400, "missing_parameter", f"{'.'.join(path)} is missing.", path[0])
    what = error["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    received = repr(error["input"])
    received = f"; it was {received}" if len(received) < 60 else ""
    param = ".".join(path) if path[0] in ("messages", "input") else path[0]
    return ApiError(400, "invalid_value", f"{'.'.join(path)}: {what}{received}.", param)
