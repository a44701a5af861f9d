"""Context windows smaller and larger than Llama 2's, at the defaults of page, API and Python."""

from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

from llama2_chat.errors import PromptTooLong
from llama2_chat.settings import Settings
from llama2_chat.types import SamplingParams
from model import ChatModel
from tests.support.rote_model import rote_model
from tests.support.serving import serving
from tests.support.small_tokenizer import CHATML, llama_shaped, with_template
from tests.support.templates import turns

DEFAULTS = SamplingParams(temperature=0, repetition_penalty=1)
QUESTION = turns("Hello")


@contextmanager
def chat_with_window(tokens):
    tokenizer = with_template(llama_shaped(more_tokens=("<|im_start|>", "<|im_end|>")), CHATML)
    said = tokenizer("Hello<|im_end|>", add_special_tokens=False)["input_ids"]
    (after,) = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    loaded = rote_model(tokenizer, said, after)
    loaded.model.config.max_position_embeddings = tokens
    chat = ChatModel(Settings()).serve(tokenizer, loaded)
    try:
        yield chat
    finally:
        chat.close()


@pytest.fixture(scope="module")
def small():
    with chat_with_window(512) as chat:
        yield chat


def test_a_window_smaller_than_the_longest_answer_takes_a_message_at_the_defaults(small):
    """Every message was refused: 1,024 tokens were to be left for the answer."""
    with small.stream_reply(QUESTION, DEFAULTS) as reply:
        assert "".join(reply).startswith("Hello")


def test_a_text_is_gone_on_with_at_the_defaults_too(small):
    with small.stream_completion(small.encode_text("Hello"), DEFAULTS) as reply:
        list(reply)
    assert reply.finish_reason in ("stop", "length")


def test_a_conversation_is_shortened_to_half_of_a_small_window(small):
    old = turns(*["Hello"] * 201)
    with small.stream_reply(old, DEFAULTS) as reply:
        assert reply.usage.dropped_messages > 0
        assert reply.usage.prompt_tokens <= 256


def test_an_answer_that_was_asked_for_by_name_is_not_made_shorter(small):
    with pytest.raises(PromptTooLong, match="600 more are requested"):
        small.stream_reply(QUESTION, replace(DEFAULTS, max_new_tokens=600), trim=False)


def test_a_length_that_was_asked_for_counts_as_asked_for_whatever_the_default_is(small):
    # 1,024 is the default, and was taken for it: the answer was silently shorter.
    with pytest.raises(PromptTooLong, match="1,024 more are requested"):
        small.stream_reply(QUESTION, replace(DEFAULTS, max_new_tokens=1024), trim=False)
    with pytest.raises(PromptTooLong, match="1,024 more are requested"):
        small.stream_completion(small.encode_text("Hello"), replace(DEFAULTS, max_new_tokens=1024))
    with serving(small, Settings()) as address, httpx.Client(base_url=address, timeout=60) as http:
        answer = http.post("v1/chat/completions", json={"messages": QUESTION, "max_tokens": 1024})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        answer = http.post("v1/completions", json={"prompt": "Hello", "max_tokens": 1024})
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_api_answers_in_a_small_window_without_max_tokens(small):
    with serving(small, Settings()) as address, httpx.Client(base_url=address, timeout=60) as http:
        for trim in (False, True):
            answer = http.post("v1/chat/completions", json={"messages": QUESTION, "temperature": 0, "trim": trim})
            assert answer.status_code == 200, answer.text


def test_an_answer_may_be_longer_than_4096_tokens_where_it_fits():
    with chat_with_window(16_384) as chat:
        with chat.stream_reply(QUESTION, replace(DEFAULTS, max_new_tokens=12_000), trim=False) as reply:
            assert "".join(reply).startswith("Hello")
        with pytest.raises(PromptTooLong):
            chat.stream_reply(QUESTION, replace(DEFAULTS, max_new_tokens=16_384), trim=False)
