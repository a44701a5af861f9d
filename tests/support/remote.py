"""A model that servers have, and one answer of it."""

import time
from contextlib import contextmanager
from dataclasses import replace

from llama2_chat.errors import ChatError
from llama2_chat.remote import RemoteModel
from llama2_chat.remote.client import Timeouts
from llama2_chat.types import SamplingParams
from tests.support.waiting import until

PARAMS = SamplingParams(max_new_tokens=8)
HELLO = [{"role": "user", "content": "Say hello."}]
OFTEN = Timeouts(unhealthy_s=0.05)  # a server that failed is probed again at once


@contextmanager
def behind(settings, *servers, timeouts=OFTEN, **more):
    """The model of these servers, once one of them is healthy or all have failed."""
    urls = ",".join(getattr(server, "url", server) for server in servers)
    model = RemoteModel(replace(settings, inference_url=urls, **more), timeouts).load()
    try:
        yield model
    finally:
        began = time.monotonic()
        model.close(timeout_s=60)
        assert time.monotonic() - began < 30


def wait_until_healthy(model, within_s=60):
    """Return once each of its servers is."""
    until(lambda: all(server.healthy for server in model.servers), within_s)


def read(model, messages=HELLO, params=PARAMS, **more):
    """The text, and the reply or what it raised."""
    pieces = []
    try:
        with model.stream_reply(messages, params, **more) as reply:
            pieces.extend(reply)
            return "".join(pieces), reply
    except ChatError as error:
        return "".join(pieces), error
