"""Answers from other servers: real engines, our own page behind our own page, and for the rest odd_server.py."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from gradio_client import Client

from llama2_chat.errors import Busy, ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.remote import RemoteModel, faults
from llama2_chat.remote.client import Timeouts
from llama2_chat.remote.remote_model import NO_TOKENS
from llama2_chat.server.metrics import Metrics
from llama2_chat.types import SamplingParams, Usage
from tests.support.odd_server import (
    BARE_HEAD,
    DONE,
    HEAD,
    LAST,
    OddServer,
    event,
    packet,
    reset,
    silence,
    status,
    words,
)
from tests.support.serving import ignore, serving

# Gradio 6.31 uses what pandas 3 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
ROOT = Path(__file__).parents[2]
PARAMS = SamplingParams(max_new_tokens=8)
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
def odd():
    server = OddServer()
    yield server
    server.close()


@pytest.fixture
def other():
    server = OddServer()
    yield server
    server.close()


IMPATIENT = Timeouts(silence_s=1.0, unhealthy_s=0.05, usage_s=0.2)


@contextmanager
def behind(settings, *servers, timeouts=IMPATIENT, **more):
    """The model of these servers."""
    urls = ",".join(getattr(server, "url", server) for server in servers)
    model = RemoteModel(replace(settings, inference_url=urls, **more), timeouts).load()
    try:
        yield model
    finally:
        began = time.monotonic()
        model.close()
        assert time.monotonic() - began < 2


def read(model, messages=HELLO, params=PARAMS, **more):
    """The text, and the reply or what it raised."""
    pieces = []
    try:
        with model.stream_reply(messages, params, **more) as reply:
            pieces.extend(reply)
            return "".join(pieces), reply
    except ChatError as error:
        return "".join(pieces), error


def until(true, within_s=5):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < within_s
        time.sleep(0.005)


# ---- Answers ----


def test_an_answer_comes_in_pieces_with_its_usage_and_its_times(settings, odd):
    with behind(settings, odd) as model:
        text, reply = read(model)
    assert (text, reply.finish_reason, reply.queue_position) == ("Hello!", "stop", 0)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.cached_tokens) == (7, 3, 2)
    assert 0 < reply.timing.time_to_first_token_s < 1
    assert reply.timing.tokens_per_second > 0


def test_an_async_reader_gets_the_same(settings, odd):
    async def read_async(model):
        async with model.stream_reply(HELLO, PARAMS) as reply:
            return [piece async for piece in reply], reply.finish_reason

    odd.answer = [HEAD, event("a"), 0.1, event("b"), 0.1, event(finish="length"), LAST]
    with behind(settings, odd) as model:
        assert asyncio.run(read_async(model)) == (["a", "b"], "length")


def test_the_question_arrives_as_it_was_asked(settings, odd):
    params = SamplingParams(
        max_new_tokens=9, temperature=0.1, top_p=0.2, top_k=3, repetition_penalty=1.4, presence_penalty=0.5,
        frequency_penalty=0.6, seed=2**63 - 1, stop=("x",),
    )  # fmt: skip
    sent = {"temperature": 0.1, "top_p": 0.2, "top_k": 3, "repetition_penalty": 1.4, "presence_penalty": 0.5}
    sent |= {"frequency_penalty": 0.6, "seed": 2**63 - 1, "stop": ["x"], "max_tokens": 9, "stream": True}
    talk = [{"role": "system", "content": "Be  brief."}, *HELLO, {"role": "assistant", "content": " [/INST] "}, *HELLO]
    with behind(settings, odd) as model:
        read(model, talk, params)
        read(model, talk, replace(params, top_k=0, stop=(), seed=None), to_the_end=True)
    first, second = odd.asked
    assert first == {**sent, "messages": talk, "model": "odd", "stream_options": {"include_usage": True}}
    assert second["top_k"] == -1
    assert not {"stop", "seed", "max_tokens"} & second.keys()


def test_a_schema_reaches_the_server_as_openai_writes_it(settings, odd):
    with behind(settings, odd) as model:
        read(model, params=replace(PARAMS, grammar='{"type": "object"}'))
    asked_for = odd.asked[-1]["response_format"]
    assert asked_for["type"] == "json_schema"
    assert asked_for["json_schema"]["schema"] == {"type": "object"}


def test_a_stopped_answers_question_is_joined_to_the_next_one(settings, odd):
    """Chat templates of many models raise on two user messages in a row."""
    with behind(settings, odd) as model:
        read(model, [*HELLO, {"role": "user", "content": "In French."}])
    assert odd.asked[0]["messages"] == [{"role": "user", "content": "Say hello.\n\nIn French."}]


def test_letters_that_end_lines_elsewhere_arrive_whole(settings, odd):
    """httpx2 takes U+2028 and U+0085 for ends of lines, in the middle of the server's JSON."""
    odd.answer = words("a\u2028b\u0085", "\u2029c")
    with behind(settings, odd) as model:
        assert read(model)[0] == "a\u2028b\u0085\u2029c"


