"""/healthz and /livez, for whoever watches over the server."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama2_chat.server.health import health_router
from llama2_chat.types import Status
from model import ChatModel


@pytest.fixture
def loading(settings):
    """A chat that was never started."""
    return ChatModel(settings)


@pytest.fixture
def client(loading):
    app = FastAPI()
    app.include_router(health_router(loading))
    return TestClient(app, base_url="http://localhost")


def test_health_says_how_far_loading_is(client, loading):
    loading.status = Status(phase="download", done_bytes=1, total_bytes=2)
    answer = client.get("/healthz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "loading", "phase": "download", "done_bytes": 1, "total_bytes": 2}


def test_health_names_the_model_once_it_is_ready(client, loading):
    loading.status = Status(state="ready", model="m", precision="int8", kv_cache="fp8", device="cpu")
    answer = client.get("/healthz")
    assert answer.status_code == 200
    how = {"precision": "int8", "kv_cache": "fp8", "device": "cpu", "mode": ""}
    assert answer.json() == {"status": "ready", "model": "m", **how}


def test_health_says_why_loading_failed_in_a_sentence(client, loading):
    loading.status = Status(state="failed", error="No such model.")
    answer = client.get("/healthz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "failed", "error": "No such model."}


def test_the_process_is_alive_whatever_the_model_does(client, loading):
    loading.status = Status(state="failed", error="No such model.")
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/livez", "/metrics", "/v1/models", "/v1/models/scripted", "/page/state"]
)
def test_who_asks_for_the_head_alone_gets_that_of_what_get_answers(script, path):
    whole, head = script.get(path), script.head(path)
    assert (head.status_code, head.headers["content-type"]) == (200, whole.headers["content-type"])
    assert (head.content, "content-length" in head.headers) == (b"", True)
    assert script.head("/v1/nothing").status_code == 404
