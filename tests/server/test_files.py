"""Documents over HTTP: two visitors on every route, uploads that are too large, and answers with their sources."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from llama2_chat.documents.library import Library
from llama2_chat.documents.store import Shelf
from llama2_chat.server import files as module
from llama2_chat.server.errors import ApiError
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.metrics import Metrics
from llama2_chat.server.openai_api import api_router
from llama2_chat.server.owners import COOKIE
from llama2_chat.server.security import add_security_middleware
from tests.support.programs import error
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.waiting import until

TEXT = b"The lighthouse of Brenzano was built in 1874. Its keeper was Ottavio Ferrandini."


class Site:
    """A server with documents, and visitors of it."""

    def __init__(self, folder, settings, **more):
        self.library, self.chat = Library(folder), ScriptedChat(say=lambda _: Scripted("In ", "1874 [1]."))
        self.settings = settings = replace(settings, body_limit_mb=1, **more)
        self.app = FastAPI()
        add_security_middleware(self.app, settings)
        self.router = router = api_router(self.chat, settings, ConcurrencyLimiter(0), Metrics(self.chat), self.library)
        self.app.include_router(router)

    def visitor(self, **headers):
        return TestClient(self.app, "http://localhost", headers=headers)


@pytest.fixture
def site(tmp_path, settings):
    site = Site(tmp_path / "documents", settings)
    yield site
    site.library.close()


def uploaded(visitor, content=TEXT, name="report.txt", **fields):
    return visitor.post("/v1/files", files={"file": (name, content)}, data={"purpose": "user_data", **fields})


def read(visitor, content=TEXT, name="report.txt"):
    id = uploaded(visitor, content, name).json()["id"]
    until(lambda: visitor.get(f"/v1/files/{id}").json()["status"] != "uploaded")
    return id


def ask(visitor, *ids, **fields):
    messages = [{"role": "user", "content": "When was the lighthouse built?"}]
    return visitor.post("/v1/chat/completions", json={"messages": messages, "documents": ids, **fields})


@pytest.fixture
def still(monkeypatch):
    monkeypatch.setattr(Library, "_read_later", lambda *_: None)


def test_a_file_is_uploaded_listed_asked_about_and_deleted(site):
    anna = site.visitor()
    id = read(anna)
    (listed,) = anna.get("/v1/files").json()["data"]
    assert listed == anna.get(f"/v1/files/{id}").json()
    assert listed.items() >= {
        "object": "file", "filename": "report.txt", "bytes": len(TEXT), "status": "processed", "pages": 1, "notes": []
    }.items()  # fmt: skip
    assert anna.get(f"/v1/files/{id}/content").content == TEXT
    assert anna.get(f"/v1/files/{id}/pages/1").json()["text"] == TEXT.decode()
    message = ask(anna, id).json()["choices"][0]["message"]
    cited = {"file_id": id, "filename": "report.txt", "page": 1, "quote": TEXT.decode()}
    assert message["annotations"] == [{"type": "file_citation", "index": 1, "file_citation": cited}]
    assert TEXT.decode() in site.chat.asked[-1][0][-1]["content"]
    assert anna.delete(f"/v1/files/{id}").json() == {"id": id, "object": "file", "deleted": True}
    assert anna.get("/v1/files").json()["data"] == []
    assert ask(anna, id).status_code == 404


def test_a_page_of_any_number_is_asked_for_without_an_error_of_the_server(site, still):
    anna = site.visitor()
    id = uploaded(anna).json()["id"]
    for page, status in (("9" * 20, 400), ("-1", 400), ("0", 404), ("1000000", 404)):
        assert anna.get(f"/v1/files/{id}/pages/{page}").status_code == status


def test_a_sender_who_leaves_during_an_upload_is_no_error_of_the_server(site):
    (route,) = [each for each in site.router.routes if each.path == "/v1/files" and "POST" in each.methods]
    headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/files", "query_string": b"", "headers": headers}
    messages = [{"type": "http.request", "body": b"--x\r\n", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    with pytest.raises(ApiError) as raised:
        asyncio.run(route.endpoint(Request(scope | {"client": ("1.2.3.4", 5)}, receive), Response()))
    assert (raised.value.status, raised.value.body["error"]["code"]) == (499, "client_left")


def test_a_stream_ends_with_the_sources(site):
    anna = site.visitor()
    lines = ask(anna, read(anna), stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta["annotations"][0]["index"] for delta in deltas if "annotations" in delta] == [1]
    assert "annotations" in deltas[-1]


def test_two_visitors_never_see_each_others_documents_on_any_route(site, still):
    """Other programs listed everybody's files."""
    anna, bob = site.visitor(), site.visitor()
    mine, theirs = uploaded(anna).json()["id"], uploaded(bob, b"Bob's secret.").json()["id"]
    for visitor, own, others in ((anna, mine, theirs), (bob, theirs, mine), (site.visitor(), None, mine)):
        assert [file["id"] for file in visitor.get("/v1/files").json()["data"]] == ([own] if own else [])
        for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/pages/1"), ("DELETE", "")):
            answer = visitor.request(method, f"/v1/files/{others}{path}")
            assert (answer.status_code, error(answer)["code"]) == (404, "not_found")
        assert ask(visitor, others).status_code == 404
    assert site.chat.asked == []
    assert anna.get(f"/v1/files/{mine}/content").content == TEXT


