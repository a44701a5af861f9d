"""Every way to ask: behind a guard none asks an unsafe question, or shows, tells or logs any of an unsafe answer."""

import logging
from dataclasses import replace
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama2_chat.agent import Calculator
from llama2_chat.guard import GuardedChat
from llama2_chat.page.answering import Answering
from llama2_chat.page.routes import page_router
from llama2_chat.page.visitors import Visitors
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.metrics import Metrics
from llama2_chat.server.openai_api import api_router
from llama2_chat.types import SamplingParams
from tests.support.guards import BAD, GOOD, Completing, guarded
from tests.support.scripted import Scripted

CONTROLS = {"maxNewTokens": 64, "temperature": 0.6, "topP": 0.9, "topK": 50, "repetitionPenalty": 1.1}


def turns(text):
    return [{"role": "user", "content": text}]


def on_page(text, **more):
    return {"messages": turns(text), "settings": CONTROLS | more}


DOORS = {
    "chat": ("POST", "/v1/chat/completions", lambda text: {"messages": turns(text)}),
    "chat, streamed": ("POST", "/v1/chat/completions", lambda text: {"messages": turns(text), "stream": True}),
    "several answers": ("POST", "/v1/chat/completions", lambda text: {"messages": turns(text), "n": 2, "stream": True}),
    "completion": ("POST", "/v1/completions", lambda text: {"prompt": text, "echo": True}),
    "completion, streamed": ("POST", "/v1/completions", lambda text: {"prompt": text, "stream": True}),
    "responses": ("POST", "/v1/responses", lambda text: {"input": text}),
    "responses, streamed": ("POST", "/v1/responses", lambda text: {"input": text, "stream": True}),
    "infill": ("POST", "/infill", lambda text: {"input_prefix": text, "input_suffix": "end"}),
    "page": ("PUT", "/page/answers/{id}", on_page),
    "page, a text": ("PUT", "/page/completions/{id}", lambda text: {"text": text, "settings": CONTROLS}),
    "page, with tools": ("PUT", "/page/answers/{id}", lambda text: on_page(text, useTools=True)),
}


class Site:
    """The API and the page's routes, behind a guard."""

    def __init__(self, http, chat):
        self._http, self.chat = http, chat

    def ask(self, door, text, *answer):
        """What comes back, where the model says the pieces of an answer."""
        method, path, body = DOORS[door]
        self.chat.say, self.chat.asked = lambda _: Scripted(*answer), []
        return self._http.request(method, path.format(id=uuid4().hex), json=body(text)).text


@pytest.fixture(scope="module")
def site(settings):
    app, limiter, chat = FastAPI(), ConcurrencyLimiter(0), Completing()
    with guarded(chat, settings) as behind:
        metrics = Metrics(behind, log_messages=True)
        app.include_router(api_router(behind, settings, limiter, metrics))
        answering, visitors = Answering(behind, limiter, metrics), Visitors(None, has_login=False)
        app.include_router(page_router(answering, limiter, SamplingParams(), visitors, [Calculator()]))
        with TestClient(app, base_url="http://localhost") as http:
            yield Site(http, chat)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "llama2_chat")
    return caplog


@pytest.mark.parametrize("door", DOORS)
def test_an_unsafe_question_never_reaches_the_model(site, log, door):
    said = site.ask(door, BAD, GOOD)
    assert site.chat.asked == []
    assert "judged this message unsafe" in said
    assert "page" in door or "content_filter" in said
    assert '"outcome": "content_filter"' in log.text


@pytest.mark.parametrize("door", DOORS)
def test_of_an_unsafe_answer_nothing_is_shown_told_or_logged(site, log, door):
    said = site.ask(door, GOOD, "secret ", BAD)
    assert "judged the answer unsafe" in said
    assert '"outcome": "content_filter"' in log.text
    for text in (said, log.text):
        assert "secret" not in text
        assert BAD not in text


@pytest.mark.parametrize("door", DOORS)
def test_a_safe_answer_is_shown(site, door):
    assert "a fine thing" in site.ask(door, GOOD, "a fine ", "thing")


def test_a_guard_is_asked_where_the_operator_names_one_and_else_there_is_none(settings):
    from app import make_backend  # with Gradio, which takes seconds to import

    chat = make_backend(replace(settings, guard_url="http://127.0.0.1:9"))
    assert isinstance(chat, GuardedChat)
    assert not isinstance(make_backend(settings), GuardedChat)
