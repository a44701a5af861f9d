"""Megabytes that cannot fit are refused unread, whichever door they come through."""

import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from llama2_chat.prompt.codec import codec_of
from tests.support.programs import GRADIO_SETTINGS
from tests.support.serving import serving
from tests.support.waiting import until

MEGABYTES = "word " * 1_800_000
QUESTION = {"messages": [{"role": "user", "content": MEGABYTES}]}


@pytest.fixture(scope="module")
def http(chat, settings):
    with serving(chat, settings) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http


@pytest.fixture
def unread(chat, monkeypatch):
    """A tokenizer that nobody may ask for anything long."""
    codec = codec_of(chat.serving.tokenizer)
    encode_batch = codec.tokenizer.encode_batch

    class Tokenizer:
        def __getattr__(self, name):
            return getattr(original, name)

        def encode_batch(self, texts, **options):
            assert sum(map(len, texts)) < 100_000
            return encode_batch(texts, **options)

    original = codec.tokenizer
    monkeypatch.setattr(codec, "tokenizer", Tokenizer())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", QUESTION),
        ("/v1/completions", {"prompt": MEGABYTES}),
        ("/tokenize", {"prompt": MEGABYTES}),
        ("/tokenize", QUESTION),
    ],
    ids=["chat", "completion", "tokenize a text", "tokenize a chat"],
)
def test_the_api_refuses_megabytes_unread(http, unread, path, body):
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    "text", [MEGABYTES, f"a{' ' * 9_000_000}b", "\U0001f9ff" * 2_000_000], ids=["words", "spaces", "beads"]
)
def test_gradios_api_refuses_megabytes_unread(http, unread, text):
    # Four of them took 5 GB, and everybody else waited.
    event_id = http.post("/gradio_api/call/chat", json={"data": [text, *GRADIO_SETTINGS]}).json()["event_id"]
    assert "maximum context length" in http.get(f"/gradio_api/call/chat/{event_id}").text


def test_an_old_megabyte_is_left_out_unread(chat, unread):
    history = [{"role": "user", "content": MEGABYTES}, {"role": "assistant", "content": "Well."}]
    params = chat.settings.sampling
    with chat.stream_reply([*history, {"role": "user", "content": "Hi"}], params) as reply:
        assert reply.usage.dropped_messages == 2


@pytest.mark.parametrize("text", ["", "word", "a b", "日本語" * 50, "é" * 99, "e\u0301" * 99, "\n" * 99, "=" * 999])
def test_no_text_has_fewer_tokens_than_is_said_unread(chat, llama2_tokenizer, text):
    for tokenizer in (chat.serving.tokenizer, llama2_tokenizer):
        codec = codec_of(tokenizer)
        assert codec.at_least(text * 50) <= codec.count(text * 50)


@pytest.mark.slow
def test_forty_long_messages_leave_no_memory_behind(settings, tmp_path):
    command = [sys.executable, "app.py", "--port", "0", "--body-limit-mb", "10"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(line for line in server.stderr if "The page is at" in line).split()[-1]
            next(line for line in server.stderr if "is ready in" in line)
            with httpx.Client(base_url=address, timeout=120) as http:
                send(http, "Name a colour.")
                memory = psutil.Process(server.pid).memory_info
                before = memory().rss
                for _ in range(40):
                    send(http, MEGABYTES)
                send(http, "Name a colour.")
                until(lambda: memory().rss - before < 120e6)  # it is given back some seconds later
        finally:
            server.terminate()


def send(http, text):
    event_id = http.post("/gradio_api/call/chat", json={"data": [text, *GRADIO_SETTINGS]}).json()["event_id"]
    return http.get(f"/gradio_api/call/chat/{event_id}").text