def test_half_a_character_from_a_server_is_none_here(settings, odd):
    odd.answer = [HEAD, packet(rb'data: {"choices": [{"delta": {"content": "a\ud83e"}}]}' + b"\n\n"), *words("b")[1:]]
    with behind(settings, odd) as model:
        assert read(model)[0] == "a\ufffdb"


@pytest.mark.parametrize("at_once", [1, 7], ids=["byte by byte", "in sevens"])
def test_a_stream_that_comes_in_crumbs_is_read_all_the_same(settings, odd, at_once):
    whole = b"".join(
        [BARE_HEAD, *(part.split(b"\r\n", 1)[1][:-2] for part in [event("Hé"), event("🦙", "stop"), *DONE])]
    )
    odd.answer = [whole[i : i + at_once] for i in range(0, len(whole), at_once)]
    with behind(settings, odd) as model:
        assert read(model)[0] == "Hé🦙"


def test_only_our_own_key_is_sent_to_a_server(settings, odd, monkeypatch):
    """huggingface_hub would send this machine's token for the Hub to whoever INFERENCE_URL names."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with behind(settings, odd) as model:
        read(model)
        assert "authorization" not in odd.headers
    with behind(settings, odd, inference_key="ours") as model:
        read(model)
        assert odd.headers["authorization"] == "Bearer ours"


def test_a_server_that_redirects_does_not_pass_the_key_on(settings, odd, other):
    odd.probe = [f"HTTP/1.1 307 Go\r\nLocation: {other.url}/v1/chat/completions\r\nContent-Length: 0\r\n\r\n".encode()]
    with behind(settings, odd, inference_key="ours") as model:
        assert model.status.error == faults.NO_API
    assert not other.headers


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_end_where_it_likes(settings, odd, path):
    with behind(settings, odd.url + path) as model:
        assert model.status.model == "odd"
        assert read(model)[0] == "Hello!"


def test_a_scheme_in_capitals_is_still_an_address(settings, odd):
    """huggingface_hub takes what does not begin with http:// for a model's name, and asks huggingface.co."""
    with behind(settings, odd.url.replace("http", "HTTP")) as model:
        assert read(model)[0] == "Hello!"


# ---- Faults ----

