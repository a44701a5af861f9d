"""A backend that keeps ChatBackend's promise without a model, and replies and refusals that a test writes."""

import asyncio

from llama2_chat.types import Capabilities, Status, Timing, Usage

HERE = Capabilities(supports_token_ids=True, knows_queue=True, can_fail_over=False)
READY = Status(state="ready", model="scripted", precision="paper", device="desk", why="A test wrote it.")


class Scripted:
    """A reply that says what a test wants to see, and then perhaps fails.

    accepted: a threading.Event, without which nobody can enter it.
    """

    queue_position = 0
    finish_reason = None
    usage = Usage()
    timing = Timing()

    def __init__(self, *pieces, error=None, accepted=None):
        self.pieces, self.error, self.accepted = list(pieces), error, accepted

    async def __anext__(self):
        if self.pieces:
            return self.pieces.pop(0)
        raise self.error or StopAsyncIteration

    async def __aenter__(self):
        if self.accepted is not None:
            await asyncio.to_thread(self.accepted.wait)
        return self

    async def __aexit__(self, *exc):
        pass


class ScriptedChat:
    """What page and API know of a model, and nothing else."""

    mode, context_length, occupancy, gpu_memory, servers = "", 4096, None, (), ()

    def __init__(self, status=READY, capabilities=HERE, reply=None):
        self.status, self.capabilities, self.reply = status, capabilities, reply

    @property
    def state(self):
        return self.status.state

    def stream_reply(self, messages, params, *, trim=True, to_the_end=False):
        return self.reply or Scripted("Hello!")

    def close(self, timeout_s=5):
        pass


def raising(error):
    def stream_reply(*_):
        raise error

    return stream_reply


def spy(chat, monkeypatch) -> list:
    """What the model is asked from now on."""
    asked, stream_reply = [], chat.stream_reply
    monkeypatch.setattr(
        chat, "stream_reply", lambda messages, params: asked.append(messages) or stream_reply(messages, params)
    )
    return asked
