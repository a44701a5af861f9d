"""The promise of ChatBackend, kept by servers: which of them is asked, and how all of it ends."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from gradio_client import Client

from llama2_chat import ROOT
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.remote.health import Health
from llama2_chat.remote.remote_model import NO_TOKENS
from tests.support.odd_server import HEAD, event, silence
from tests.support.remote import HELLO, PARAMS, behind, read, wait_until_healthy
from tests.support.waiting import until


def test_the_least_loaded_server_answers_and_the_first_when_nobody_else_asks(settings, odd, other):
    odd.answer = other.answer = [HEAD, event("a"), silence]
    with behind(settings, odd, other) as model:
        wait_until_healthy(model)
        replies = [model.stream_reply(HELLO, PARAMS) for _ in range(4)]
        for reply in replies:
            next(reply)
        assert (len(odd.requests), len(other.requests)) == (2, 2)
        assert [server.running for server in model.servers] == [2, 2]
        for reply in replies:
            reply.close()
        until(lambda: not any(server.running for server in model.servers))
        next(model.stream_reply(HELLO, PARAMS))
        assert (len(odd.requests), len(other.requests)) == (3, 2)


def test_a_server_that_is_named_answers_alone(settings, odd, other):
    odd.answer = other.answer = [HEAD, event("a"), event("", "stop")]
    with behind(settings, odd, other) as model:
        wait_until_healthy(model)
        named = replace(PARAMS, server=model.servers[1].name)
        assert [read(model, params=named)[0] for _ in range(3)] == ["a"] * 3
        assert (len(odd.requests), len(other.requests)) == (0, 3)
        other.answer = [b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"]
        text, error = read(model, params=named)
        assert (text, len(odd.requests)) == ("", 0)
        assert isinstance(error, ChatError)
        with pytest.raises(ChatError, match="There is no server 'elsewhere' here"):
            model.stream_reply(HELLO, replace(PARAMS, server="elsewhere"))


def test_what_takes_tokens_is_refused_in_a_sentence(settings, odd):
    with behind(settings, odd) as model:
        assert not model.capabilities.supports_token_ids
        for refused in (
            lambda: model.encode(HELLO),
            lambda: model.encode_text("a"),
            lambda: model.stream_completion([1], PARAMS),
        ):
            with pytest.raises(ChatError, match=NO_TOKENS):
                refused()


def test_close_ends_every_answer_after_the_text_that_it_has(settings, odd):
    odd.answer = [HEAD, event("a"), silence]
    with behind(settings, odd) as model:
        replies = [model.stream_reply(HELLO, PARAMS) for _ in range(3)]
        assert [next(reply) for reply in replies] == ["a"] * 3
        model.close(timeout_s=60)
        assert [list(reply) for reply in replies] == [[]] * 3
        assert {reply.finish_reason for reply in replies} == {"cancelled"}
        with pytest.raises(ModelUnavailable, match="being stopped"):
            model.stream_reply(HELLO, PARAMS)


def test_an_answer_that_is_asked_for_at_the_last_moment_ends_as_cancelled(settings, odd, monkeypatch):
    """One that had not taken its first step when the event loop ended left its reader waiting for ever."""
    watch, replies = Health.watch, []

    async def watch_and_ask(health):
        try:
            await watch(health)
        finally:
            replies.append(model.stream_reply(HELLO, PARAMS))

    monkeypatch.setattr(Health, "watch", watch_and_ask)
    with behind(settings, odd) as model:
        pass
    (reply,) = replies
    assert (list(reply), reply.finish_reason) == ([], "cancelled")


@pytest.mark.slow
def test_a_page_whose_model_is_elsewhere_starts_without_pytorch(odd, tmp_path):
    """Neither PyTorch nor transformers needs to be installed there; deploy/compose.yaml builds such a page."""
    for name in ("torch", "transformers", "accelerate", "bitsandbytes", "peft", "safetensors", "gguf"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not in the image')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "INFERENCE_URL": odd.url, "PORT": "0"}
    page = subprocess.Popen([sys.executable, ROOT / "app.py"], env=env, stderr=subprocess.PIPE, text=True)
    try:
        address = next(line for line in page.stderr if "The page is at" in line).split()[-1]
        assert "answers with odd" in next(page.stderr)
        assert Client(address, verbose=False).predict("Hello", api_name="/chat") == "Hello!"
    finally:
        page.terminate()
        page.communicate()