def test_every_route_of_files_is_tried_by_two_visitors(site):
    routes = {(method, route.path) for route in site.router.routes for method in getattr(route, "methods", None) or ()}
    assert {(method, path) for method, path in routes if "/files" in path} == {
        ("POST", "/v1/files"), ("GET", "/v1/files"), ("GET", "/v1/files/{id}"), ("DELETE", "/v1/files/{id}"),
        ("GET", "/v1/files/{id}/content"), ("GET", "/v1/files/{id}/pages/{page}"),
    }  # fmt: skip


@pytest.mark.parametrize("cookie", ["", "x", "x" * 32 + "/..", "a b"])
def test_a_cookie_that_this_server_did_not_give_owns_nothing_and_is_replaced(site, still, cookie):
    forger, other = site.visitor(cookie=f"{COOKIE}={cookie}"), site.visitor(cookie=f"{COOKIE}={cookie}")
    answer = uploaded(forger)
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=Lax" in answer.headers["set-cookie"]
    assert other.get("/v1/files").json()["data"] == []


def test_with_keys_documents_belong_to_the_key_whatever_the_cookie(tmp_path, settings, still):
    site = Site(tmp_path, settings, api_keys=("one", "two"))
    one, two = (site.visitor(authorization=f"Bearer {key}") for key in ("one", "two"))
    id = uploaded(one).json()["id"]
    two.cookies.update(one.cookies)
    assert two.get(f"/v1/files/{id}").status_code == 404
    assert site.visitor(authorization="bearer  one").get(f"/v1/files/{id}").status_code == 200
    assert uploaded(site.visitor()).status_code == 401


def test_nothing_of_a_request_says_who_owns_a_document(site, still):
    anna, bob = site.visitor(), site.visitor()
    id = uploaded(anna, owner="bob", user="bob").json()["id"]
    assert bob.get("/v1/files", params={"owner": "anna", "user": "anna"}).json()["data"] == []
    assert bob.get(f"/v1/files/{id}", headers={"x-user": "anna", "openai-organization": "anna"}).status_code == 404
    assert bob.get("/v1/files/..%2F..%2Fetc%2Fpasswd").status_code == 404


def test_an_upload_may_be_larger_than_other_requests_and_is_not_read_beyond_its_limit(site, still, monkeypatch):
    anna = site.visitor()
    assert uploaded(anna, b"x" * 2_000_000).status_code == 200  # with BODY_LIMIT_MB=1
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(module, "FORM_BYTES", 1000)
    sent = []

    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        for _ in range(10_000):
            sent.append(100)
            yield b"x" * 100

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answers = [anna.post("/v1/files", content=b"x" * 3000, headers=headers), uploaded(anna, b"y" * 1500)]
    answers.append(anna.post("/v1/files", content=endless(), headers=headers))
    assert [(answer.status_code, error(answer)["code"]) for answer in answers] == [(413, "request_too_large")] * 3
    assert len(anna.get("/v1/files").json()["data"]) == 1


