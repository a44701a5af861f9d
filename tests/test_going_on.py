"""Answers that are gone on with: the same text as if nobody had interrupted them."""

import json

import pytest

from llama2_chat.errors import BadGrammar, PromptTooLong
from llama2_chat.types import GrammarSpec, SamplingParams

QUESTION = [{"role": "user", "content": "Write two sentences about the 4 seasons, with an emoji."}]
LENGTH = 18  # tokens, with which the answer is not at its end


def greedy(tokens):
    return SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=tokens)


def read(chat, messages, params, **more):
    with chat.stream_reply(messages, params, **more) as reply:
        return "".join(reply), reply


def unfinished(text):
    return [*QUESTION, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def whole(chat):
    return read(chat, QUESTION, greedy(LENGTH))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "trim"), [(1, True), (2, False), (5, True), (9, False), (13, True), (17, False)])
def test_a_text_that_is_cut_off_and_gone_on_with_is_the_whole_text(chat, whole, cut, trim):
    first, reply = read(chat, QUESTION, greedy(cut))
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("length", cut)
    rest, _ = read(chat, unfinished(first), greedy(LENGTH - cut), trim=trim)
    assert first + rest == whole


@pytest.mark.parametrize("half", ["In a wor", "In a world of endless possibil"])
def test_a_word_is_gone_on_with_in_its_middle_without_a_space(chat, half):
    assert read(chat, unfinished(half), greedy(4))[0][0].isalpha()


def test_the_prompt_counts_the_text_and_the_limit_counts_new_tokens_only(chat, whole):
    rest, reply = read(chat, unfinished(whole), greedy(2))
    assert reply.usage.prompt_tokens == len(chat.encode(unfinished(whole)))
    assert reply.usage.prompt_tokens > len(chat.encode(QUESTION)) + LENGTH - 2
    assert (reply.usage.completion_tokens, reply.usage.dropped_messages) == (2, 0)
    assert reply.timing.time_to_first_token_s > 0
    assert rest


def test_an_empty_text_is_the_question_alone(chat, whole):
    assert read(chat, unfinished(""), greedy(LENGTH))[0] == whole


def test_old_exchanges_make_room_for_the_rest_of_an_answer(chat, whole):
    old = [{"role": "user", "content": "word " * 3000}, {"role": "assistant", "content": "Noted."}] * 3
    with chat.stream_reply([*old, *unfinished(whole)], greedy(4)) as reply:
        assert reply.usage.dropped_messages in (2, 4)
    with pytest.raises(PromptTooLong, match=r"This message and its answer so far are \d,\d\d\d tokens"):
        chat.stream_reply([*old, *unfinished("word " * 8180)], greedy(100))


def test_an_answer_that_has_begun_cannot_be_held_to_a_schema(chat):
    params = SamplingParams(grammar=GrammarSpec("json_schema", json.dumps({"type": "object"})))
    with pytest.raises(BadGrammar, match="has begun"):
        chat.stream_reply(unfinished('{"a'), params)
    with chat.stream_reply(unfinished(""), params) as reply:
        assert next(reply)