ERROR = packet(b'data: {"error": {"message": "CUDA error at /secret", "code": 500}}\n\n')
BEFORE_THE_FIRST_TOKEN = {
    "wrong key": (status(401, {"error": {"message": "no"}}), faults.WRONG_KEY),
    "unknown model": (status(404, {"message": "The model `odd` does not exist."}), faults.NO_SUCH_MODEL),
    "failed": (status(500, "Internal Server Error", "text/plain"), faults.FAILED),
    "still loading": (status(503, {"error": {"message": "loading"}}), faults.STARTING),
    "a page instead of JSON": (status(200, "<html>Welcome</html>", "text/html"), faults.NO_API),
    "JSON instead of a stream": (status(200, {"choices": []}), faults.NO_API),
    "cut before its headers": ([reset], faults.CUT),
    "cut after its headers": ([HEAD, 0.05, reset], faults.CUT),
    "no HTTP at all": ([b"SSH-2.0-OpenSSH_9.6\r\n"], faults.CUT),
    "silent": ([silence], faults.SILENT),
    "silent after its headers": ([HEAD, silence], faults.SILENT),
    "an error in the stream": ([HEAD, ERROR, LAST], faults.FAILED),
    "an empty stream": ([HEAD, LAST], "without giving a reason"),
    "broken JSON": ([HEAD, packet(b'data: {"choices": [\n\n'), LAST], faults.NO_API),
    "JSON of another shape": ([HEAD, packet(b'data: {"choices": [7]}\n\n'), LAST], faults.NO_API),
    "a list": ([HEAD, packet(b"data: []\n\n"), LAST], faults.NO_API),
    "a line without an end": ([HEAD, *[packet(b"x" * 2**17)] * 20], faults.NO_API),
    "an error without an end": ([b"HTTP/1.1 500 No\r\n\r\n", *[b"x" * 2**17] * 20], faults.FAILED),
    "given up": ([HEAD, event(finish="abort"), LAST], "aborted this answer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_TOKEN)
def test_every_fault_before_the_first_token_has_its_sentence_and_another_server_answers(settings, odd, other, fault):
    odd.answer, sentence = BEFORE_THE_FIRST_TOKEN[fault]
    with behind(settings, odd) as model:
        text, error = read(model)
        assert (text, type(error)) == ("", faults.ServerFault)
        assert sentence in str(error)
        assert "secret" not in str(error)
    with behind(settings, odd, other) as model:
        until(lambda: all(server.healthy for server in model.servers))
        assert read(model)[0] == "Hello!"
        assert (len(odd.asked), len(other.asked)) == (2, 1)


AFTER_IT = {
    "cut": ([reset], faults.CUT),
    "silent": ([silence], faults.SILENT),
    "an error in the stream": ([ERROR, LAST], faults.FAILED),
    "without a finish_reason": ([packet(b"data: [DONE]\n\n"), LAST], "without giving a reason"),
    "broken JSON": ([packet(b"data: {]\n\n"), LAST], faults.NO_API),
}


@pytest.mark.parametrize("fault", AFTER_IT)
def test_a_fault_in_mid_answer_keeps_what_was_said_and_nobody_else_is_asked(settings, odd, other, fault):
    steps, sentence = AFTER_IT[fault]
    odd.answer = [HEAD, event("Once upon"), 0.05, *steps]
    with behind(settings, odd, other) as model:
        until(lambda: all(server.healthy for server in model.servers))
        text, error = read(model)
    assert (text, type(error)) == ("Once upon", ModelUnavailable)
    assert sentence in str(error)
    assert "answer above is incomplete" in str(error)
    assert not other.asked


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("http://127.0.0.1:9", faults.REFUSED), ("http://no-such-host.invalid", faults.UNREACHABLE)],
    ids=["refused", "no such host"],
)
def test_a_server_that_is_not_there_is_said_at_once(settings, url, sentence):
    with behind(settings, url) as model:
        assert (model.state, model.status.error) == ("failed", sentence)
        with pytest.raises(ModelUnavailable, match=sentence[:20]):
            model.stream_reply(HELLO, PARAMS)


def test_the_log_says_which_server_and_what_it_said_but_visitors_do_not_read_it(settings, odd, caplog):
    odd.answer = status(500, {"error": "CUDA error at /secret"})
    with behind(settings, odd) as model:
        read(model)
    assert f"{odd.url[7:]}: {faults.FAILED} (HTTP 500: 'CUDA error at /secret')" in caplog.messages


def test_a_whole_answer_stays_whole_when_the_connection_does_not_end_well(settings, odd):
    for ending in ([reset], [silence], [*[packet(b": waiting\n\n"), 0.05] * 40], [packet(b"data:[DONE]\n\n"), LAST]):
        odd.answer = [HEAD, event("All of it.", "stop"), *ending]
        with behind(settings, odd) as model:
            began = time.monotonic()
            text, reply = read(model)
            assert (text, reply.finish_reason, reply.usage.completion_tokens) == ("All of it.", "stop", 1)
            assert time.monotonic() - began < 1


