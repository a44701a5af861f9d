"""Whose documents a request is about: a key's, or those of a cookie that this server gave out.

Nothing of an owner comes from a field of a request.
"""

from __future__ import annotations

import re
import secrets
from typing import Protocol

from fastapi import Request, Response

from llama2_chat.server.limits import key_id
from llama2_chat.settings import Settings

COOKIE = "llama2_chat_visitor"  # HttpOnly, SameSite and Secure as security.py makes all cookies
COOKIE_AGE_S = 30 * 24 * 3600
OURS = re.compile(r"[\w-]{32}", re.ASCII)


class Owners(Protocol):
    """Tells owners apart. Raises ApiError for whoever may have nothing here."""

    def document_owner(self, request: Request) -> str | None: ...  # None for one who has nothing yet

    def keep_owner(self, request: Request, response: Response) -> str:
        """The owner of what this request brings; a cookie goes into the response where one is needed."""


class ApiOwners:
    """The key where there are keys, else the cookie, which programs keep as browsers do."""

    def __init__(self, settings: Settings) -> None:
        self._has_keys = bool(settings.api_keys)

    def document_owner(self, request: Request) -> str | None:
        if self._has_keys:  # which has been checked
            return key_id(request)
        return cookie_owner(request)

    def keep_owner(self, request: Request, response: Response) -> str:
        return (self.document_owner(request) if self._has_keys else None) or renewed_cookie(request, response)


def cookie_owner(request: Request) -> str | None:
    """None without a cookie, and for one that this server cannot have given."""
    value = request.cookies.get(COOKIE, "")
    return f"cookie {value}" if OURS.fullmatch(value) else None


def renewed_cookie(request: Request, response: Response) -> str:
    """The owner by the cookie, which lasts from now on, or by a new one."""
    owner = cookie_owner(request) or f"cookie {secrets.token_urlsafe(24)}"
    response.set_cookie(COOKIE, owner.removeprefix("cookie "), max_age=COOKIE_AGE_S)
    return owner
