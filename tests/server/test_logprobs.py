"""Logprobs as OpenAI writes them: beside chats with the bytes of each token, beside texts with where it begins."""

import math

import pytest

from llama2_chat.server.logprobs import text_logprobs
from llama2_chat.types import Candidate, TokenLogprob
from tests.support.programs import HELLO, ask, error


@pytest.fixture(scope="module")
def fields(chat):
    return {"model": chat.status.model, "max_tokens": 6}


def test_a_chat_tells_how_likely_each_token_was_and_what_else_could_have_stood_there(client, fields):
    choice = client.chat.completions.create(**fields, messages=HELLO, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == choice.message.content
    for token in tokens:
        assert token.logprob == token.top_logprobs[0].logprob  # the likeliest is taken
        assert token.token == token.top_logprobs[0].token
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1


def test_a_stream_tells_the_same_and_each_piece_its_own(client, fields):
    fields = {**fields, "messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 5, "temperature": 1}
    whole = client.chat.completions.create(**fields)
    found = {0: [], 1: []}
    for chunk in client.chat.completions.create(**fields, stream=True):
        (choice,) = chunk.choices
        tokens = choice.logprobs.content if choice.logprobs else []
        assert bytes(byte for token in tokens for byte in token.bytes).decode() == (choice.delta.content or "")
        found[choice.index] += tokens
    assert found == {choice.index: choice.logprobs.content for choice in whole.choices}


@pytest.mark.parametrize("echo", [False, True], ids=["answer", "with its prompt"])
def test_a_text_tells_where_each_token_begins(client, fields, echo):
    fields = {**fields, "prompt": "The capital of France is 😱", "echo": echo}
    choice = client.completions.create(**fields, logprobs=0).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) > 1
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token) or token.startswith("bytes:")
    told = slice(1 if echo else 0, None)  # the first token of a prompt has nothing before it
    assert [list(top) for top in logprobs.top_logprobs[told]] == [[token] for token in logprobs.tokens[told]]
    if echo:
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        assert logprobs.tokens[:3] == ["The", " capital", " of"]
    chunks = client.completions.create(**fields, logprobs=0, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for piece in pieces if piece for token in piece.tokens] == logprobs.tokens
    assert [offset for piece in pieces if piece for offset in piece.text_offset] == logprobs.text_offset


def test_the_token_that_was_chosen_is_told_though_it_is_none_of_the_likeliest():
    top = Candidate("a", b"a", -0.5), Candidate("b", b"b", -1.5)
    tokens = [TokenLogprob(Candidate("c", b"c", -9.0), top, 3), TokenLogprob(top[1], top, 4)]
    assert text_logprobs(tokens, 10) == {
        "tokens": ["c", "b"],
        "token_logprobs": [-9.0, -1.5],
        "top_logprobs": [{"a": -0.5, "b": -1.5, "c": -9.0}, {"a": -0.5, "b": -1.5}],
        "text_offset": [13, 14],
    }


def test_the_tokens_of_a_prompt_that_its_text_does_not_show_begin_where_it_begins():
    tokens = [TokenLogprob(Candidate(name, name.encode(), None), (), at) for name, at in (("<s>", -9), (" Hello", -6))]
    tokens.append(TokenLogprob(Candidate("!", b"!", -1.0), (), 0))
    assert text_logprobs(tokens, offset=5)["text_offset"] == [0, 0, 5]


def test_who_asks_for_none_gets_none(http):
    assert ask(http).json()["choices"][0]["logprobs"] is None
    assert ask(http, logprobs=False, top_logprobs=0).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"logprobs": 3}, "logprobs"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"logprobs": True}, "logprobs"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(http, path, asked, param):
    question = {"messages": HELLO} if "chat" in path else {"prompt": "a"}
    answer = http.post(f"/v1/{path}", json={**question, **asked})
    assert (answer.status_code, error(answer)["param"]) == (400, param)