@pytest.mark.parametrize("number", ["many", -1, None, True, 10**400])
def test_numbers_that_are_none_count_as_nothing(settings, odd, number):
    usage = {"prompt_tokens": number, "completion_tokens": number, "prompt_tokens_details": {"cached_tokens": number}}
    odd.answer = [HEAD, event("a"), 0.05, event("b", "stop", usage=usage), LAST]
    with behind(settings, odd) as model:
        text, reply = read(model)
    assert (text, reply.finish_reason, reply.usage) == ("ab", "stop", Usage(completion_tokens=2))
    assert reply.timing.tokens_per_second > 0


def test_what_a_server_refuses_is_said_in_its_words_and_asked_nowhere_else(settings, odd, other):
    odd.answer = status(400, {"error": {"message": "stop may hold 4 strings"}})
    with behind(settings, odd, other) as model:
        until(lambda: all(server.healthy for server in model.servers))
        text, error = read(model)
        assert (text, str(error)) == ("", "The model's server rejects this request: stop may hold 4 strings")
        assert not other.asked
        assert model.servers[0].healthy


def test_a_question_that_is_too_large_for_a_proxy_does_not_take_the_server_away(settings, odd):
    odd.answer = status(413, "<html>Request Entity Too Large</html>", "text/html")
    with behind(settings, odd) as model:
        assert str(read(model)[1]) == "The model's server rejects this request: HTTP 413"
        assert model.state == "ready"


def test_a_full_server_is_no_fault_and_others_are_asked(settings, odd, other):
    odd.answer = status(429, {"error": {"message": "full"}})
    with behind(settings, odd, other) as model:
        until(lambda: all(server.healthy for server in model.servers))
        assert read(model)[0] == "Hello!"
        assert model.servers[0].healthy
        other.answer = odd.answer
        assert isinstance(read(model)[1], Busy)


def test_a_server_without_top_k_is_asked_without_it_and_the_page_says_so(settings, odd):
    refusal = status(422, {"detail": "Unexpected fields in the request: {'top_k', 'repetition_penalty'}"})
    odd.steps, steps = (lambda line, body: refusal if b'"top_k"' in body else steps(line, body)), odd.steps
    with behind(settings, odd) as model:
        assert read(model)[0] == "Hello!"
        assert "Top-k and repetition penalty have no effect" in model.status.why


# ---- Who is well ----


def test_health_is_a_real_completion(settings, odd):
    """A server may list its models, and say that it is well, while its GPU is gone."""
    odd.probe = status(500, {"error": "CUDA"})
    with behind(settings, odd) as model:
        assert (model.state, model.status.error) == ("failed", faults.FAILED)
        odd.probe = words("Hi")
        until(lambda: model.state == "ready")
        assert read(model)[0] == "Hello!"


def test_a_server_that_failed_once_is_asked_at_once_and_others_answer_until_it_is_well(settings, odd, other):
    odd.answer = status(502, "")
    with behind(settings, odd, other) as model:
        until(lambda: all(server.healthy for server in model.servers))
        before, odd.probe = odd.probed, [0.2, *words("Hi")]
        assert [read(model)[0] for _ in range(3)] == ["Hello!"] * 3
        assert len(odd.asked) == 1
        until(lambda: odd.probed > before, within_s=1)
        until(lambda: not model._servers[0].suspect.is_set())
        odd.answer = words("Back.")
        assert read(model)[0] == "Back."


def test_a_question_that_a_server_fails_at_takes_it_away_from_nobody_else(settings, odd):
    """Whoever repeated such a question kept everybody else out for as long as the server took to give a token."""
    odd.probe = [0.5, *words("Hi")]
    odd.answer = lambda question: status(500, "") if question["messages"] == HELLO else words("Well.")
    with behind(settings, odd) as model:
        assert str(read(model)[1]) == faults.FAILED
        assert read(model, [{"role": "user", "content": "How are you?"}])[0] == "Well."


