"""Replies and refusals that a test writes, in place of a model's, and an ear for what a model is asked."""

from llama2_chat.types import Timing, Usage


class Scripted:
    """A reply that says what a test wants to see, and then perhaps fails."""

    queue_position = 0
    finish_reason = None
    usage = Usage()
    timing = Timing()

    def __init__(self, *pieces, error=None):
        self.pieces, self.error = list(pieces), error

    async def __anext__(self):
        if self.pieces:
            return self.pieces.pop(0)
        raise self.error or StopAsyncIteration

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
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
