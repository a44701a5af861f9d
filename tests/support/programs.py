"""Programs that ask the API: questions, requests and streams, and how a test waits for what they cause."""

import contextlib
import json
import socket
import time
from dataclasses import replace
from urllib.parse import urlsplit

from llama2_chat.types import SamplingParams
from tests.support.waiting import until

LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1)
HELLO = [{"role": "user", "content": "Say hello."}]
# What Gradio's API takes of /chat after the message, in its order: the settings on the page, with short answers.
GRADIO_SETTINGS = ["", 8, 0.0, 0.9, 50, 1.1, "", False, 5]
TALK = [*HELLO, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "And in French?"}]


def whole_reply(chat, messages, **params):
    with chat.stream_reply(messages, replace(LIKELIEST, **params)) as reply:
        return "".join(reply)


def ask(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, **fields})


def error(answer):
    return answer.json()["error"]


@contextlib.contextmanager
def streaming(http, **fields):
    """The lines of an answer that goes on for long, once its first event is here."""
    long = {"messages": HELLO, "max_tokens": 3000, "stream": True, **fields}
    with http.stream("POST", "/v1/chat/completions", json=long) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


@contextlib.contextmanager
def raw(address, **fields):
    """A bare socket that has sent its question."""
    body = json.dumps({"messages": HELLO, "max_tokens": 3500, **fields})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        yield connection


@contextlib.contextmanager
def one_running_one_waiting(http, chat):
    """Two long answers of a model that gives one at a time; the lines of the one that waits."""
    with streaming(http):
        until(lambda: chat.occupancy.running)
        with streaming(http) as lines:
            yield lines


def freed(chat, within_s=60):
    """Return once nobody runs and nobody waits."""
    deadline = time.monotonic() + within_s
    while chat.occupancy.running or chat.occupancy.waiting:
        assert time.monotonic() < deadline, chat.occupancy
        time.sleep(0.002)