def test_a_failed_server_is_back_when_it_answers_again(settings, odd, other):
    good = odd.probe
    odd.answer = odd.probe = status(500, "")
    with behind(settings, odd, other) as model:
        until(lambda: model.state == "ready" and not model.servers[0].healthy)
        assert "1 of 2 servers cannot answer now" in model.status.why
        assert read(model)[0] == "Hello!"
        assert not odd.asked
        odd.answer, odd.probe = words("Back."), good
        until(lambda: model.servers[0].healthy)
        assert read(model)[0] == "Back."
        assert model.status.device == "2 servers"


def test_the_least_loaded_server_answers_and_the_first_when_nobody_else_asks(settings, odd, other):
    odd.answer = other.answer = [HEAD, event("a"), silence]
    with behind(settings, odd, other) as model:
        until(lambda: all(server.healthy for server in model.servers))
        replies = [model.stream_reply(HELLO, PARAMS) for _ in range(4)]
        for reply in replies:
            next(reply)
        assert (len(odd.asked), len(other.asked)) == (2, 2)
        for reply in replies:
            reply.close()
        until(lambda: not any(server.running for server in model.servers))
        next(model.stream_reply(HELLO, PARAMS))
        assert (len(odd.asked), len(other.asked)) == (3, 2)


def test_an_idle_server_is_asked_now_and_then_and_a_busy_one_is_not(settings, odd):
    odd.answer = [HEAD, *[event("a"), 0.05] * 12, event(finish="stop"), LAST]
    with behind(settings, odd, timeouts=replace(IMPATIENT, idle_s=0.2)) as model:
        before = odd.probed
        read(model)
        assert odd.probed == before
        until(lambda: odd.probed >= before + 2)


def test_without_a_name_the_only_model_is_taken_and_of_several_none(settings, odd):
    with behind(settings, odd) as model:
        assert (model.status.model, model.context_length) == ("odd", 4096)
    odd.models.append({"id": "even"})
    with behind(settings, odd) as model:
        assert "The server has odd, even." in model.status.error
    with behind(settings, odd, inference_model="even") as model:
        assert (model.state, model.context_length) == ("ready", 0)
        read(model)
    assert odd.asked[0]["model"] == "even"
    odd.models = status(500, "")
    with behind(settings, odd) as model:
        assert model.status.error == faults.NO_LIST
    with behind(settings, odd, inference_model="even") as model:
        assert model.state == "ready"


# ---- Too long ----

TOO_LONG = {
    "vLLM": "This model's maximum context length is 4096 tokens. However, you requested {asked} output tokens and your "
    "prompt contains at least {prompt} input tokens, for a total of at least 9999 tokens. Please reduce the length.",
    "vLLM before": "'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length "
    "is 4096 tokens and your request has {prompt} input tokens ({asked} > 4096 - {prompt}).",
    "SGLang": "Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total "
    "of 9999 tokens: {prompt} tokens from the input messages and {asked} tokens for the completion.",
    "llama.cpp": "request ({prompt} tokens) exceeds the available context size (4096 tokens), try increasing it",
    "TGI": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: {prompt} `inputs` "
    "tokens and {asked} `max_new_tokens`",
    "OpenAI": "This model's maximum context length is 4096 tokens. However, you requested 9999 tokens ({prompt} in "
    "the messages, {asked} in the completion). Please reduce the length of the messages or completion.",
    "this project": "This model's maximum context length is 4,096 tokens, prompt and answer together. The prompt is "
    "{prompt:,} tokens, and {asked:,} more are asked for as the answer. Shorten it, or lower max_tokens.",
    "one without numbers": "context_length_exceeded",
}
LONG = [{"role": role, "content": str(i) * 4000} for i in range(10) for role in ("user", "assistant")]


def picky(sentence, characters=4):
    """An answer() with a context of 4,096 tokens of so many characters each."""

    def answer(question):
        prompt = sum(len(message["content"]) for message in question["messages"]) // characters
        asked = question["max_tokens"]
        if prompt + asked <= 4096:
            return words("Hello!")
        return status(400, {"error": {"message": sentence.format(prompt=prompt, asked=asked), "code": 400}})

    return answer


