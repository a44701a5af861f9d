"""A backend that keeps ChatBackend's promise without a model, and replies and refusals that a test writes."""

import asyncio
import time
from collections.abc import Callable

from llama2_chat.tools import PLAIN
from llama2_chat.types import Capabilities, Fit, Status, Timing, Usage

HERE = Capabilities(supports_token_ids=True, knows_queue=True, can_fail_over=False, counts_tokens=True)
READY = Status(state="ready", model="scripted", precision="paper", device="desk", why="A test wrote it.")


class Scripted:
    """A reply that says what a test wants to see, and then perhaps fails.

    accepted: a threading.Event, without which nobody can enter it. gate: called before each piece, which is held back
    while it returns False.
    """

    queue_position = 0
    finish_reason = None
    usage = Usage()
    timing = Timing()
    relaxed = logprobs = prompt_logprobs = ()
    json_ends = False

    def __init__(self, *pieces, error=None, accepted=None, gate=lambda: True, reason="stop"):
        self.pieces, self.error, self.accepted = list(pieces), error, accepted
        self.gate, self.reason = gate, reason

    def __iter__(self):
        return self

    def __next__(self):
        while not (self.gate() or self.finish_reason):
            time.sleep(0.01)
        if self.finish_reason:
            raise StopIteration
        return self._piece(StopIteration)

    def __aiter__(self):
        return self

    async def __anext__(self):
        while not self.gate():  # noqa: ASYNC110 - it is opened in another thread
            await asyncio.sleep(0.01)
        return self._piece(StopAsyncIteration)

    def _piece(self, end):
        if self.pieces:
            self.usage = Usage(20, self.usage.completion_tokens + 1)
            return self.pieces.pop(0)
        if self.error:
            raise self.error
        self.finish_reason = self.reason
        raise end

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    async def __aenter__(self):
        if self.accepted is not None:
            await asyncio.to_thread(self.accepted.wait)
        return self

    async def __aexit__(self, *exc):
        self.close()

    def close(self):
        self.finish_reason = self.finish_reason or "cancelled"


class ScriptedChat:
    """What page and API know of a model, and nothing else. `asked` are the conversations that came, with their params.

    say: given the conversation, makes its reply.
    """

    mode, context_length, occupancy, gpu_memory, servers = "", 4096, None, (), ()

    def __init__(self, status=READY, capabilities=HERE, reply=None, say: Callable | None = None):
        self.status, self.capabilities = status, capabilities
        self.say = say or (lambda messages: reply or Scripted("Hello!"))
        self.asked = []

    @property
    def state(self):
        return self.status.state

    call_style = PLAIN

    def stream_reply(self, messages, params, *, trim=True, to_the_end=False, tools=None):
        self.asked.append((messages, params))
        return self.say(messages)

    def encode_text(self, text):
        return text.split()

    def fit(self, messages, params, tools=None):
        """A token a word; what has more than the window loses its oldest exchanges."""
        if tools is not None:
            messages = [{"role": "user", "content": str(tools)}, *messages]
        words = [len(message["content"].split()) for message in messages if message["role"] != "system"]
        dropped = 0
        while sum(words[dropped:]) > self.context_length and dropped + 2 < len(words):
            dropped += 2
        tokens = sum(words[dropped:])
        left = max(self.context_length - tokens, 0)
        return Fit(tokens, dropped, left, self.context_length, fits=tokens <= self.context_length)

    def start(self):
        pass

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
