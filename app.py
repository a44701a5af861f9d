"""The program: a page with a chat, and an API beside it, on a model in this process or on other servers.

    python app.py               then open http://127.0.0.1:7860

The page is up before the model is; a message sent meanwhile waits. What stands on it is in llama2_chat/page/, what
programs ask in llama2_chat/server/, what a model does with a message in model.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable

from llama2_chat.api_keys import ApiKeys
from llama2_chat.errors import ChatError
from llama2_chat.process import outlive_stderr
from llama2_chat.server import login, preflight
from llama2_chat.settings import Settings

if __name__ == "__main__":
    # Before the imports below: that a package is missing is for the check to tell.
    outlive_stderr()
    requested = Settings.read()
    if requested.hash_password:
        sys.exit(login.main())
    if requested.check:
        sys.exit(preflight.main(requested))
    print("Starting Llama 2 Chat …", file=sys.stderr, flush=True)  # the imports below take seconds

import anyio.to_thread
from fastapi import FastAPI
from fastapi.responses import FileResponse

from llama2_chat.agent import McpTools, Tool, read_mcp_servers
from llama2_chat.documents.library import Library
from llama2_chat.page.layout import add_page
from llama2_chat.page.wording import TITLE
from llama2_chat.presets import NO_PRESETS, Presets, read_presets
from llama2_chat.server.admin import admin_router
from llama2_chat.server.connections import Listener, room_for_connections
from llama2_chat.server.head import HeadAsGet
from llama2_chat.server.health import health_router
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.listen import announce, make_server, open_listener
from llama2_chat.server.local_ca import CERTS
from llama2_chat.server.metrics import Metrics
from llama2_chat.server.openai_api import api_router
from llama2_chat.server.security import add_security_middleware
from llama2_chat.server.tls import Certificates, get_certificate
from llama2_chat.types import ChatBackend, Embedder

log = logging.getLogger("llama2_chat")


def main() -> int:
    settings = Settings.read()
    log_to_stderr()
    certificate = functools.partial(get_certificate, settings.certfile, settings.keyfile, settings.key_password)
    try:
        certificates = Certificates(certificate) if settings.https else None
        users = login.read_users(settings.auth_file) if settings.auth_file else None
        mcp_tools = McpTools(read_mcp_servers(settings.mcp_servers)) if settings.mcp_servers else None
        presets = read_presets(settings.presets) if settings.presets else NO_PRESETS
        listener = open_listener(settings)
    except ChatError as error:
        log.error("%s", error.detail)
        return 1
    chat = make_backend(settings)
    hosts = certificate().hosts if certificates else ()
    app = asyncio.run(_built(lambda: create_app(chat, settings, users, hosts, mcp_tools or (), presets)))
    server = make_server(app, chat, settings, certificates.context if certificates else None)
    announce(settings, listener, certificate() if certificates else None)
    # uvicorn stops at SIGTERM, then raises it again for the handler of before: the default one would end the process
    # without closing the model.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _read_again_at_sighup(settings, users, certificates)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        chat.start()
        if mcp_tools:
            mcp_tools.start()
        server.run(sockets=[Listener(listener, room_for_connections(), settings.trusted_proxies)])
    if mcp_tools:
        mcp_tools.close()
    chat.close()
    if chat.state == "loading":
        os._exit(0)  # its thread may be deep inside a download or PyTorch, and Python would wait for it or crash on it
    return 0 if server.started else 1


async def _built(make: Callable[[], FastAPI]) -> FastAPI:
    """Outside of a loop Gradio would make loops of its own and never close them."""
    return make()


def _read_again_at_sighup(settings: Settings, users: login.Users | None, certificates: Certificates | None) -> None:
    """What lies in files and may change while answers go on. Where there is nothing, SIGHUP ends the program."""
    keys = settings.api_keys if isinstance(settings.api_keys, ApiKeys) else None
    if not (users or certificates or keys) or not hasattr(signal, "SIGHUP"):  # Windows has none
        return

    def read_again(*_: object) -> None:
        if certificates and certificates.read_again():
            log.info("The certificate was read again")
        if users and settings.auth_file:
            login.read_again(users, settings.auth_file)
        if keys:
            keys.read_again()

    signal.signal(signal.SIGHUP, read_again)


def log_to_stderr() -> None:
    """The package's own lines from INFO on, other libraries' from WARNING on."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)


def make_backend(settings: Settings) -> ChatBackend:
    """What answers: the servers that INFERENCE_URL names, or a model in this process; behind a guard, if one is set."""
    chat = _make_unguarded(settings)
    if not settings.guard_url:
        return chat
    from llama2_chat.guard import GuardedChat

    return GuardedChat(chat, settings)


def _make_unguarded(settings: Settings) -> ChatBackend:
    if settings.inference_urls:
        from llama2_chat.remote import RemoteModel

        return RemoteModel(settings)
    from model import ChatModel  # a page whose model is elsewhere needs none of the packages below it

    return ChatModel(settings)


def _make_embedder(settings: Settings) -> Embedder | None:
    if not settings.embeddings:
        return None
    from llama2_chat.embeddings import make_embedder

    return make_embedder(settings)


def create_app(
    chat: ChatBackend,
    settings: Settings,
    users: login.Users | None = None,
    certificate_hosts: Iterable[str] = (),
    more_tools: Iterable[Tool] = (),
    presets: Presets = NO_PRESETS,
) -> FastAPI:
    """The whole site: the page at /, the API and health beside it. The chat may still be loading.

    more_tools: that visitors may let the model use, and presets: that they may start from, beside the page's own.
    """
    embedder = _make_embedder(settings)
    library = Library(settings.documents_dir, embedder) if settings.documents else None

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if embedder:
            embedder.start()
        if library:
            library.start()
        yield
        if library:
            await anyio.to_thread.run_sync(library.close)
        if embedder:
            await anyio.to_thread.run_sync(embedder.close)

    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(HeadAsGet)
    add_security_middleware(app, settings, certificate_hosts)
    limiter, metrics = ConcurrencyLimiter(settings.client_limit), Metrics(chat, settings.log_messages)
    if settings.guard_url:
        from llama2_chat.guard import GuardedChat

        assert isinstance(chat, GuardedChat)  # as make_backend() makes it
        metrics.registry.register(chat.verdicts)
    app.include_router(health_router(chat))
    app.include_router(api_router(chat, settings, limiter, metrics, library, embedder))
    if settings.admin_key:
        app.include_router(admin_router(chat, settings, metrics))
    if settings.https and not settings.certfile:

        @app.get("/ca.crt")
        async def ca() -> FileResponse:
            # No file name: with one, an iPhone would save it and not offer to install it.
            return FileResponse(CERTS / "ca.crt", media_type="application/x-x509-ca-cert")

    return add_page(app, chat, settings, users, limiter, metrics, more_tools, library, presets)


if __name__ == "__main__":
    sys.exit(main())
