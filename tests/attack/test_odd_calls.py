"""Odd calls of Gradio's functions and of the page's own end with a sentence, and not with a traceback in the log."""

import itertools
import json

import httpx
import pytest

from tests.support.programs import GRADIO_SETTINGS
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving

GOOD = {"data": ["Hi", *GRADIO_SETTINGS], "session_hash": "odd", "fn_index": 0}
ODD = [None, True, -1, 1e308, 2**70, "", "\ud800", [], [None], {}, [[[]]], ["Hi"] * 40, {"path": "x"}]
ODDEST = [None, 1e308, "\ud800", [None], {}]
PATHS = ["run/chat", "run/predict", "run/1", "call/chat", "call/reply", "queue/join", "cancel", "reset"]
NAMES = ["data", "fn_index", "session_hash", "event_id", "trigger_id", "event_data", "batched", "request"]
BODIES = [*map(json.dumps, ODD), *(json.dumps({**GOOD, name: odd}) for name, odd in itertools.product(NAMES, ODD))]
BROKEN = ["{", "", "\0", "[" * 100_000, '{"data":' * 500]

CONTROLS = {"maxNewTokens": 8, "temperature": 1, "topP": 1, "topK": 0, "repetitionPenalty": 1}
STEP = {"name": "calculator", "input": "{}", "result": "1"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}]
QUESTION = {"messages": TURNS, "settings": {**CONTROLS, "useTools": True}}
PAGES = {
    "answers": ("PUT", "/page/answers/{id:032x}", QUESTION),
    "fit": ("POST", "/page/fit", QUESTION),
    "completions": ("PUT", "/page/completions/{id:032x}", {"text": "Once", "settings": CONTROLS}),
    "confirm": ("POST", "/page/answers/{id:032x}/confirm", {"call": 1, "allow": True}),
}


def odd_bodies(good):
    """The same with something odd at each place."""
    for odd in ODDEST:
        yield json.dumps(odd)
        for name in (*good, "unknown"):
            yield json.dumps({**good, name: odd})
        for name in (*good.get("settings", ()), "seed", "toolsMemory"):
            yield json.dumps({**good, "settings": {**good.get("settings", {}), name: odd}})
    for odd, name in itertools.product(ODDEST if "messages" in good else (), ("role", "content", "steps", *STEP)):
        answer = {**TURNS[1], **({"steps": [{**STEP, name: odd}]} if name in STEP else {name: odd})}
        yield json.dumps({**good, "messages": [TURNS[0], answer, TURNS[2]]})


@pytest.fixture(scope="module")
def http(settings):
    with serving(ScriptedChat(), settings) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http


@pytest.fixture
def unbroken(capfd, caplog):
    """Nothing has failed by the end of the test."""
    yield
    assert "Traceback" not in capfd.readouterr().err
    assert "failed" not in caplog.text


def is_well(answer):
    return answer.status_code == 200 or (400 <= answer.status_code < 500 and answer.json()["error"]["message"])


@pytest.mark.parametrize("path", PATHS)
def test_no_odd_call_fails_inside(http, unbroken, path):
    # 350 of 672 did.
    for body in (*BODIES, *BROKEN):
        assert is_well(http.post(f"/gradio_api/{path}", content=body)), body


@pytest.mark.parametrize("name", PAGES)
def test_no_odd_call_of_the_page_fails_inside(http, unbroken, name):
    method, path, good = PAGES[name]
    for id, body in enumerate((*odd_bodies(good), *BROKEN)):
        answer = http.request(method, path.format(id=id), content=body, headers={"Content-Type": "application/json"})
        assert is_well(answer), body


@pytest.mark.parametrize("path", ["page/answers", "page/files", "static", "assets", "svelte"])
@pytest.mark.parametrize("id", ["a" * 5_000, "%00", "%ff", "..%2f..%2fetc%2fpasswd", "%F0%9F%98%80"])
def test_no_odd_name_fails_inside(http, unbroken, path, id):
    # "Internal Server Error", and a traceback, for a file's name that is too long.
    assert 400 <= http.get(f"/{path}/{id}").status_code < 500


@pytest.mark.parametrize("path", ["queue/data?session_hash=nobody", "queue/data?session_hash=%00", "call/chat/none"])
def test_what_nobody_asked_cannot_be_read(http, unbroken, path):
    # The connection broke, and the log had a traceback.
    assert http.get(f"/gradio_api/{path}").status_code == 404
