"""Logprobs of a server's answer: asked as OpenAI has them, and read with the text that they belong to."""

import json
from dataclasses import replace

import pytest

from llama2_chat.remote.faults import NO_API, NO_LOGPROBS
from tests.support.odd_server import DONE, HEAD, LAST, event, packet
from tests.support.remote import HELLO, PARAMS, behind, read


def chunk(text, *tokens):
    """A piece of text with its tokens: of each its text, its logprob and, if the server sends them, its bytes."""
    names, top = ("token", "logprob", "bytes"), [{"token": "x", "logprob": -2}] * 3
    content = [dict(zip(names, token, strict=False)) | {"top_logprobs": top} for token in tokens]
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, "logprobs": {"content": content}}
    return packet(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())


def test_they_are_asked_of_the_server_and_come_with_their_text(settings, odd):
    said = [chunk("Hi", ("Hi", -0.25, [72, 105])), chunk(" you", (" ", -1), ("you", -0.5))]
    odd.answer = [HEAD, *said, event(finish="stop"), *DONE, LAST]
    with behind(settings, odd) as model, model.stream_reply(HELLO, replace(PARAMS, logprobs=2)) as reply:
        assert next(reply) == "Hi"
        (token,) = reply.logprobs
        assert token.chosen == ("Hi", b"Hi", -0.25)
        assert token.top == (("x", b"x", -2),) * 2
        assert list(reply) == [" you"]
        assert [token.chosen for token in reply.logprobs[1:]] == [(" ", b" ", -1), ("you", b"you", -0.5)]
        assert [token.offset for token in reply.logprobs] == [0, 2, 3]
    asked = odd.requests[0]
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 2)


def test_they_are_not_asked_for_nobody(settings, odd):
    with behind(settings, odd) as model:
        reply = read(model)[1]
    assert not {"logprobs", "top_logprobs"} & odd.requests[0].keys()
    assert reply.logprobs == []


def test_a_server_that_gives_none_though_asked_has_not_answered(settings, odd):
    with behind(settings, odd) as model:
        text, problem = read(model, params=replace(PARAMS, logprobs=0))
    assert (text, str(problem)) == ("", NO_LOGPROBS)


@pytest.mark.parametrize("token", [("Hi", "much"), ("Hi", -1, [300]), (None, -1)], ids=["words", "no byte", "no text"])
def test_what_is_no_logprob_is_no_answer(settings, odd, token):
    odd.answer = [HEAD, chunk("Hi", token), event(finish="stop"), *DONE, LAST]
    with behind(settings, odd) as model:
        assert NO_API in str(read(model, params=replace(PARAMS, logprobs=0))[1])
