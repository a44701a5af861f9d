"""Whose request this is: a login's, where there is one, or that of the cookie that this server gave a browser."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection

from fastapi import Request, Response
from gradio.routes import App

from llama2_chat.server.errors import ApiError
from llama2_chat.server.limits import client_address
from llama2_chat.server.owners import COOKIE, cookie_owner, renewed_cookie

NO_COOKIE = (
    "Your browser keeps no cookie for this page, so your documents cannot be kept apart. Open it in its own tab."
)


class Visitors:
    """Tells visitors apart, and lets nobody in who has not logged in where a login is needed."""

    def __init__(self, gradio: App, *, has_login: bool) -> None:
        self._gradio, self.has_login = gradio, has_login
        self._secret = secrets.token_bytes(32)

    def owner(self, request: Request) -> str:
        """Who owns what this request makes and may read. Raises ApiError without a login where one is needed.

        A browser that keeps no cookie in a frame is told apart by the ids alone that it chose for its answers.
        """
        if self.has_login:
            return f"login {self._login(request)[1]}"
        return f"cookie {request.cookies.get(COOKIE, '')}"

    def client(self, request: Request) -> str:
        """Whose share of the model this request takes: the login's, or that of the address, since anyone can have any
        number of cookies."""
        return self.owner(request) if self.has_login else client_address(request)

    def program(self, request: Request) -> str:
        """Who asks through Gradio. Programs that keep no cookie are told apart by their addresses.

        Raises ApiError without a login where one is needed.
        """
        if self.has_login:
            return self.owner(request)
        return cookie_owner(request) or f"address {client_address(request)}"

    def profile(self, request: Request) -> str:
        """Under which name a browser keeps this visitor's conversations: that of the login; "" where there is none."""
        return self._login(request)[1] if self.has_login else ""

    def document_owner(self, request: Request) -> str | None:
        """As owner(), where documents are kept for longer than answers; None for a browser without a cookie of ours."""
        return self.owner(request) if self.has_login else cookie_owner(request)

    def remember(self, request: Request, response: Response) -> None:
        """Give a browser that has none its cookie."""
        if not self.has_login and cookie_owner(request) is None:
            renewed_cookie(request, response)

    def log_in(self, name: str, response: Response) -> None:
        """A session for a user whose password has been checked. Its cookies are what Gradio's own login gives."""
        session = secrets.token_urlsafe(32)
        self._gradio.tokens[session] = name
        for cookie in self._session_cookies():  # security.py sends the one for this scheme, with what it lacks
            response.set_cookie(cookie, session)

    def end_sessions(self, names: Collection[str]) -> None:
        """Of users who are none any longer, or whose password is another one."""
        tokens = self._gradio.tokens
        for session in [session for session, name in tokens.items() if name in names]:
            del tokens[session]

    def log_out_token(self, request: Request) -> str | None:
        """What log_out() wants to see in the header X-Token; None where there is no login."""
        if not self.has_login:
            return None
        session, _ = self._login(request)
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    def log_out(self, request: Request, response: Response) -> None:
        """On this device only. Raises ApiError without the token, which no page of another site can have read."""
        expected, given = self.log_out_token(request) or "", request.headers.get("x-token", "")
        if not expected or not hmac.compare_digest(given.encode("latin-1"), expected.encode()):
            raise ApiError(403, "wrong_token", "Please log out with the button on the page.")
        for cookie in self._session_cookies():
            self._gradio.tokens.pop(request.cookies.get(cookie, ""), None)
            response.delete_cookie(cookie)

    # What server/files.py asks for.

    def keep_owner(self, request: Request, response: Response) -> str:
        """Who owns a document that is uploaded. Raises ApiError for a browser that keeps no cookie."""
        if not self.has_login and cookie_owner(request) is None:
            raise ApiError(403, "no_cookie", NO_COOKIE)
        return self.owner(request) if self.has_login else renewed_cookie(request, response)

    def _login(self, request: Request) -> tuple[str, str]:
        """The session and the name of whoever has logged in. Raises ApiError for everybody else."""
        for session, name in self._sessions(request):
            return session, name
        raise ApiError(401, "not_logged_in", "Please log in first.")

    def _sessions(self, request: Request) -> list[tuple[str, str]]:
        """Its sessions, with their names."""
        given = [request.cookies.get(cookie, "") for cookie in self._session_cookies()]
        return [(session, name) for session in given if (name := self._gradio.tokens.get(session))]

    def _session_cookies(self) -> list[str]:
        return [f"access-token-{kind}{self._gradio.cookie_id}" for kind in ("", "unsecure-")]