@pytest.mark.parametrize("server", TOO_LONG)
def test_the_oldest_exchanges_are_left_out_when_a_server_says_that_it_is_too_long(settings, odd, server):
    odd.answer = picky(TOO_LONG[server])
    with behind(settings, odd) as model:
        text, reply = read(model, [{"role": "system", "content": "Be brief."}, *LONG, *HELLO])
    assert text == "Hello!"
    kept = odd.asked[-1]["messages"]
    assert kept[0]["role"] == "system"
    assert kept[1:] == [*LONG, *HELLO][-len(kept) + 1 :]
    assert kept[1]["role"] == "user"
    assert reply.usage.dropped_messages == 21 - len(kept[1:])
    if server != "one without numbers":
        assert len(kept) == 6  # two exchanges of 2,000 tokens fit, three do not
        assert len(odd.asked) == 2


@pytest.mark.parametrize("characters", [4, 1], ids=["English", "Chinese"])
def test_a_server_that_stops_counting_where_its_room_ends_is_asked_a_few_times(settings, odd, characters):
    """vLLM reads no more than it can hold, and says "at least"; a long talk in Chinese took hundreds of requests."""
    odd.answer = picky(TOO_LONG["vLLM"].replace("{prompt}", "4089"), characters)
    talk = [{"role": role, "content": "word" * 5} for _ in range(2000) for role in ("user", "assistant")]
    with behind(settings, odd) as model:
        assert read(model, [*talk, *HELLO])[0] == "Hello!"
    assert len(odd.asked) <= 8
    assert len(odd.asked[-1]["messages"]) > 4088 * characters / 20 / 2


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "x" * 20_000}], [*LONG, *HELLO]])
def test_a_conversation_that_cannot_be_shortened_is_refused_with_both_numbers(settings, odd, messages):
    odd.answer = picky(TOO_LONG["vLLM before"])
    with behind(settings, odd) as model:
        _, error = read(model, messages, trim=len(messages) == 1)
        assert isinstance(error, PromptTooLong)
        assert "4,096" in str(error)
        assert f"{sum(len(message['content']) for message in messages) // 4:,}" in str(error)
        assert model.servers[0].healthy


def test_what_turns_out_too_long_in_mid_answer_is_not_asked_again(settings, odd):
    error = packet(b'data: {"error": {"message": "maximum context length is 4096 tokens"}}\n\n')
    odd.answer = [HEAD, event("Once upon"), error, LAST]
    with behind(settings, odd) as model:
        text, problem = read(model, [*LONG, *HELLO])
    assert (text, type(problem), len(odd.asked)) == ("Once upon", PromptTooLong, 1)


def test_a_refusal_that_only_mentions_a_context_length_stays_a_refusal(settings, odd):
    odd.answer = status(400, {"error": {"message": "Choose a context length, or input tokens"}})
    with behind(settings, odd) as model:
        assert "rejects this request: Choose a context length" in str(read(model)[1])
        assert model.servers[0].healthy


def test_an_error_that_repeats_a_long_question_is_read_at_once(settings, odd):
    """Some servers put the body that they refuse into their error; nobody is answered while it is being read."""
    odd.answer = status(400, {"detail": [{"msg": "Not so.", "input": "1" * 500_000}]})
    with behind(settings, odd) as model:
        began = time.monotonic()
        assert str(read(model)[1]) == "The model's server rejects this request: Not so."
        assert time.monotonic() - began < 1


def test_a_conversation_of_very_many_messages_is_shortened_at_once(settings, odd):
    odd.answer = picky(TOO_LONG["OpenAI"])
    talk = [{"role": role, "content": "word"} for _ in range(40_000) for role in ("user", "assistant")]
    with behind(settings, odd) as model:
        began = time.monotonic()
        text, reply = read(model, [*talk, *HELLO])
        assert time.monotonic() - began < 3
    assert (text, 75_000 < reply.usage.dropped_messages < 77_000) == ("Hello!", True)


# ---- Leaving ----


def test_who_stops_waiting_for_a_server_to_accept_closes_the_connection(settings, odd):
    odd.answer = [lambda connection: (silence(connection), odd.left.set())]

    async def wait(model):
        async with asyncio.timeout(0.2), model.stream_reply(HELLO, PARAMS):
            pass

    with behind(settings, odd) as model:
        with pytest.raises(TimeoutError):
            asyncio.run(wait(model))
        assert odd.left.wait(0.5)


