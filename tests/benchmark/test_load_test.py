"""What users see of a tiny model, and the sums made of it."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama2_chat.benchmark.load_test import (
    batching_gain,
    first_token_s,
    gap_figures,
    submit,
    throughput,
    throughput_by_users,
)
from llama2_chat.benchmark.local_model import every_reply, fresh_ids, time_full_answers
from llama2_chat.benchmark.soak import SoakState
from llama2_chat.loading.load import Loaded
from model import ChatModel
from tests.support.small_chat_model import save_chat_model


@pytest.fixture(scope="module")
def timed_chat(settings, tmp_path_factory):
    folder = save_chat_model(tmp_path_factory.mktemp("timed"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    chat = ChatModel(settings).serve(tokenizer, Loaded(model, ""))
    time_full_answers(chat)
    yield chat
    chat.close()


def test_every_answer_has_its_full_length_and_knows_when_each_token_came(timed_chat):
    reply = submit(timed_chat, fresh_ids(timed_chat, 8), 20)
    list(reply)
    assert len(reply.times) == reply.usage.completion_tokens == 20
    assert reply.submitted < reply.times[0]
    assert len(reply.gaps_s()) == 19
    assert len(reply.gaps_s(since=reply.times[9])) == 10


def test_users_who_arrive_together_are_measured(timed_chat):
    figures = throughput(timed_chat, users=3, prompt_tokens=8, answer_tokens=16)
    assert figures["time to first token, worst, s"] >= figures["time to first token, median, s"] > 0
    assert figures["longest gap, ms"] >= figures["p99 gap, ms"] > 0
    assert first_token_s(timed_chat, fresh_ids(timed_chat, 8)) > 0
    rows = list(throughput_by_users(timed_chat, (1, 2), prompt_tokens=8, answer_tokens=4))
    assert [next(iter(row)) for row in rows] == ["1 user, tokens/s", "2 users, tokens/s"]


def test_many_users_are_measured_beside_as_many_one_after_another(timed_chat):
    figures = batching_gain(timed_chat, users=2, prompt_tokens=8, answer_tokens=8)
    assert {"1 user, tokens/s", "2 users, tokens/s", "2 users, together / one after another"} <= figures.keys()


def test_replies_that_others_request_are_recorded_for_a_while(timed_chat):
    with every_reply(timed_chat) as replies:
        expected = [submit(timed_chat, fresh_ids(timed_chat, 8), 4) for _ in range(2)]
        for reply in expected:
            list(reply)
    assert replies == expected
    list(submit(timed_chat, fresh_ids(timed_chat, 8), 4))
    assert len(replies) == 2


def test_the_p99_gap_leaves_out_the_longest_of_a_hundred():
    figures = gap_figures([0.001] * 99 + [1.0])
    assert figures == {"longest gap, ms": 1000, "p99 gap, ms": 1}


def test_resident_memory_at_a_minute_is_the_median_of_the_samples_before_it():
    state = SoakState(minutes=10, samples=[(minute, (100 + minute) * 1_000_000, 1, 1) for minute in range(10)])
    assert state.resident_mb(6) == 104
    assert not state.is_over
