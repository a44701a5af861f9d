"""Another engine behind the same promise: `transformers serve`, with the embedded model."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.remote.faults import INCOMPLETE
from llama2_chat.types import SamplingParams
from tests.support.remote import HELLO, behind, read, wait_until_healthy
from tests.support.serving import ignore
from tests.support.waiting import until


@contextmanager
def transformers_serve(folder, port):
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def free_ports():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


@pytest.mark.slow
def test_two_real_engines_stand_in_for_each_other(settings, free_ports):
    folder = fetch(choose(settings), ignore).base.folder
    urls = [f"http://127.0.0.1:{port}" for port in free_ports]
    params = SamplingParams(temperature=0, max_new_tokens=200)
    with (
        transformers_serve(folder, free_ports[0]) as first,
        transformers_serve(folder, free_ports[1]),
        behind(settings, *urls, inference_model=str(folder)) as model,
    ):
        wait_until_healthy(model, within_s=120)
        text, reply = read(model, HELLO, replace(params, max_new_tokens=12))
        assert (len(text.split()) > 3, reply.usage.completion_tokens) == (True, 12)
        with model.stream_reply(HELLO, params) as begun:
            next(begun)
            first.kill()
            with pytest.raises(ModelUnavailable, match=INCOMPLETE):
                list(begun)
        until(lambda: not model.servers[0].healthy)
        assert read(model, HELLO, replace(params, max_new_tokens=12))[0] == text
        assert "1 of 2 servers cannot answer now" in model.status.why
        with transformers_serve(folder, free_ports[0]):
            wait_until_healthy(model, within_s=120)
