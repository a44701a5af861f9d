"""What GET /metrics and the log tell of each request, and what they keep to themselves."""

import json
import logging
from dataclasses import replace

import httpx
import pytest
from gradio_client import Client

from tests.support.programs import TALK, ask, freed, one_running_one_waiting
from tests.support.serving import serving
from tests.support.waiting import until


def number(http, name):
    lines = [line.split(" ") for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(value) for _, value in lines)


def test_metrics_count_requests_tokens_times_and_errors(small, settings):
    with serving(small, settings) as address, httpx.Client(base_url=address, timeout=60) as http:
        usage = ask(http, max_tokens=3, messages=TALK).json()["usage"]
        ask(http, suffix="no")
        ask(http, max_tokens=2, stream=True)
        assert number(http, 'chat_requests_total{outcome="length",route="/v1/chat/completions"}') == 2
        assert number(http, 'chat_errors_total{code="unsupported_parameter"}') == 1
        assert number(http, "chat_completion_tokens_total") == 5
        assert number(http, "chat_prompt_tokens_total") > usage["prompt_tokens"]
        assert number(http, "chat_time_to_first_token_seconds_count") == 2
        assert number(http, "chat_tokens_per_second_count") == 2
        assert number(http, "chat_ready") == 1


def test_metrics_tell_what_goes_on_right_now(http, small):
    with one_running_one_waiting(http, small):
        assert (number(http, "chat_requests_running"), number(http, "chat_requests_waiting")) == (1, 1)
        assert 0 < number(http, "chat_kv_cache_used_tokens") < number(http, "chat_kv_cache_capacity_tokens")
    freed(small)


def test_questions_from_the_page_are_counted_too(small, settings):
    with serving(small, settings) as address, httpx.Client(base_url=address) as http:
        Client(address, verbose=False).predict("Hello", "", 3, api_name="/chat")
        assert number(http, 'chat_requests_total{outcome="length",route="page"}') == 1
        with pytest.raises(Exception, match="type a message"):
            Client(address, verbose=False).predict(" ", api_name="/chat")
        assert number(http, 'chat_errors_total{code="invalid_value"}') == 1


@pytest.mark.parametrize("word_for_word", [False, True])
def test_the_log_has_a_line_for_each_request_and_words_only_if_asked(small, settings, caplog, word_for_word):
    caplog.set_level(logging.INFO, "llama2_chat")
    secret = [{"role": "user", "content": "sesame\nstreet"}]
    with (
        serving(small, replace(settings, log_messages=word_for_word)) as address,
        httpx.Client(base_url=address) as http,
    ):
        answers = [ask(http, messages=secret, stream=stream, temperature=0) for stream in (False, True)]
        until(lambda: len(caplog.messages) == 2)
    assert [answer.status_code for answer in answers] == [200, 200]
    lines = [json.loads(line) for line in caplog.messages]
    assert [line["outcome"] for line in lines] == ["length", "length"]
    assert all(line["completion_tokens"] == 2 and line["seconds"] > 0 for line in lines)
    assert ("sesame" in caplog.text) is word_for_word
    if word_for_word:
        assert lines[0]["answer"] == lines[1]["answer"] != ""
