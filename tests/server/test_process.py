"""A process that comes and goes politely: what it says at its start, and how it ends."""

import os
import re
import signal
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

ROOT = Path(__file__).parents[2]


@contextmanager
def process(*arguments):
    """`python app.py` on a free port, and its address once the page answers."""
    command = [sys.executable, "app.py", "--port", "0", *arguments]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            lines = (re.search(r"page is at (https?://[^/\s]+)", line) for line in process.stderr)
            yield process, next(filter(None, lines))[1]
        finally:
            process.kill()


def health(address):
    return httpx.get(f"{address}/healthz").json()


def end(process, signal_number):
    """Seconds until the process has left, and what it had to say."""
    began = time.monotonic()
    process.send_signal(signal_number)
    said = process.stderr.read()  # ends with the process
    assert process.wait(timeout=60) == 0, said
    return time.monotonic() - began, said


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_server_leaves_quietly_even_while_a_page_is_open(signal_number, tmp_path):
    with (
        process("--model-id", str(tmp_path / "no-such-model")) as (server, address),
        httpx.stream("GET", f"{address}/gradio_api/heartbeat/somebody", timeout=60) as heartbeat,
    ):
        next(heartbeat.iter_lines())
        while health(address)["status"] != "failed":
            time.sleep(0.1)
        seconds, said = end(server, signal_number)
    assert seconds < 30
    assert "Traceback" not in said
    assert "task(s)" not in said


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_server_leaves_quietly_while_the_model_loads(chat, signal_number):  # `chat`: the model is here
    with process() as (server, address):
        while health(address).get("phase") == "choose":
            time.sleep(0.02)
        seconds, said = end(server, signal_number)
    assert seconds < 30
    assert "Traceback" not in said
    assert "terminate" not in said


@pytest.mark.slow
def test_a_running_answer_ends_with_the_words_it_has_when_the_server_is_stopped(chat):
    with process() as (server, address):
        while health(address)["status"] != "ready":
            time.sleep(0.1)
        job = Client(address, verbose=False).submit("Write a very long story about the sea.", api_name="/chat")
        words = next(filter(None, job))
        seconds, said = end(server, signal.SIGTERM)
        assert seconds < 30
        assert "Traceback" not in said
        assert job.outputs()[-1].startswith(words)


@pytest.mark.slow
def test_with_https_the_page_and_the_authority_to_trust_are_served_encrypted(tmp_path):
    arguments = ("--https", "--host", "127.0.0.1", "--model-id", str(tmp_path / "no-such-model"))
    with process(*arguments) as (server, address):
        assert address.startswith("https://127.0.0.1")
        authority = ssl.create_default_context(cafile=ROOT / "certs" / "ca.crt")
        with httpx.Client(base_url=address, verify=authority) as client:
            assert client.get("/livez").json() == {"status": "alive"}
            assert "Llama 2 Chat" in client.get("/").text
            assert client.get("/ca.crt").content == (ROOT / "certs" / "ca.crt").read_bytes()
        _, said = end(server, signal.SIGTERM)
    assert "SHA-256" in said
    assert "PRIVATE KEY" not in said
