"""One answer from a server to its reader: pieces, usage, times, halves of characters, and leaving early."""

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.errors import ModelUnavailable
from llama2_chat.remote.reply import RemoteReply
from llama2_chat.text import valid_unicode
from llama2_chat.types import Usage
from tests.support.odd_server import HEAD, LAST, event, reset, silence, words
from tests.support.remote import HELLO, PARAMS, behind, read
from tests.support.waiting import until


def say_when_left(odd):
    """A step in which the server sends nothing, and notes that its reader went away."""
    return lambda connection: (silence(connection), odd.left.set())


async def read_async(model):
    async with model.stream_reply(HELLO, PARAMS) as reply:
        return [piece async for piece in reply], reply.finish_reason


def test_an_answer_arrives_in_pieces_with_its_usage_and_its_times(settings, odd):
    with behind(settings, odd) as model:
        began = time.perf_counter()
        text, reply = read(model)
        seconds = time.perf_counter() - began
    assert (text, reply.finish_reason, reply.queue_position) == ("Hello!", "stop", 0)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.cached_tokens) == (7, 3, 2)
    assert 0 < reply.timing.time_to_first_token_s < seconds
    assert reply.timing.tokens_per_second > 0


def test_an_async_reader_gets_the_same(settings, odd):
    odd.answer = words("a", "b", finish="length")
    with behind(settings, odd) as model:
        pieces, finish_reason = asyncio.run(read_async(model))
    assert ("".join(pieces), finish_reason) == ("ab", "length")


@pytest.mark.parametrize("number", ["many", -1, None, True, 10**400])
def test_a_usage_that_is_not_a_number_counts_as_nothing(settings, odd, number):
    usage = {"prompt_tokens": number, "completion_tokens": number, "prompt_tokens_details": {"cached_tokens": number}}
    odd.answer = [HEAD, event("a"), 0.05, event("b", "stop", usage=usage), LAST]
    with behind(settings, odd) as model:
        text, reply = read(model)
    assert (text, reply.finish_reason, reply.usage) == ("ab", "stop", Usage(completion_tokens=2))
    assert reply.timing.tokens_per_second > 0


# ---- Halves of characters, which JSON can hold and UTF-8 cannot ----

HALVES = {
    "a pair in one piece": (["a\ud83d\ude00b"], "a😀b"),
    "a pair in two pieces": (["a\ud83d", "\ude00b"], "a😀b"),
    "a pair in two pieces of their own": (["a", "\ud83d", "\ude00", "b"], "a😀b"),
    "a first half alone": (["a\ud83e", "b"], "a\ufffdb"),
    "a second half alone": (["a", "\ude00b"], "a\ufffdb"),
    "a first half at the end": (["a\ud83e"], "a\ufffd"),
    "a first half before a pair": (["\ud83e", "\ud83d", "\ude00"], "\ufffd😀"),
}


@pytest.mark.parametrize("kind", HALVES)
def test_halves_of_an_emoji_are_put_together_and_a_lone_half_is_replaced(settings, odd, kind):
    """A server that streams by UTF-16 units cut emoji in two, and both halves were shown as question marks."""
    pieces, text = HALVES[kind]
    odd.answer = [HEAD, *(event(piece, ascii=True) for piece in pieces), event(finish="stop"), LAST]
    with behind(settings, odd) as model:
        assert read(model)[0] == text
        assert "".join(asyncio.run(read_async(model))[0]) == text


def test_half_an_emoji_before_a_cut_is_replaced_too(settings, odd):
    odd.answer = [HEAD, event("a\ud83d", ascii=True), 0.05, reset]
    with behind(settings, odd) as model:
        text, error = read(model)
    assert (text, type(error)) == ("a\ufffd", ModelUnavailable)


@given(st.lists(st.sampled_from(["\ud83d", "\ud83e", "\ude00", "\udd99", "a", "é", "😀"])), st.data())
def test_the_pieces_join_to_valid_unicode_wherever_the_text_is_cut(characters, data):
    text = "".join(characters)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    reply = RemoteReply()
    reply.accept()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        if start < end:
            reply._put_text(text[start:end])
    reply.end("stop")
    pieces = list(reply)
    assert "".join(pieces) == valid_unicode(text)
    assert all(pieces)


# ---- Leaving ----


def test_whoever_stops_waiting_for_a_server_to_accept_closes_the_connection(settings, odd):
    odd.answer = [say_when_left(odd)]

    async def wait(model):
        async with asyncio.timeout(0.2), model.stream_reply(HELLO, PARAMS):
            pass

    with behind(settings, odd) as model:
        with pytest.raises(TimeoutError):
            asyncio.run(wait(model))
        assert odd.left.wait(20)


@pytest.mark.parametrize("begun", [True, False], ids=["in mid-answer", "before the server accepts"])
def test_closing_a_reply_closes_the_connection_and_wakes_its_reader(settings, odd, begun):
    odd.answer = [HEAD, event("a"), *[event("b"), 0.01] * 5000] if begun else [say_when_left(odd)]
    with behind(settings, odd) as model:
        reply = model.stream_reply(HELLO, PARAMS)
        if begun:
            next(reply)
        until(lambda: odd.requests)
        threading.Timer(0.1, reply.close).start()
        with reply:
            list(reply)
        assert reply.finish_reason == "cancelled"
        assert odd.left.wait(20)
        until(lambda: not model.servers[0].running)


def test_an_async_reader_that_waits_for_text_is_woken_by_close(settings, odd):
    odd.answer = [HEAD, event("a"), silence]

    async def read_until_closed(model):
        async with model.stream_reply(HELLO, PARAMS) as reply:
            assert await anext(reply) == "a"
            threading.Timer(0.05, reply.close).start()
            return [piece async for piece in reply], reply.finish_reason

    with behind(settings, odd) as model:
        assert asyncio.run(read_until_closed(model)) == ([], "cancelled")


def test_a_reply_that_is_closed_at_once_ends_without_a_word(settings, odd):
    with behind(settings, odd) as model:
        for _ in range(20):
            reply = model.stream_reply(HELLO, PARAMS)
            reply.close()
            reply.close()
            assert (list(reply), reply.finish_reason) == ([], "cancelled")
        until(lambda: not model.servers[0].running)


def test_no_thread_waits_for_a_reader(settings, odd):
    odd.answer = [HEAD, silence]

    async def wait_for_all(replies):
        async with asyncio.timeout(0.3):
            await asyncio.gather(*map(anext, replies))

    with behind(settings, odd) as model:
        before = {thread.name for thread in threading.enumerate() if "serve" not in thread.name}
        replies = [model.stream_reply(HELLO, PARAMS) for _ in range(40)]
        with pytest.raises(TimeoutError):
            asyncio.run(wait_for_all(replies))
        ours = {thread.name for thread in threading.enumerate() if "serve" not in thread.name}
        assert ours == before
        for reply in replies:
            reply.close()
