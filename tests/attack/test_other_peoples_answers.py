"""What one visitor has asked nobody else can read, go on with or cancel, though they know every id in it."""

import json
from contextlib import ExitStack
from dataclasses import replace

import httpx
import pytest

from llama2_chat.server import login
from llama2_chat.server.owners import COOKIE
from tests.support.programs import GRADIO_SETTINGS
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import serving

ASKS = ["call/chat", "run/chat", "queue/join"]
SETTINGS = {"maxNewTokens": 8, "temperature": 1, "topP": 1, "topK": 0, "repetitionPenalty": 1}


@pytest.fixture(scope="module")
def chat():
    return ScriptedChat(say=lambda messages: Scripted(f"You said {messages[0]['content']}."))


@pytest.fixture(scope="module")
def addresses(chat, settings, tmp_path_factory):
    """A server without a login, and one with."""
    with pytest.MonkeyPatch.context() as patched, ExitStack() as stack:
        patched.setattr(login, "_fits", lambda hashed, password: hashed == password)
        users = login.Users({"anna": "1", "bert": "1"})
        settings_of_both = (settings, replace(settings, auth_file=tmp_path_factory.mktemp("login") / "users.txt"))
        yield [stack.enter_context(serving(chat, each, users if each.auth_file else None)) for each in settings_of_both]


@pytest.fixture(params=["cookies", "addresses", "logins"])
def two(request, addresses):
    """Two visitors of one server, told apart by one of the three."""
    kind = request.param
    with ExitStack() as stack:
        visitors = []
        for name, source in (("anna", "127.0.0.2"), ("bert", "127.0.0.3")):
            transport = httpx.HTTPTransport(local_address=source if kind == "addresses" else "127.0.0.2")
            http = stack.enter_context(httpx.Client(base_url=addresses[kind == "logins"], transport=transport))
            if kind == "logins":
                assert http.post("/login", data={"username": name, "password": "1"}).status_code == 200
            elif kind == "cookies":
                http.cookies.set(COOKIE, name[0] * 32)
            visitors.append(http)
        yield visitors


def ask(http, path="call/chat", session=None, **fields):
    named = {"session_hash": session} if session else {}
    return http.post(f"/gradio_api/{path}", json={"data": ["a secret", *GRADIO_SETTINGS], **named, **fields})


def test_an_answer_is_read_by_whoever_asked(two):
    anna, bert = two
    id = ask(anna).json()["event_id"]
    assert len(id) == 32
    refused = bert.get(f"/gradio_api/call/chat/{id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert "You said a secret." in anna.get(f"/gradio_api/call/chat/{id}").text


@pytest.mark.parametrize("path", ASKS)
def test_nobody_goes_on_with_a_conversation_of_another(two, path):
    # Under another's session Gradio's own memory of the conversation went into the question.
    anna, bert = two
    session = f"guessed {path} {id(anna)}"
    assert ask(anna, session=session).status_code == 200
    functions = bert.get("/config").json()["dependencies"]
    (index,) = (function["id"] for function in functions if function["api_name"] == "chat")
    memory = [] if path == "call/chat" else [None]  # a place for what Gradio remembers
    body = {"data": ["Why?", *memory, *GRADIO_SETTINGS], "session_hash": session, "fn_index": index}
    assert bert.post(f"/gradio_api/{path}", json=body).status_code == 404
    assert bert.get("/gradio_api/queue/data", params={"session_hash": session}).status_code == 404
    again = json.dumps(body).replace("session_hash", "session\\u005fhash")
    assert bert.post(f"/gradio_api/{path}", content=again).status_code == 404


def test_nobody_cancels_what_another_has_asked(two):
    anna, bert = two
    event = ask(anna, session=f"cancelled {id(anna)}").json()["event_id"]
    for named in ({"event_id": event}, {"session_hash": f"cancelled {id(anna)}"}):
        assert bert.post("/gradio_api/cancel", json={"fn_index": 0, **named}).status_code == 404
    assert bert.post("/gradio_api/reset", json={"event_id": event}).status_code == 404
    assert "You said a secret." in anna.get(f"/gradio_api/call/chat/{event}").text


@pytest.mark.parametrize("two", ["cookies", "logins"], indirect=True)
def test_an_answer_of_the_page_is_its_askers_alone(two):
    anna, bert = two
    id, body = (
        f"{hash(anna) % 2**64:032x}",
        {"messages": [{"role": "user", "content": "a secret"}], "settings": SETTINGS},
    )
    assert "You said a secret." in anna.put(f"/page/answers/{id}", json=body).text
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/confirm")):
        json_of = {"PUT": body, "POST": {"call": 1, "allow": True}}.get(method)
        assert bert.request(method, f"/page/answers/{id}{path}", json=json_of).status_code == 404
    assert "You said a secret." in anna.get(f"/page/answers/{id}").text
