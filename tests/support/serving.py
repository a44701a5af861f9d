"""A server for a chat, in a thread, and company for it."""

import asyncio
import faulthandler
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import uvicorn

from llama2_chat.engine.model_runner import CPU_BATCH
from llama2_chat.presets import NO_PRESETS
from llama2_chat.server.connections import Loop
from llama2_chat.server.listen import server_config

LONGEST_END_S = 60


@contextmanager
def busy(chat, question, params):
    """Others' long answers to the question take all that the model does at once."""
    with ExitStack() as stack:
        for number in range(CPU_BATCH):  # each somebody else, or whoever comes would have a share of theirs
            next(stack.enter_context(chat.stream_reply(question, replace(params, client=f"{number}"))))
        yield


class Server(uvicorn.Server):
    """A server that cuts every connection when it ends: pages and clients of a test may be there to the last.

    uvicorn would wait for their streams and then cancel them. Over TLS such a connection waits for the other side's
    goodbye, beyond the end of the loop, and the garbage collector finds it in the middle of another test.
    """

    async def shutdown(self, sockets=None):
        for listener in self.servers:
            listener.close()  # nobody comes back
        while self.server_state.connections:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await asyncio.sleep(0)  # in which the loop tells them
        await super().shutdown(sockets)


@contextmanager
def listening(build):
    """The port of a server in a thread, whose uvicorn.Config build() makes in the loop that it then runs in."""
    servers = []

    async def serve():
        servers.append(Server(build()))
        await servers[0].serve()

    def run():
        with asyncio.Runner(loop_factory=Loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
        thread.join(0.02)
    (server,) = servers
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(LONGEST_END_S)
        if thread.is_alive():  # seen twice in some thirty runs, at the end of all tests, and never where one could look
            print(f"A test's server has not ended in {LONGEST_END_S} s and is left behind.", file=sys.stderr)
            faulthandler.dump_traceback()


@contextmanager
def serving(chat, settings, users=None, port=0, presets=NO_PRESETS):
    """The address of a server for this chat, in a thread; on any free port, unless one is named."""
    from app import create_app  # Gradio takes seconds to import, and most tests do without

    def build():  # without a running loop, Gradio would make loops of its own and never close them
        return server_config(create_app(chat, settings, users, presets=presets), settings, port=port)

    with listening(build) as port:
        yield f"http://127.0.0.1:{port}/"


def ignore(phase, done_bytes, total_bytes):
    """Progress that nobody looks at."""
