"""All that can go wrong with a server: a sentence for visitors, details for the log, and another server."""

import time
from dataclasses import replace

import pytest

from llama2_chat.errors import Busy, ModelUnavailable, PromptTooLong
from llama2_chat.remote import faults
from llama2_chat.remote.faults import read_too_long
from tests.support.odd_server import HEAD, LAST, event, packet, reset, silence, status
from tests.support.remote import HELLO, OFTEN, PARAMS, behind, read, wait_until_healthy

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
    "an empty stream": ([HEAD, LAST], faults.NO_REASON),
    "broken JSON": ([HEAD, packet(b'data: {"choices": [\n\n'), LAST], faults.NO_API),
    "JSON of another shape": ([HEAD, packet(b'data: {"choices": [7]}\n\n'), LAST], faults.NO_API),
    "a list": ([HEAD, packet(b"data: []\n\n"), LAST], faults.NO_API),
    "a line without an end": ([HEAD, *[packet(b"x" * 2**17)] * 20], faults.NO_API),
    "an error without an end": ([b"HTTP/1.1 500 No\r\n\r\n", *[b"x" * 2**17] * 20], faults.FAILED),
    "aborted": ([HEAD, event(finish="abort"), LAST], faults.ABORTED),
}  # fmt: skip
AFTER_IT = {
    "cut": ([reset], faults.CUT),
    "silent": ([silence], faults.SILENT),
    "an error in the stream": ([ERROR, LAST], faults.FAILED),
    "without a finish_reason": ([packet(b"data: [DONE]\n\n"), LAST], faults.NO_REASON),
    "broken JSON": ([packet(b"data: {]\n\n"), LAST], faults.NO_API),
}


def names(faults):
    """Of them all; those that wait for a silent server take seconds."""
    return [pytest.param(name, marks=pytest.mark.slow) if "silent" in name else name for name in faults]


def timeouts(fault):
    """Two seconds for the silent, and for no other: this machine may be busy."""
    return replace(OFTEN, silence_s=2) if "silent" in fault else OFTEN


@pytest.mark.parametrize("fault", names(BEFORE_THE_FIRST_TOKEN))
def test_a_fault_before_the_first_token_has_its_sentence_and_another_server_answers(settings, odd, other, fault):
    odd.answer, sentence = BEFORE_THE_FIRST_TOKEN[fault]
    with behind(settings, odd, other, timeouts=timeouts(fault)) as model:
        wait_until_healthy(model)
        assert read(model)[0] == "Hello!"
        assert (len(odd.requests), len(other.requests)) == (1, 1)
    with behind(settings, odd, timeouts=timeouts(fault)) as model:
        text, error = read(model)
    assert (text, type(error), str(error)) == ("", faults.ServerFault, sentence)


@pytest.mark.parametrize("fault", names(AFTER_IT))
def test_a_fault_in_mid_answer_keeps_the_text_so_far_and_no_other_server_is_asked(settings, odd, other, fault):
    steps, sentence = AFTER_IT[fault]
    odd.answer = [HEAD, event("Once upon"), 0.05, *steps]
    with behind(settings, odd, other, timeouts=timeouts(fault)) as model:
        wait_until_healthy(model)
        text, error = read(model)
    assert (text, type(error), str(error)) == ("Once upon", ModelUnavailable, f"{sentence} {faults.INCOMPLETE}")
    assert not other.requests


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("http://127.0.0.1:9", faults.REFUSED), ("http://no-such-host.invalid", faults.UNREACHABLE)],
    ids=["refused", "no such host"],
)
def test_a_server_that_is_not_there_is_reported_before_anybody_asks(settings, url, sentence):
    with behind(settings, url) as model:
        assert (model.state, model.status.error) == ("failed", sentence)
        with pytest.raises(ModelUnavailable, match=sentence[:20]):
            model.stream_reply(HELLO, PARAMS)


def test_the_log_names_the_server_and_has_its_words_but_visitors_read_neither(settings, odd, caplog):
    odd.answer = status(500, {"error": "CUDA error at /secret"})
    with behind(settings, odd) as model:
        assert str(read(model)[1]) == faults.FAILED
    assert f"{odd.url[7:]}: {faults.FAILED} (HTTP 500: 'CUDA error at /secret')" in caplog.messages


# ---- What is the question's fault, and nobody's ----


def test_a_rejection_is_passed_on_in_the_servers_words_and_no_other_server_is_asked(settings, odd, other):
    odd.answer = status(400, {"error": {"message": "stop may hold 4 strings"}})
    with behind(settings, odd, other) as model:
        wait_until_healthy(model)
        text, error = read(model)
        assert (text, str(error)) == ("", "The model's server rejects this request: stop may hold 4 strings")
        assert not other.requests
        assert model.servers[0].healthy


def test_a_question_that_is_too_large_for_a_proxy_does_not_take_the_server_away(settings, odd):
    odd.answer = status(413, "<html>Request Entity Too Large</html>", "text/html")
    with behind(settings, odd) as model:
        assert str(read(model)[1]) == "The model's server rejects this request: HTTP 413"
        assert model.state == "ready"


def test_a_full_server_is_no_fault_and_others_are_asked(settings, odd, other):
    odd.answer = status(429, {"error": {"message": "full"}})
    with behind(settings, odd, other) as model:
        wait_until_healthy(model)
        assert read(model)[0] == "Hello!"
        assert model.servers[0].healthy
        other.answer = odd.answer
        assert isinstance(read(model)[1], Busy)


def test_a_rejection_that_only_mentions_a_context_length_stays_a_rejection(settings, odd):
    odd.answer = status(400, {"error": {"message": "Choose a context length, or input tokens"}})
    with behind(settings, odd) as model:
        assert "rejects this request: Choose a context length" in str(read(model)[1])
        assert model.servers[0].healthy


def test_an_error_that_repeats_a_long_question_is_read_at_once(settings, odd):
    """Some servers put the body that they reject into their error; nobody is answered while it is being read."""
    odd.answer = status(400, {"detail": [{"msg": "Not so.", "input": "1" * 500_000}]})
    with behind(settings, odd) as model:
        began = time.monotonic()
        assert str(read(model)[1]) == "The model's server rejects this request: Not so."
        assert time.monotonic() - began < 10


BEFORE = {"system_tokens": 3000, "has_examples": True}


@pytest.mark.parametrize(
    "more",
    [{}, {"max_new_tokens": 1024}, {"subject": "message"}, {"system_tokens": 3000}, BEFORE],
    ids=["a conversation", "with the answer", "a message", "mostly a system prompt", "mostly examples"],
)
def test_this_projects_own_sentences_are_read_back(more):
    found = read_too_long(str(PromptTooLong(5000, 4096, **more)))
    assert (found.prompt_tokens, found.context_length) == (5000, 4096)
