"""What stands beside the page: health, headers, closed doors, and a process that comes and goes politely."""

import asyncio
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from gradio_client import Client

from app import create_app
from llama2_chat.types import Status
from model import ChatModel

# Gradio 6.31 uses what pandas 3 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
ROOT = Path(__file__).parents[2]
FOREIGN = {"Origin": "https://evil.example", "Host": "chat.example.org"}


@pytest.fixture(scope="module")
def loading(settings):
    """A chat that was never started: it is loading, and stays so."""
    return ChatModel(settings)


@pytest.fixture(scope="module")
def client(loading, settings):
    return TestClient(app_of(loading, settings))


def app_of(chat, settings):
    async def build():
        return create_app(chat, settings)

    return asyncio.run(build())  # without a running loop, Gradio makes loops of its own and never closes them


def test_health_says_how_far_loading_is(client, loading):
    loading.status = Status(phase="download", done_bytes=1, total_bytes=2)
    answer = client.get("/healthz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "loading", "phase": "download", "done_bytes": 1, "total_bytes": 2}


def test_health_names_the_model_once_it_is_ready(client, loading):
    loading.status = Status(state="ready", model="m", precision="int8", device="cpu")
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "model": "m", "precision": "int8", "device": "cpu", "mode": ""}


def test_health_says_why_loading_failed_in_a_sentence(client, loading):
    loading.status = Status(state="failed", error="No such model.")
    answer = client.get("/healthz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "failed", "error": "No such model."}


def test_the_process_is_alive_whatever_the_model_does(client, loading):
    loading.status = Status(state="failed", error="No such model.")
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/config", "/theme.css", "/no-such-page"])
def test_every_answer_carries_the_security_headers(client, path):
    headers = client.get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["img-src"] == "'self' data: blob:"
    assert policy["connect-src"] == "'self'"
    assert policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_only_on_a_space_hugging_face_may_show_the_page_in_a_frame(loading, settings):
    client = TestClient(app_of(loading, replace(settings, on_space=True)))
    ancestors = client.get("/").headers["Content-Security-Policy"].partition("frame-ancestors ")[2]
    assert ancestors.split() == ["'self'", "https://huggingface.co", "https://*.huggingface.co", "https://*.hf.space"]


@pytest.mark.parametrize("path", ["/", "/healthz", "/config", "/gradio_api/info"])
def test_other_sites_cannot_read_answers(client, path):
    assert "Access-Control-Allow-Origin" not in client.get(path, headers=FOREIGN).headers


def test_other_sites_are_not_allowed_to_send_questions(client):
    preflight = {**FOREIGN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = client.options("/gradio_api/queue/join", headers=preflight)
    assert answer.status_code == 400
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_nobody_can_leave_files_here(client):
    assert client.post("/gradio_api/upload", files={"files": ("a.txt", b"hello")}).status_code == 413


def test_behind_a_proxy_the_page_asks_for_its_parts_under_the_root_path(loading, settings):
    client = TestClient(app_of(loading, replace(settings, root_path="/chat")))
    assert client.get("/config").json()["root"] == "http://testserver/chat"
    assert client.get("/livez").status_code == 200


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
    assert process.wait(timeout=15) == 0, said
    return time.monotonic() - began, said


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_server_leaves_quietly_even_while_a_page_is_open(signal_number, tmp_path):
    with (
        process("--model-id", str(tmp_path / "no-such-model")) as (server, address),
        httpx.stream("GET", f"{address}/gradio_api/heartbeat/somebody", timeout=20) as heartbeat,
    ):
        next(heartbeat.iter_lines())
        while health(address)["status"] != "failed":
            time.sleep(0.1)
        seconds, said = end(server, signal_number)
    assert seconds < 10
    assert "Traceback" not in said
    assert "task(s)" not in said


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_server_leaves_quietly_while_the_model_loads(chat, signal_number):  # `chat`: the model is here
    with process() as (server, address):
        while health(address).get("phase") == "choose":
            time.sleep(0.02)
        seconds, said = end(server, signal_number)
    assert seconds < 10
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
        assert seconds < 10
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
