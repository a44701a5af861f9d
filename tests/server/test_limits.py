"""Who may ask, how much, and how many answers at once: keys, addresses, and requests that are slow to read."""

import contextlib
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
from gradio_client import Client

from llama2_chat.server import limits
from tests.support.programs import HELLO, ask, error, freed, one_running_one_waiting, streaming
from tests.support.serving import serving


def test_with_keys_the_api_needs_one_of_them_and_the_page_none(small, settings):
    with (
        serving(small, replace(settings, api_keys=("one", "zwölf"))) as address,
        httpx.Client(base_url=address) as http,
    ):
        for key in (None, "Bearer", "Bearer on", "Bearer one,zwölf", "Basic one"):
            http.headers = {} if key is None else {b"Authorization": key.encode()}
            for answer in (ask(http), http.get("/v1/models"), http.get("/metrics"), http.post("/tokenize")):
                assert (answer.status_code, error(answer)["code"]) == (401, "invalid_api_key"), key
        assert http.get("/").status_code == http.get("/healthz").status_code == 200
        for key in ("one", "zwölf"):
            http.headers = {b"Authorization": f"Bearer {key}".encode()}
            assert ask(http).status_code == 200
        stranger = openai.OpenAI(base_url=f"{address}v1", api_key="two", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_a_full_line_is_429_and_says_when_to_come_back(http, small):
    with one_running_one_waiting(http, small):
        answer = ask(http)
    assert (answer.status_code, error(answer)["code"]) == (429, "rate_limit_exceeded")
    assert int(answer.headers["Retry-After"]) > 0
    freed(small)


@contextlib.contextmanager
def many_requests(address, path, body):
    """More clients than the server has threads, all of whom wait until the end."""

    def ask():
        httpx.post(f"{address}{path}", json=body, timeout=60)

    many = [threading.Thread(target=ask) for _ in range(50)]
    for thread in many:
        thread.start()
    time.sleep(1)
    try:
        yield
    finally:
        for thread in many:
            thread.join()


def check_others_are_served(http):
    """While the many wait: they are let go only after this."""
    assert ask(http).status_code == http.get("/metrics", timeout=60).status_code == 200


@pytest.mark.slow
def test_many_schemas_that_wait_to_be_read_hold_up_nobody_else(http, small, small_address, monkeypatch):
    released, grammars, compile_grammar = threading.Event(), small.serving.grammars, small.serving.grammars.grammar
    monkeypatch.setattr(grammars, "grammar", lambda *args: released.wait(40) and compile_grammar(*args))
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    body = {"messages": HELLO, "max_tokens": 1, "response_format": response_format}
    with many_requests(small_address, "v1/chat/completions", body):
        try:
            check_others_are_served(http)
        finally:
            released.set()
    freed(small)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "fields"), [("v1/chat/completions", {"max_tokens": 1}), ("tokenize", {})])
def test_many_long_texts_hold_up_nobody_else(http, small, small_address, path, fields, monkeypatch):
    long, released, encode = "x" * limits.LONG_TEXT, threading.Event(), small.encode

    def encode_late(messages, tools=None):
        return encode(messages) if messages == HELLO else released.wait(40) and encode(HELLO)

    monkeypatch.setattr(small, "encode", encode_late)
    with many_requests(small_address, path, {"messages": [{"role": "user", "content": long}], **fields}):
        try:
            check_others_are_served(http)
        finally:
            released.set()
    freed(small)


def test_one_client_cannot_take_all_and_others_are_not_its_neighbours(small, settings):
    limited = replace(settings, client_limit=1, trusted_proxies="127.0.0.1")
    with serving(small, limited) as address, httpx.Client(base_url=address, timeout=60) as http:
        http.headers["X-Forwarded-For"] = "192.0.2.1"
        with streaming(http):
            answer = ask(http)
            assert (answer.status_code, error(answer)["code"]) == (429, "rate_limit_exceeded")
            http.headers["X-Forwarded-For"] = "192.0.2.2"
            with streaming(http):
                pass
        freed(small)
        assert ask(http).status_code == 200


def test_a_key_is_one_client_however_it_is_written(small, settings):
    limited = replace(settings, api_keys=("one", "two"), client_limit=1)
    with serving(small, limited) as address, httpx.Client(base_url=address, timeout=60) as http:
        http.headers["Authorization"] = "Bearer one"
        with streaming(http):
            for again in ("Bearer one", "bearer one", "BEARER   one"):
                http.headers["Authorization"] = again
                assert ask(http).status_code == 429, again
            http.headers["Authorization"] = "Bearer two"
            with streaming(http):
                pass
        freed(small)


def test_an_address_that_no_trusted_proxy_vouches_for_is_not_believed(small, settings):
    limited = replace(settings, client_limit=1, trusted_proxies="10.0.0.1")
    with serving(small, limited) as address, httpx.Client(base_url=address, timeout=60) as http:
        with streaming(http):
            http.headers["X-Forwarded-For"] = "192.0.2.2"
            assert ask(http).status_code == 429
        freed(small)


@pytest.mark.slow
def test_the_limit_holds_on_the_page_too(small, settings):
    with serving(small, replace(settings, client_limit=1)) as address, httpx.Client(base_url=address) as http:
        page = Client(address, verbose=False)
        with streaming(http), pytest.raises(Exception, match="no more are allowed"):
            page.predict("Hello", api_name="/chat")
        freed(small)
