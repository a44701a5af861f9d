"""Who is asking, whether they may, and how many answers at once: API keys, addresses and CLIENT_LIMIT."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
from fastapi import Request

from llama2_chat.errors import Busy, ChatError
from llama2_chat.server.errors import ApiError
from llama2_chat.settings import Settings

LONG_TEXT = 2**18  # bytes, from which on one text is encoded at a time: it takes a while and much memory


class ConcurrencyLimiter:
    """Counts the answers that each client has on their way, and lets long texts through one by one.

    Every way to ask has the same one. Used from the event loop alone.
    """

    def __init__(self, limit: int | None) -> None:
        """limit: of one client; 0 or None is any number."""
        self._limit = limit
        self._running: Counter[str] = Counter()
        self._long_texts = anyio.CapacityLimiter(1)

    def threads(self, size: int) -> anyio.CapacityLimiter | None:
        """Where a request of so many bytes is encoded: a long one after the others of its kind, by itself."""
        return self._long_texts if size > LONG_TEXT else None

    @contextlib.contextmanager
    def slot(self, client: str, answers: int = 1) -> Iterator[None]:
        """Room for so many more answers of this client. Raises Busy if there is none now, ChatError if never."""
        if self._limit and answers > self._limit:
            raise ChatError(f"This asks for {answers} answers at once, and {self._limit} are allowed. Ask for fewer.")
        running = self._running[client]
        if self._limit and running + answers > self._limit:
            room = f"only {self._limit - running}" if self._limit > running else "no"
            raise Busy(f"You have {running} answers on their way, and {room} more are allowed. Wait for one to end.")
        with counted(self._running, client, answers):
            yield


class Turns:
    """One after another for each client, so that many of one keep nobody else waiting. From the event loop alone."""

    def __init__(self, most: int) -> None:
        """most: that one client may have here, with those that wait."""
        self._most = most
        self._here: Counter[str] = Counter()
        self._locks: dict[str, asyncio.Lock] = {}

    @contextlib.asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Raises Busy if this client has too many here."""
        if self._here[client] >= self._most:
            raise Busy("Too many attempts at once. Please wait a minute and try again.")
        try:
            with counted(self._here, client):
                async with self._locks.setdefault(client, asyncio.Lock()):
                    yield
        finally:
            if client not in self._here:
                self._locks.pop(client, None)


@contextlib.contextmanager
def counted(counts: Counter[str], name: str, more: int = 1) -> Iterator[None]:
    """So many more of this name while it lasts; nothing is kept of names of which there are none."""
    counts[name] += more
    try:
        yield
    finally:
        counts[name] -= more
        if not counts[name]:
            del counts[name]


def client_id(request: Request, settings: Settings) -> str:
    """Who counts as one client: the key, or the address where there are no keys."""
    return key_id(request) if settings.api_keys else client_address(request)


def key_id(request: Request) -> str:
    """A name for the key of a request, which has been checked, that gives it away to nobody."""
    return f"key {hashlib.sha256(given_key(request).encode()).hexdigest()}"


def client_address(request: Any) -> str:
    """Where a request comes from; uvicorn has looked at X-Forwarded-For if a trusted proxy sent it.

    request: FastAPI's, or Gradio's, which passes on the attributes of FastAPI's.
    """
    return one_client(request.client.host) if request.client else ""


def one_client(host: str) -> str:
    """The address or, of IPv6, the network that one household has: each of its devices has 2^64 addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a test client has a name
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


def check_key(request: Request, settings: Settings) -> None:
    """Raises ApiError unless the request has one of the keys.

    Without API_KEY everybody may ask, unless the page has a login: the API would be a way around it.
    """
    if not settings.api_keys and not settings.auth_file:
        return
    given = given_key(request).encode("latin-1")  # as Starlette decoded it
    # A list, not a generator: every key is compared, in constant time.
    matches = [hmac.compare_digest(given, key.encode()) for key in settings.api_keys]
    if any(matches):
        return
    sentence = "Send one of the server's API keys, as Authorization: Bearer."
    if not settings.api_keys:
        sentence = "This server has a login and no API key, so programs cannot use it. Its operator can set API_KEY."
    raise ApiError(401, "invalid_api_key", sentence, headers={"WWW-Authenticate": "Bearer"})


def given_key(request: Request) -> str:
    """The key alone: "bearer  KEY" is "Bearer KEY"."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
