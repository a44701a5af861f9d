"""What Gradio would do for anybody who asks: fetch, store and serve files, build components, log others out."""

import json

import httpx
import pytest
from gradio_client import Client

from llama2_chat.page.guard import TAKES_NO_FILES, names_a_file
from tests.support.programs import GRADIO_SETTINGS
from tests.support.serving import serving


@pytest.fixture(scope="module")
def http(chat, settings):
    with serving(chat, settings) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http


def file_data(address):
    return {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}


def last_event(http, data, api="chat"):
    event_id = http.post(f"/gradio_api/call/{api}", json={"data": data}).json()["event_id"]
    return http.get(f"/gradio_api/call/{api}/{event_id}").text


@pytest.mark.parametrize(
    "wrap",
    [
        lambda file: file,
        lambda file: {"text": "Hi", "files": [file]},
        lambda file: [{"role": "user", "content": {"type": "file", "file": file}}],
        lambda file: [{"component": "image", "value": file["url"], "constructor_args": {"value": file["url"]}}],
    ],
    ids=["bare", "in a list", "in a message", "as a component"],
)
def test_the_server_fetches_nothing_for_a_visitor(http, canary, wrap):
    # Any address in the shape of Gradio's FileData was downloaded into the server's memory and onto its disk.
    answer = last_event(http, [wrap(file_data(canary.url)), *GRADIO_SETTINGS])
    assert TAKES_NO_FILES in answer
    assert canary.requested == []


def test_a_text_about_files_is_a_text(http):
    assert not names_a_file(["What is a path, a url, a meta?", [{"role": "user", "content": '{"meta": 1}'}]])
    assert "event: complete" in last_event(http, ["What is gradio.FileData?", *GRADIO_SETTINGS])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/upload_progress?upload_id=1"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/proxy=https://example.com/"),
        ("GET", "/gradio_api/deep_link?session_hash=1"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/gradio_api/stream/1/2/3/playlist.m3u8"),
        ("GET", "/custom_component/1/client/a/b"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/heartbeat/1"),
        ("GET", "/gradio_api/dev/reload"),
        ("POST", "/gradio_api/vibe-edit"),
        ("GET", "/openapi.json"),
        ("GET", "/logout"),
        ("GET", "/gradio_api//upload"),
        ("PUT", "/"),
    ],
)
def test_of_gradios_routes_there_are_only_those_that_the_page_needs(http, method, path):
    answer = http.request(method, path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("run/chat", {"data": ["Hi", *GRADIO_SETTINGS]}),
        ("run/predict", {"data": ["Hi"]}),
        ("run/predict", {"data": [], "fn_index": 999}),
        ("run/nothing", {"data": []}),
        ("call/nothing", {"data": []}),
        ("queue/join", {"data": [], "fn_index": -1, "session_hash": "x"}),
    ],
    ids=["chat", "too little", "no such number", "no such name", "no such call", "not in line"],
)
def test_what_gradio_can_make_nothing_of_is_answered_with_a_sentence(http, path, body):
    # "Internal Server Error", and a traceback in the log, for a typing error.
    answer = http.post(f"/gradio_api/{path}", json=body)
    assert answer.status_code == 400
    assert "/v1/chat/completions" in answer.json()["error"]["message"]


def test_gradios_own_client_still_asks_and_is_answered(http):
    client = Client(str(http.base_url), verbose=False)
    assert client.predict("Name a colour.", "", 8, 0, 0.9, 50, 1.1, "", api_name="/chat")


def test_headers_without_end_are_not_read(http):
    # 60 MB of them were kept, and slowed everybody.
    with pytest.raises((httpx.TransportError, httpx.HTTPStatusError)):
        http.get("/livez", headers={"X": "x" * 2**22}).raise_for_status()
    assert http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:7860", 200),
        ("127.0.0.1:1234", 200),
        ("[::1]:7860", 200),
        ("192.168.1.7", 200),
        ("rebound.example.com", 421),
        ("localhost.example.com", 421),
        ("2130706433", 421),
        ("[", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_only_names_of_this_server_are_answered(http, host, status):
    # A site whose name its owner lets point here could read and ask as if it were the page (DNS rebinding).
    answer = http.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status
    assert status == 200 or "set ALLOWED_HOSTS" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/gradio_api/queue/join", "/login"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "https://["])
def test_a_page_of_another_site_may_not_send_anything(http, path, origin):
    answer = http.post(path, content=json.dumps({}), headers={"Origin": origin, "Content-Type": "text/plain"})
    assert answer.json()["error"]["code"] == "foreign_origin"
