"""The door to the network: the socket that page and API are served on, the server behind it, and what it says at start.

--check asks for the socket in a Python that may lack packages, so only the server itself imports any.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import sys
from typing import TYPE_CHECKING, Any

from llama2_chat.errors import ChatError
from llama2_chat.settings import Settings
from llama2_chat.types import ChatBackend

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from llama2_chat.server.certificate import Certificate

log = logging.getLogger("llama2_chat")


def open_listener(settings: Settings) -> socket.socket:
    """The socket that the page is served on. Raises ChatError if this address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    both = settings.host == "::" and socket.has_dualstack_ipv6()  # IPv4 too
    try:
        socket.getaddrinfo(settings.host, settings.port, family)  # says in fewer words why a name has no address
        return socket.create_server((settings.host, settings.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise ChatError(
            f"Cannot listen on {settings.host} port {settings.port}: {reason}. Choose another with --host or --port."
        ) from error


def make_server(app: FastAPI, chat: ChatBackend, settings: Settings, context: ssl.SSLContext | None) -> uvicorn.Server:
    """A server that ends the running answers when it is told to stop; each reaches its page with the words it has."""
    import anyio.to_thread
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await anyio.to_thread.run_sync(chat.close)
            # An open page keeps a stream open for good; cutting it is no error worth a traceback.
            logging.getLogger("uvicorn.error").disabled = True
            await super().shutdown(sockets)
            for connection in list(self.server_state.connections):  # over TLS they wait for the other side's goodbye
                connection.transport.abort()
            await asyncio.sleep(0)  # in which the loop tells them

    return Server(server_config(app, settings, ssl_context_factory=(lambda *_: context) if context else None))


def server_config(app: FastAPI, settings: Settings, **options: Any) -> uvicorn.Config:
    """How the app is served. options: uvicorn's own."""
    import uvicorn

    from llama2_chat.server.connections import HttpProtocol

    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        loop="llama2_chat.server.connections:Loop",  # which accepts from our own Listener; uvloop would not
        log_level="warning",
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_graceful_shutdown=2,
        **options,
    )


def announce(settings: Settings, listener: socket.socket, certificate: Certificate | None) -> None:
    """Say where the page is, who may use the model, and what another device needs in order to trust it."""
    scheme, port = "https" if certificate else "http", listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("The page is at %s://%s:%s%s/", scheme, host, port, settings.root_path)
    if not settings.on_loopback and not settings.api_keys and not settings.auth_file:
        log.warning("Any program that reaches this port may use the model without a key. Set API_KEY to ask for one.")
    if certificate:
        from llama2_chat.server.announcement import announcement

        print(announcement(certificate, settings.host, port, sys.stderr.isatty()), file=sys.stderr, flush=True)
