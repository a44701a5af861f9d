"""Answers that end before their time: readers leave, the model fails, the server stops; and signs of life meanwhile."""

import asyncio
import json
import threading

import anyio
import openai
import pytest
from fastapi import Request

from llama2_chat.errors import ChatError
from llama2_chat.server import responses
from llama2_chat.server.errors import ApiError
from tests.support.programs import HELLO, ask, error, freed, one_running_one_waiting, raw, streaming
from tests.support.waiting import until


@pytest.fixture
def replies(small, monkeypatch):
    """The replies that the small model has been asked for."""
    replies, stream_reply = [], small.stream_reply

    def record(*args, **options):
        replies.append(stream_reply(*args, **options))
        return replies[-1]

    monkeypatch.setattr(small, "stream_reply", record)
    return replies


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_leaves_frees_the_model(small_address, small, stream, replies):
    with raw(small_address, stream=stream) as connection:
        if stream:
            connection.recv(1000)
        until(lambda: small.occupancy.running)
    freed(small)
    assert replies[0].finish_reason == "cancelled"


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_leaves_while_it_waits_leaves_the_line(http, small_address, small, stream):
    with streaming(http):
        with raw(small_address, stream=stream):
            until(lambda: small.occupancy.waiting)
        until(lambda: not small.occupancy.waiting)
        assert small.occupancy.running
    freed(small)


class Encoding:
    """A question that takes a thread until `finish` is set, and the reply that comes of it."""

    def __init__(self):
        self.begun, self.finish, self.closed = threading.Event(), threading.Event(), threading.Event()

    def start(self):
        self.begun.set()
        assert self.finish.wait(60)
        return self

    def close(self):
        self.closed.set()


def test_a_question_whose_reader_has_gone_is_not_encoded_any_more():
    async def ask():
        one_at_a_time, first, second = anyio.CapacityLimiter(1), Encoding(), Encoding()
        reading = asyncio.ensure_future(responses.submit(first.start, one_at_a_time))
        await asyncio.to_thread(first.begun.wait, 60)
        leaving = asyncio.ensure_future(responses.submit(second.start, one_at_a_time))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        first.finish.set()
        assert await reading is first
        third = Encoding()
        third.finish.set()
        assert await responses.submit(third.start, one_at_a_time) is third  # the second's turn is over
        return second.begun.is_set()

    assert not asyncio.run(ask())


def test_a_question_that_was_being_encoded_when_its_reader_left_is_closed_and_not_waited_for():
    async def ask():
        encoding = Encoding()

        async def receive():
            await asyncio.to_thread(encoding.begun.wait, 60)
            return {"type": "http.disconnect"}

        with pytest.raises(ApiError, match="The reader left"):
            await responses.submit_for(Request({"type": "http"}, receive), encoding.start, None)
        encoding.finish.set()
        await asyncio.to_thread(encoding.closed.wait, 60)
        return encoding.closed.is_set()

    assert asyncio.run(ask())


def test_a_stream_begins_while_it_waits_in_line_and_shows_signs_of_life(http, small, monkeypatch):
    monkeypatch.setattr(responses, "HEARTBEAT_S", 0.05)
    with one_running_one_waiting(http, small) as lines:
        assert [line for line in (next(lines) for _ in range(5)) if line] == [": waiting", ": waiting"]


def test_the_official_client_reads_over_signs_of_life(small_address, monkeypatch):
    monkeypatch.setattr(responses, "HEARTBEAT_S", 0.0001)
    with openai.OpenAI(base_url=f"{small_address}v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="small", messages=HELLO, max_tokens=5, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


class FailingReply:
    """A piece, then an error, as when the GPU fails in the middle of an answer."""

    def __init__(self, reply):
        self.reply, self.pieces = reply, iter(["Well, "])

    def __getattr__(self, name):
        return getattr(self.reply, name)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        self.reply.close()

    def __aiter__(self):
        return self

    async def __anext__(self):
        for piece in self.pieces:
            return piece
        raise ChatError("The GPU ran out of memory.")


@pytest.fixture
def failing(small, monkeypatch):
    stream_reply = small.stream_reply
    monkeypatch.setattr(small, "stream_reply", lambda *args, **options: FailingReply(stream_reply(*args, **options)))


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(http, failing):
    *_, piece, last = [line for line in ask(http, stream=True).text.splitlines() if line]
    assert "Well, " in piece
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ("The GPU ran out of memory.", "server_error")


def test_the_official_client_raises_what_a_stream_ends_with(small_address, failing):
    with openai.OpenAI(base_url=f"{small_address}v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="small", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="ran out of memory"):
            list(stream)


def test_an_error_before_the_whole_answer_is_500_with_its_sentence(http, failing):
    answer = ask(http)
    assert (answer.status_code, error(answer)["message"]) == (500, "The GPU ran out of memory.")


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_an_answer_that_the_server_ends_says_so(http, small, stream, replies):
    def stop():  # what ChatModel.close() does to every reply
        until(lambda: replies and small.occupancy.running)
        replies[0].close()

    thread = threading.Thread(target=stop)
    thread.start()
    answer = ask(http, max_tokens=3000, stream=stream)
    thread.join()
    assert "The server is being stopped" in answer.text
    assert "[DONE]" not in answer.text
    assert answer.status_code == (200 if stream else 503)