@pytest.mark.parametrize(
    ("send", "param"),
    [
        ({"json": {"file": "x"}}, "file"),
        ({"data": {"purpose": "user_data"}}, "file"),
        ({"files": {"other": ("a.txt", b"x")}}, "file"),
        ({"files": {"file": ("a.txt", b"x")}, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({"content": b"--x broken", "headers": {"content-type": "multipart/form-data; boundary=x"}}, None),
    ],
)
def test_an_upload_without_a_file_or_for_another_purpose_is_refused(site, send, param):
    answer = site.visitor().post("/v1/files", **send)
    assert (answer.status_code, error(answer)["param"]) == (400, param)


def test_what_a_stranger_wrote_is_never_shown_as_a_page_of_this_site(site, still):
    anna = site.visitor()
    id = uploaded(anna, b"<script>alert(1)</script>", "../x.html").json()["id"]
    headers = anna.get(f"/v1/files/{id}/content").headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"] == "attachment; filename*=UTF-8''x.html"
    assert headers["x-content-type-options"] == "nosniff"


def test_openais_library_uploads_waits_lists_and_asks(site):
    with openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=site.visitor()) as client:
        file = client.files.create(file=("report.txt", TEXT), purpose="user_data")
        done = client.files.wait_for_processing(file.id, poll_interval=0.05, max_wait_seconds=30)
        assert (done.status, done.filename) == ("processed", "report.txt")
        assert [each.id for each in client.files.list(purpose="user_data", limit=1)] == [file.id]
        answer = client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": "When was the lighthouse built?"}],
            extra_body={"documents": [file.id]},
        )
        assert answer.choices[0].message.annotations[0].file_citation["page"] == 1
        assert client.files.content(file.id).read() == TEXT
        assert client.files.delete(file.id).deleted


def test_a_server_without_documents_has_no_such_route_and_says_so(tmp_path, settings):
    app, chat = FastAPI(), ScriptedChat()
    app.include_router(api_router(chat, settings, ConcurrencyLimiter(0), Metrics(chat)))
    visitor = TestClient(app)
    assert error(visitor.get("/v1/files"))["code"] == "unknown_url"
    assert error(ask(visitor, "file-1"))["param"] == "documents"


def test_excerpts_leave_room_for_the_tools_of_a_request(site):
    anna = site.visitor()
    id = read(anna, b"\n\n".join(b"The lighthouse was built in 1874. " * 3 for _ in range(200)))
    described = {"name": "look", "description": "word " * 3_900, "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": described}]
    assert "annotations" in ask(anna, id).json()["choices"][0]["message"]
    assert "annotations" not in ask(anna, id, tools=tools, tool_choice="none").json()["choices"][0]["message"]


def test_deletions_of_one_address_go_one_after_another_and_only_so_many_wait(site, still, monkeypatch):
    monkeypatch.setattr(module, "MOST_DELETES", 1)
    site = Site(site.library.folder, site.settings)
    anna = site.visitor()
    first, second = uploaded(anna).json()["id"], uploaded(anna, b"Other.").json()["id"]
    begun, goes_on = threading.Event(), threading.Event()
    delete = Shelf.delete
    monkeypatch.setattr(Shelf, "delete", lambda *args: (begun.set(), goes_on.wait(60), delete(*args)))
    with ThreadPoolExecutor(1) as pool, anna:
        running = pool.submit(anna.delete, f"/v1/files/{first}")
        begun.wait(60)
        refused = anna.delete(f"/v1/files/{second}").status_code
        goes_on.set()
        assert (running.result().status_code, refused) == (200, 429)
