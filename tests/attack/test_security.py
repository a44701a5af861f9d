"""Closed doors: headers around every answer, and what other sites and too large requests come up against."""

import asyncio
from dataclasses import replace

import httpx
import pytest
from fastapi.testclient import TestClient

from app import create_app
from model import ChatModel
from tests.support.programs import ask, error
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving

FOREIGN = {"Origin": "https://evil.example", "Host": "localhost"}


@pytest.fixture(scope="module")
def loading(settings):
    """A chat that was never started: it is loading, and stays so."""
    return ChatModel(settings)


@pytest.fixture(scope="module")
def client(loading, settings):
    return TestClient(app_of(loading, settings), base_url="http://localhost")


def app_of(chat, settings):
    async def build():
        return create_app(chat, settings)

    return asyncio.run(build())  # without a running loop, Gradio makes loops of its own and never closes them


@pytest.mark.parametrize("path", ["/", "/healthz", "/config", "/theme.css", "/no-such-page"])
def test_every_answer_carries_the_security_headers(client, path):
    headers = client.get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["img-src"] == "data: blob:"
    assert "unsafe" not in policy["script-src"]
    assert policy["connect-src"] == "'self'"
    assert policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_only_on_a_space_hugging_face_may_show_the_page_in_a_frame(loading, settings):
    client = TestClient(app_of(loading, replace(settings, on_space=True)), base_url="http://localhost")
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
    assert client.post("/gradio_api/upload", files={"files": ("a.txt", b"hello")}).status_code == 404


def test_behind_a_proxy_the_page_asks_for_its_parts_under_the_root_path(loading, settings):
    client = TestClient(app_of(loading, replace(settings, root_path="/chat")), base_url="http://localhost")
    assert client.get("/config").json()["root"] == "http://localhost/chat"
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_that_is_too_large_is_not_read(settings, chunked):
    few = replace(settings, body_limit_mb=0.001)
    with serving(ScriptedChat(), few) as address, httpx.Client(base_url=address) as http:
        body = (b"x" * 600 for _ in range(2)) if chunked else b"x" * 1200
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, error(answer)["code"]) == (413, "request_too_large")
        assert http.post("/gradio_api/queue/join", content=b"x" * 1200).status_code == 413
        assert ask(http).status_code == 200