@pytest.mark.parametrize("begun", [True, False], ids=["in mid-answer", "before the server accepts"])
def test_closing_a_reply_closes_the_connection_and_wakes_its_reader(settings, odd, begun):
    odd.answer = [HEAD, event("a"), *[event("b"), 0.01] * 500] if begun else [lambda c: (silence(c), odd.left.set())]
    with behind(settings, odd) as model:
        reply = model.stream_reply(HELLO, PARAMS)
        if begun:
            next(reply)
        until(lambda: odd.asked)
        threading.Timer(0.1, reply.close).start()
        with reply:
            list(reply)
        assert reply.finish_reason == "cancelled"
        assert odd.left.wait(0.5)
        until(lambda: not model.servers[0].running)


def test_stopping_the_program_ends_every_answer_with_the_words_it_has(settings, odd):
    odd.answer = [HEAD, event("a"), silence]
    with behind(settings, odd) as model:
        replies = [model.stream_reply(HELLO, PARAMS) for _ in range(3)]
        assert [next(reply) for reply in replies] == ["a"] * 3
        began = time.monotonic()
        model.close()
        assert time.monotonic() - began < 1
        assert [list(reply) for reply in replies] == [[]] * 3
        assert {reply.finish_reason for reply in replies} == {"cancelled"}
        with pytest.raises(ModelUnavailable, match="being stopped"):
            model.stream_reply(HELLO, PARAMS)


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


# ---- The page and the API in front of it ----


@pytest.fixture(scope="module")
def own(chat, settings):
    """Our own server, as the remote of another of ours."""
    with serving(chat, settings) as address, behind(settings, address) as model:
        assert model.state == "ready", model.status.error
        yield model


@pytest.fixture(scope="module")
def own_address(own, settings):
    with serving(own, settings) as address:
        yield address


@pytest.mark.slow
def test_our_own_server_behind_our_own_gives_the_same_answer(own_address, chat):
    params = SamplingParams(temperature=0, max_new_tokens=12)
    with chat.stream_reply(HELLO, params) as reply:
        text = "".join(reply)
    with openai.OpenAI(base_url=f"{own_address}v1", api_key="none", max_retries=0) as client:
        (card,) = client.models.list().data
        assert (card.id, card.max_model_len) == (chat.status.model, chat.context_length)
        fields = {"model": card.id, "messages": HELLO, "temperature": 0, "max_tokens": 12}
        answer = client.chat.completions.create(**fields)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "length")
        assert answer.usage.prompt_tokens == len(chat.encode(HELLO))
        chunks = client.chat.completions.create(**fields, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_a_reader_who_leaves_our_page_frees_the_model_behind_it(own, chat):
    with own.stream_reply(HELLO, SamplingParams(max_new_tokens=3000)) as reply:
        next(reply)
        assert chat.occupancy.running == 1
    until(lambda: not chat.occupancy.running, within_s=1)


def test_what_is_too_long_for_the_server_behind_is_refused_or_trimmed_as_a_program_asks(own_address):
    old = [{"role": "user", "content": "word " * 9000}, {"role": "assistant", "content": "Yes."}]
    body = {"messages": [*old, *HELLO], "max_tokens": 2}
    with httpx.Client(base_url=own_address, timeout=60) as http:
        for stream in (False, True):
            refused = http.post("/v1/chat/completions", json={**body, "stream": stream})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert "8,192" in refused.json()["error"]["message"]
        usage = http.post("/v1/chat/completions", json={**body, "trim": True}).json()["usage"]
    assert usage["dropped_messages"] == 2
    assert usage["prompt_tokens"] < 100


def test_health_and_metrics_tell_of_the_servers_behind(own, own_address):
    with httpx.Client(base_url=own_address) as http:
        health = http.get("/healthz").json()
        assert (health["status"], health["model"], health["device"]) == ("ready", own.status.model, "a server")
        numbers = http.get("/metrics").text
    assert f'chat_server_healthy{{server="{own.servers[0].name}"}} 1.0' in numbers
    assert f'chat_server_requests_running{{server="{own.servers[0].name}"}} 0.0' in numbers


def test_what_only_the_model_itself_could_do_is_refused(settings, odd):
    del odd.models[0]["max_model_len"]
    with behind(settings, odd) as model, serving(model, settings) as address, httpx.Client(base_url=address) as http:
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/completions", {"prompt": [5]}),
                           ("/tokenize", {"messages": HELLO}), ("/tokenize", {"prompt": "a"})):  # fmt: skip
            answer = http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, NO_TOKENS)


