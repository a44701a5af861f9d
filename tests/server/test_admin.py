"""GET /admin/: what the operator sees, from the numbers of /metrics, and who does not."""

import asyncio
import base64
import re
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama2_chat.server import guesses
from llama2_chat.server.admin import admin_router
from llama2_chat.server.metrics import Metrics, Record
from llama2_chat.settings import Settings
from llama2_chat.types import Occupancy, ServerStatus, Timing, Usage
from tests.support.scripted import ScriptedChat

KEY = "sésame: öffne dich"


class Clock:
    minutes = 100.0

    def __call__(self):
        return self.minutes * 60


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def chat():
    chat = ScriptedChat()
    chat.occupancy = Occupancy(3, 2, 1_500, 6_000, 1)
    chat.servers = (ServerStatus("gpu-1:8000", True, 2), ServerStatus("<b>:8000", False, 0))
    chat.gpu_memory = [(40_000_000_000, 80_000_000_000)]
    return chat


@pytest.fixture
def metrics(chat, clock):
    return Metrics(chat, clock=clock)


@pytest.fixture
def http(chat, metrics):
    app = FastAPI()
    app.include_router(admin_router(chat, Settings(admin_key=KEY), metrics))
    with TestClient(app) as http:
        yield http


def basic(key, name="anyone"):
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()}


def answered(metrics, tokens=90, error=""):
    record = Record(metrics, "page")
    if not error:
        record.reply = SimpleNamespace(
            finish_reason="stop", usage=Usage(1_200, tokens, 640), timing=Timing(0.25, tokens_per_second=30.0)
        )
    record.end(error)


def tables(http):
    """{title: {row: value}}"""
    text = http.get("/admin/", headers=basic(KEY)).text
    parts = re.split(r"<h2>(.*?)</h2>", text)[1:]
    rows = [dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', part)) for part in parts[1::2]]
    return dict(zip(parts[::2], rows, strict=True))


def test_the_operator_sees_what_goes_on_now(http):
    assert tables(http)["Now"] == {
        "Being answered": "3",
        "Waiting": "2",
        "KV cache in use": "1,500 of 6,000 tokens, 25%",
        "Put back into the queue since the start": "1",
        "Server gpu-1:8000": "2 being answered",
        "Server &lt;b&gt;:8000": "cannot answer",
        "Memory of GPU 0 in use": "40.0 of 80.0 GB",
    }


def test_a_model_that_does_not_say_who_waits_leaves_no_hole(http, chat):
    chat.occupancy, chat.servers, chat.gpu_memory = None, (), ()
    assert tables(http)["Now"] == {}


def test_the_last_hour_is_what_the_counters_have_gained_in_it(http, metrics, clock):
    answered(metrics, tokens=10)
    answered(metrics, error="old_error")
    clock.minutes += 30
    answered(metrics, tokens=600)
    answered(metrics, error="queue_full")
    answered(metrics, error="queue_full")
    clock.minutes += 31  # the first minute is more than an hour ago
    shown = tables(http)
    assert shown["Errors of the last hour"] == {"queue_full": "2"}
    assert shown["Last hour"] == {
        "Requests": "3",
        "Errors": "2",
        "Tokens of prompts": "1,200",
        "Tokens of prompts from the KV cache": "640",
        "Tokens of answers": "600",
        "Time to the first token, mean": "0.25 s",
        "Speed of an answer, mean": "30.00 tokens/s",
        "All answers together, last 5 minutes": "0.0 tokens/s",
    }
    assert (shown["Since the start"]["Requests"], shown["Since the start"]["Tokens of answers"]) == ("5", "610")
    answered(metrics, tokens=300)
    assert tables(http)["Last hour"]["All answers together, last 5 minutes"] == "1.0 tokens/s"
    clock.minutes += 200
    assert tables(http)["Errors of the last hour"] == {}
    assert metrics.gained(60).total("chat_requests_total") == 0


def test_each_number_is_that_of_the_metrics(http, metrics):
    answered(metrics)
    assert (
        f"chat_completion_tokens_total {metrics.now().total('chat_completion_tokens_total')}" in metrics.text().decode()
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("wrong"),
        basic(""),
        {"Authorization": "Basic !"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic " + base64.b64encode(b"\xff\xfe").decode()},
        basic("", name=KEY),
    ],
    ids=["none", "wrong", "empty", "not base64", "wrong bearer", "not text", "as the name"],
)
def test_without_the_key_nothing_is_shown_and_a_browser_asks_for_it(http, headers):
    refused = http.get("/admin/", headers=headers)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"].startswith("Basic")
    assert refused.headers["Cache-Control"] == "no-store"
    assert "scripted" not in refused.text


def test_with_the_key_nothing_is_kept_and_nothing_but_get_is_there(http):
    shown = http.get("/admin/", headers=basic(KEY))
    assert (shown.status_code, shown.headers["Cache-Control"]) == (200, "no-store")
    assert "<script" not in shown.text
    assert "<form" not in shown.text
    assert {
        http.request(method, "/admin/", headers=basic(KEY)).status_code for method in ("POST", "PUT", "DELETE")
    } == {405}
    assert http.get("/admin", follow_redirects=False).headers["Location"] == "admin/"  # below any prefix of a proxy


def test_a_program_sends_the_key_as_it_sends_others(http):
    assert http.get("/admin/", headers={"Authorization": f"Bearer {KEY}".encode()}).status_code == 200


def test_whoever_guesses_waits(http, monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    # There alone: the servers of other tests sleep in their threads.
    monkeypatch.setattr(guesses, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
    for _ in range(8):
        http.get("/admin/", headers=basic("wrong"))
    assert waited == [0, 0, 0, 0, 0, 1, 2, 4]


def test_without_admin_key_there_is_no_such_page(script):
    assert httpx.get(f"{script.base_url}admin/", headers=basic("")).status_code == 404
