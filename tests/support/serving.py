"""A server for a chat, in a thread, and company for it."""

import asyncio
import threading
from contextlib import ExitStack, contextmanager

import uvicorn

from llama2_chat.engine.model_runner import CPU_BATCH


@contextmanager
def busy(chat, question, params):
    """Others' long answers to the question take all that the model does at once."""
    with ExitStack() as stack:
        for _ in range(CPU_BATCH):
            next(stack.enter_context(chat.stream_reply(question, params)))
        yield


async def serve_until_told(server):
    """server.serve(), and then no connection is left of a page that was open to the last."""
    await server.serve()
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    await asyncio.sleep(0.05)


@contextmanager
def serving(chat, settings, users=None):
    """The address of a server for this chat, in a thread."""
    from app import create_app  # Gradio takes seconds to import, and most tests do without

    servers = []

    async def serve():  # without a running loop, Gradio would make loops of its own and never close them
        config = uvicorn.Config(
            create_app(chat, settings, users),
            port=0,
            log_level="error",
            timeout_graceful_shutdown=1,
            forwarded_allow_ips=settings.trusted_proxies,
        )
        servers.append(uvicorn.Server(config))
        await serve_until_told(servers[0])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
        thread.join(0.02)
    (server,) = servers
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def ignore(phase, done_bytes, total_bytes):
    """Progress that nobody looks at."""
