"""Who may hold how many connections, and for how long without saying what they want.

Every connection takes a descriptor, of which a process has a few hundred to a few thousand. They are counted where they
are accepted, before TLS; how long one may take is HttpProtocol's to watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import sys
import time
from asyncio import TimerHandle, Transport
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama2_chat.server.limits import one_client

log = logging.getLogger("llama2_chat")

MOST = 4_000  # connections, where there are descriptors for them
RESERVED = 100  # descriptors for files, databases and processes
REFUSED_AT_ONCE = 100  # of those that wait to be accepted, before everything else has its turn
# Apache's mod_reqtimeout has the same: so long for headers or a body, and longer as long as they come at this pace.
PATIENCE_S, BYTES_PER_S = 20.0, 500
UNREAD_S = 120.0  # a reader of whose answer nothing more can be sent is given up after that
TICK_S = 2.0
LOG_EVERY_S = 60.0


def room_for_connections() -> int:
    """How many this process can have open; asks the system for as many descriptors as it gives without asking."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = MOST + RESERVED
        soft = max(soft, wanted if hard == resource.RLIM_INFINITY else min(hard, wanted))
        with contextlib.suppress(OSError, ValueError):  # macOS has another limit, beside this one
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(min(MOST, soft - RESERVED), 8)
    return MOST


class Listener(socket.socket):
    """A listening socket that accepts no more connections than there is room for, and of one client half of them.

    Where there is no room for a client with few, the newest of whoever has the most is closed. Used from the event loop
    alone.
    """

    def __init__(self, listening: socket.socket, most: int, proxies: str = "") -> None:
        """listening: is taken over. most: connections; proxies: comma-separated networks through which many come."""
        super().__init__(listening.family, listening.type, listening.proto, fileno=listening.detach())
        self._most = most
        self._proxies = [ipaddress.ip_network(proxy.strip()) for proxy in proxies.split(",") if proxy.strip()]
        self._open: dict[str, list[_Connection]] = {}  # by client, the newest last
        self._said = _Rarely()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that may stay. Raises BlockingIOError where there is none."""
        for _ in range(REFUSED_AT_ONCE):
            accepted, address = super().accept()
            connection = _Connection(accepted, self, one_client(address[0]))
            if self._has_room(connection.client):
                self._open.setdefault(connection.client, []).append(connection)
                return connection, address
            connection.close()
        raise BlockingIOError

    def _has_room(self, client: str) -> bool:
        mine = len(self._open.get(client, ()))
        if mine >= self._most // 2 and not self._is_proxy(client):
            self._said("%s has %d connections open; more are refused", client, mine)
            return False
        if sum(map(len, self._open.values())) < self._most:
            return True
        heaviest = max(self._open, key=lambda other: 0 if self._is_proxy(other) else len(self._open[other]))
        if mine + 1 >= len(self._open[heaviest]) or self._is_proxy(heaviest):
            self._said("All %d connections are taken; one of %s is refused", self._most, client)
            return False
        self._said("All %d connections are taken; those of %s, which has most, make room", self._most, heaviest)
        self._open[heaviest][-1].hang_up()
        return True

    def _is_proxy(self, client: str) -> bool:
        address = ipaddress.ip_network(client).network_address
        return any(address in proxy for proxy in self._proxies)

    def forget(self, connection: _Connection) -> None:
        """It is closed, or will be."""
        theirs = self._open.get(connection.client, [])
        if connection in theirs:
            theirs.remove(connection)
            if not theirs:
                del self._open[connection.client]


class _Connection(socket.socket):
    """Tells its listener when it is closed."""

    def __init__(self, accepted: socket.socket, listener: Listener, client: str) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self.client, self._listener = client, listener

    def close(self) -> None:
        super().close()
        self._listener.forget(self)

    def hang_up(self) -> None:
        """The event loop reads its end, and closes it."""
        self._listener.forget(self)
        with contextlib.suppress(OSError):  # the other end was first
            self.shutdown(socket.SHUT_RDWR)


class HttpProtocol(H11Protocol):
    """uvicorn's, which waits no longer than a while for a request, its body, and for somebody to read the answer."""

    _tick: TimerHandle | None = None
    _waited_s = _unread_s = 0.0
    _received = 0  # bytes since the last tick

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._tick is not None:
            self._tick.cancel()

    def _should_upgrade(self) -> bool:
        """Nothing but HTTP is spoken here. Who asks for something else as well, as Java does for HTTP/2, gets that."""
        return False

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._waited_s = 0.0
        super().on_response_complete()

    def _watch(self) -> None:
        self._tick = self.loop.call_later(TICK_S, self._look)

    def _look(self) -> None:
        awaited = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.flow.read_paused
        longer_s = TICK_S - self._received / BYTES_PER_S
        self._waited_s, self._received = max(self._waited_s + longer_s, 0) if awaited else 0.0, 0
        self._unread_s = self._unread_s + TICK_S if self.flow.write_paused else 0.0
        if self._waited_s > PATIENCE_S:
            _too_slow(
                "Connections that do not say what they want are closed, the last of %s", (self.client or ("",))[0]
            )
            self.transport.abort()
        elif self._unread_s > UNREAD_S:
            _too_slow("Connections whose answer nobody reads are closed, the last of %s", (self.client or ("",))[0])
            self.transport.abort()
        else:
            self._watch()


if sys.platform == "win32":
    _Loop = asyncio.ProactorEventLoop
else:
    _Loop = asyncio.SelectorEventLoop


class Loop(_Loop):
    """asyncio's own, which waits no longer for TLS than HttpProtocol for what comes after it; by itself a minute."""

    async def create_server(self, *args: Any, ssl: Any = None, **options: Any) -> asyncio.Server:
        patience_s = PATIENCE_S if ssl else None
        return await super().create_server(*args, ssl=ssl, ssl_handshake_timeout=patience_s, **options)


class _Rarely:
    """A line in the log, the first at once and then no more than one a minute."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def __call__(self, message: str, *args: object) -> None:
        if time.monotonic() - self._last > LOG_EVERY_S:
            self._last = time.monotonic()
            log.warning(message, *args)


_too_slow = _Rarely()
