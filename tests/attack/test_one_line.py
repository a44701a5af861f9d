"""Jobs in Gradio's queue to which nobody listens must hold up nobody who does."""

import asyncio

import httpx
import pytest

from llama2_chat.page import answering
from tests.support.programs import GRADIO_SETTINGS
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import serving
from tests.support.waiting import until


class Endless(Scripted):
    """An answer that goes on until somebody closes it."""

    def __init__(self, running):
        super().__init__()
        self.running = running
        running.append(self)

    async def __anext__(self):
        await asyncio.sleep(0.01)
        return "word "

    async def __aexit__(self, *exc):
        self.running.remove(self)


class EndlessChat(ScriptedChat):
    def __init__(self):
        super().__init__()
        self.running = []

    def stream_reply(self, messages, params, *, trim=True, to_the_end=False):
        if messages[-1]["content"] == "Hi":
            return Scripted("Hello!")
        return Endless(self.running)


@pytest.fixture
def endless():
    return EndlessChat()


@pytest.fixture
def http(endless, settings):
    with serving(endless, settings) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http


def ask(http, text):
    return http.post("/gradio_api/call/chat", json={"data": [text, *GRADIO_SETTINGS]}).json()["event_id"]


def test_a_visitor_is_answered_beside_any_number_of_jobs_to_which_nobody_listens(http, endless):
    # Behind 40 of them a visitor waited unseen, in no line that the page knew of.
    for _ in range(45):
        ask(http, "Tell me a long story.")
    until(lambda: len(endless.running) == 45)
    assert "Hello!" in http.get(f"/gradio_api/call/chat/{ask(http, 'Hi')}").text


def test_whoever_does_not_listen_loses_the_answer_within_seconds(http, endless, monkeypatch):
    monkeypatch.setattr(answering, "UNREAD_S", 0.2)
    monkeypatch.setattr(answering, "UNREAD_WAITING_S", 0.2)
    ask(http, "Tell me a long story.")
    until(lambda: endless.running)
    until(lambda: not endless.running)


@pytest.mark.slow
def test_whoever_listens_keeps_it(http, endless, monkeypatch):
    monkeypatch.setattr(answering, "UNREAD_S", 0.2)
    monkeypatch.setattr(answering, "UNREAD_WAITING_S", 0.2)
    with http.stream("GET", f"/gradio_api/call/chat/{ask(http, 'Tell me a long story.')}") as answer:
        words = 0
        for line in answer.iter_lines():
            words = max(words, line.count("word "))
            if words > 60:  # after 0.6 s and more
                break
        assert endless.running
    until(lambda: not endless.running)
