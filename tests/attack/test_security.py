"""Closed doors: headers around every answer, and what other sites and too large requests come up against."""

import asyncio
import json
import socket
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


@pytest.fixture(scope="module")
def scripted_address(settings):
    with serving(ScriptedChat(), settings) as address:
        yield httpx.URL(address)


def answer_to(address, head):
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        connection.sendall(head + b"\r\nConnection: close\r\n\r\n")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize("target", [b"http://localhost/v1/models?a=b", b"HTTP://127.0.0.1:80/v1/models"])
def test_a_program_that_asks_by_a_whole_address_as_of_a_proxy_is_answered(scripted_address, target):
    status, body = answer_to(scripted_address, b"GET %s HTTP/1.1\r\nHost: localhost" % target)
    assert (status, body["object"]) == (200, "list")


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost", 404, "unknown_url"),
        (b"GET http://localhost HTTP/1.1\r\nHost: evil.example", 421, "misdirected_request"),
        (b"GET /healthz HTTP/1.0", 421, "misdirected_request"),
    ],
)
def test_what_is_no_path_and_no_name_of_this_server_is_refused_in_a_sentence(scripted_address, head, status, code):
    # Whole addresses and "*" got {"detail": "Not Found"}; without a Host it did "not answer for .".
    received, body = answer_to(scripted_address, head)
    assert (received, body["error"]["code"]) == (status, code)
    assert " ." not in body["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_that_is_too_large_is_not_read(settings, chunked):
    few = replace(settings, body_limit_mb=0.001)
    with serving(ScriptedChat(), few) as address, httpx.Client(base_url=address) as http:
        body = (b"x" * 600 for _ in range(2)) if chunked else b"x" * 1200
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, error(answer)["code"]) == (413, "request_too_large")
        assert http.post("/gradio_api/queue/join", content=b"x" * 1200).status_code == 413
        assert ask(http).status_code == 200
