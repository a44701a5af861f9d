"""Odd calls of Gradio's functions end with a sentence, and not with a traceback in the log."""

import itertools
import json

import httpx
import pytest

from tests.support.programs import GRADIO_SETTINGS
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving

GOOD = {"data": ["Hi", *GRADIO_SETTINGS], "session_hash": "odd", "fn_index": 0}
ODD = [None, True, -1, 1e308, 2**70, "", "\ud800", [], [None], {}, [[[]]], ["Hi"] * 40, {"path": "x"}]
PATHS = ["run/chat", "run/predict", "run/1", "call/chat", "call/reply", "queue/join", "cancel", "reset"]
NAMES = ["data", "fn_index", "session_hash", "event_id", "trigger_id", "event_data", "batched", "request"]
BODIES = [*map(json.dumps, ODD), *(json.dumps({**GOOD, name: odd}) for name, odd in itertools.product(NAMES, ODD))]


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
    for body in (*BODIES, "{", "", "\0", "[" * 100_000, '{"data":' * 500):
        assert is_well(http.post(f"/gradio_api/{path}", content=body)), body


@pytest.mark.parametrize("path", ["queue/data?session_hash=nobody", "queue/data?session_hash=%00", "call/chat/none"])
def test_what_nobody_asked_cannot_be_read(http, unbroken, path):
    # The connection broke, and the log had a traceback.
    assert http.get(f"/gradio_api/{path}").status_code == 404