def test_servers_that_differ_in_their_paths_alone_are_told_apart(settings):
    """Prometheus takes no sample that is there twice."""
    urls = "http://name:secret@gpus/one/v1,http://gpus:8000/two/,http://gpus:8000/two/v1/chat/completions"
    numbers = Metrics(RemoteModel(replace(settings, inference_url=urls))).text().decode()
    wells = [line for line in numbers.splitlines() if line.startswith("chat_server_healthy")]
    assert wells == ['chat_server_healthy{server="gpus/one"} 0.0', 'chat_server_healthy{server="gpus:8000/two"} 0.0']


def ask(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def test_programs_get_the_status_that_tells_them_what_to_do(settings, odd):
    with behind(settings, odd) as model, serving(model, settings) as address, httpx.Client(base_url=address) as http:
        assert ask(http).json()["choices"][0]["message"]["content"] == "Hello!"
        assert "max_tokens" not in odd.asked[-1]
        odd.answer = status(429, {"error": {"message": "full"}})
        assert (ask(http).status_code, "Retry-After" in ask(http).headers) == (429, True)
        odd.answer = status(400, {"error": {"message": "No."}})
        assert (ask(http).status_code, ask(http, stream=True).status_code) == (400, 400)
        odd.answer = [HEAD, event("a"), reset]
        assert ask(http).json()["error"]["code"] == "generation_failed"
        assert "was lost" in ask(http, stream=True).text.splitlines()[-2]
        odd.answer = odd.probe = status(401, {})
        assert ask(http, stream=True).status_code == 503
        until(lambda: model.state == "failed")
        assert http.get("/healthz").json() == {"status": "failed", "error": faults.WRONG_KEY}
        assert ask(http).json()["error"]["message"] == faults.WRONG_KEY


def test_a_program_that_leaves_before_the_server_accepts_is_not_waited_for(settings, odd):
    odd.answer = [lambda connection: (silence(connection), odd.left.set())]
    with behind(settings, odd) as model, serving(model, settings) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}v1/chat/completions", json={"messages": HELLO}, timeout=0.2)
        assert odd.left.wait(0.5)


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


# ---- Real engines ----


@contextmanager
def transformers_serve(folder, port):
    """Another engine, with the embedded model: `transformers serve`."""
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def free_ports():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


@pytest.mark.slow
def test_two_real_engines_stand_in_for_each_other(settings, free_ports):
    folder = fetch(choose(settings), ignore).base.folder
    urls = [f"http://127.0.0.1:{port}" for port in free_ports]
    params = SamplingParams(temperature=0, max_new_tokens=200)
    with (
        transformers_serve(folder, free_ports[0]) as first,
        transformers_serve(folder, free_ports[1]),
        behind(settings, *urls, inference_model=str(folder)) as model,
    ):
        until(lambda: all(server.healthy for server in model.servers), within_s=120)
        text, reply = read(model, HELLO, replace(params, max_new_tokens=12))
        assert (len(text.split()) > 3, reply.usage.completion_tokens) == (True, 12)
        with model.stream_reply(HELLO, params) as begun:
            next(begun)
            first.kill()
            with pytest.raises(ModelUnavailable, match="answer above is incomplete"):
                list(begun)
        until(lambda: not model.servers[0].healthy)
        assert read(model, HELLO, replace(params, max_new_tokens=12))[0] == text
        assert "1 of 2 servers cannot answer now" in model.status.why
        with transformers_serve(folder, free_ports[0]):
            until(lambda: model.servers[0].healthy, within_s=120)
