"""What a server is asked, and what is left out when it says that a conversation is too long."""

import time
from dataclasses import replace

import pytest

from llama2_chat.errors import BadGrammar, ChatError, PromptTooLong
from llama2_chat.remote.question import IF_ASKED
from llama2_chat.types import RANGES, Fit, GrammarSpec, SamplingParams
from tests.support.odd_server import HEAD, LAST, event, packet, status, words
from tests.support.remote import HELLO, PARAMS, behind, read


def test_all_settings_are_in_the_request(settings, odd):
    numbers = {
        name: high for name, (_, high) in RANGES.items() if name not in ("max_new_tokens", "logprobs", *IF_ASKED)
    }
    params = SamplingParams(**numbers, max_new_tokens=9, stop=("x",))
    sent = {**numbers, "stop": ["x"], "max_tokens": 9, "stream": True}
    talk = [{"role": "system", "content": "Be  brief."}, *HELLO, {"role": "assistant", "content": " [/INST] "}, *HELLO]
    with behind(settings, odd) as model:
        read(model, talk, params)
        read(model, talk, replace(params, top_k=0, stop=(), seed=None), to_the_end=True)
    first, second = odd.requests
    assert first == {**sent, "messages": talk, "model": "odd", "stream_options": {"include_usage": True}}
    assert second["top_k"] == -1
    assert not {"stop", "seed", "max_tokens"} & second.keys()


def test_what_few_servers_know_is_sent_to_them_if_it_is_asked_for(settings, odd):
    asked = {"min_p": 0.1, "min_tokens": 3, "ignore_eos": True, "stop_token_ids": (5, 6), "logit_bias": {7: -100}}
    with behind(settings, odd) as model:
        read(model, params=replace(PARAMS, **asked))
    sent = asked | {"stop_token_ids": [5, 6], "logit_bias": {"7": -100}}
    assert {name: odd.requests[-1].get(name) for name in IF_ASKED} == sent


def test_a_schema_reaches_the_server_as_openai_writes_it(settings, odd):
    with behind(settings, odd) as model:
        read(model, params=replace(PARAMS, grammar=GrammarSpec("json_schema", '{"type": "object"}')))
    response_format = odd.requests[-1]["response_format"]
    assert response_format["type"] == "json_schema"
    assert response_format["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    "grammar", [GrammarSpec("regex", "[0-9]+"), GrammarSpec("lark", 'start: "a"')], ids=["regex", "lark"]
)
def test_a_grammar_that_no_server_is_known_to_take_is_refused_before_it_is_asked(settings, odd, grammar):
    with behind(settings, odd) as model, pytest.raises(BadGrammar, match="JSON schemas only"):
        model.stream_reply(HELLO, replace(PARAMS, grammar=grammar))
    assert not odd.requests


def test_a_stopped_answers_question_is_joined_to_the_next_one(settings, odd):
    """Chat templates of many models raise on two user messages in a row."""
    with behind(settings, odd) as model:
        read(model, [*HELLO, {"role": "user", "content": "In French."}])
    assert odd.requests[0]["messages"] == [{"role": "user", "content": "Say hello.\n\nIn French."}]


def test_a_greeting_and_a_late_system_message_reach_the_server_in_its_order(settings, odd):
    greeting, late = {"role": "assistant", "content": "Hi!"}, {"role": "system", "content": "In French."}
    with behind(settings, odd) as model:
        read(model, [greeting, late, *HELLO])
    assert odd.requests[0]["messages"] == [late, greeting, *HELLO]


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
    "one without numbers": "context_length_exceeded",
}
LONG = [{"role": role, "content": str(i) * 4000} for i in range(10) for role in ("user", "assistant")]


def in_its_words(server, prompt, asked):
    if server == "this project":
        return str(PromptTooLong(prompt, 4096, asked))
    return TOO_LONG[server].format(prompt=prompt, asked=asked)


def picky(server, characters=4, counts_up_to=10**6):
    """An answer() with a context of 4,096 tokens of so many characters each."""

    def answer(question):
        prompt = sum(len(message["content"]) for message in question["messages"]) // characters
        asked = question["max_tokens"]
        if prompt + asked <= 4096:
            return words("Hello!")
        message = in_its_words(server, min(prompt, counts_up_to), asked)
        return status(400, {"error": {"message": message, "code": 400}})

    return answer


@pytest.mark.parametrize("server", [*TOO_LONG, "this project"])
def test_the_oldest_exchanges_are_left_out_when_a_server_says_that_it_is_too_long(settings, odd, server):
    odd.answer = picky(server)
    with behind(settings, odd) as model:
        text, reply = read(model, [{"role": "system", "content": "Be brief."}, *LONG, *HELLO])
    assert text == "Hello!"
    kept = odd.requests[-1]["messages"]
    assert kept[0]["role"] == "system"
    assert kept[1:] == [*LONG, *HELLO][-len(kept) + 1 :]
    assert kept[1]["role"] == "user"
    assert reply.usage.dropped_messages == 21 - len(kept[1:])
    if server != "one without numbers":
        assert len(kept) == 6  # two exchanges of 2,000 tokens fit, three do not
        assert len(odd.requests) == 2


@pytest.mark.parametrize("counts_up_to", [10**6, 4089])
def test_what_is_counted_beforehand_is_what_an_answer_leaves_out(settings, odd, counts_up_to):
    odd.answer = picky("vLLM", counts_up_to=counts_up_to)
    odd.count = lambda messages: sum(len(message["content"]) for message in messages) // 4
    with behind(settings, odd) as model:
        assert model.capabilities.counts_tokens
        assert model.fit(HELLO, PARAMS) == Fit(2, 0, 4094, 4096)
        fit = model.fit([*LONG, *HELLO], PARAMS)
        assert (fit.prompt_tokens, fit.fits) == (4002, True)
        assert read(model, [*LONG, *HELLO])[1].usage.dropped_messages == fit.dropped_messages == 16
        assert not model.fit([{"role": "user", "content": "x" * 20_000}], PARAMS).fits


def test_a_server_without_a_count_answers_all_the_same(settings, odd):
    with behind(settings, odd) as model:
        assert not model.capabilities.counts_tokens
        with pytest.raises(ChatError, match="Only the server that has the model knows its tokens"):
            model.fit(HELLO, PARAMS)
        assert read(model)[0] == "Hello!"


@pytest.mark.parametrize("characters", [4, 1], ids=["English", "Chinese"])
def test_a_server_that_stops_counting_at_its_context_length_is_asked_a_few_times(settings, odd, characters):
    """vLLM reads no more than it can hold, and says "at least"; a long talk in Chinese took hundreds of requests."""
    odd.answer = picky("vLLM", characters, counts_up_to=4089)
    talk = [{"role": role, "content": "word" * 5} for _ in range(2000) for role in ("user", "assistant")]
    with behind(settings, odd) as model:
        assert read(model, [*talk, *HELLO])[0] == "Hello!"
    assert len(odd.requests) <= 8
    assert len(odd.requests[-1]["messages"]) > 4088 * characters / 20 / 2


@pytest.mark.parametrize(
    ("messages", "subject"),
    [([{"role": "user", "content": "x" * 20_000}], "message"), ([*LONG, *HELLO], "conversation")],
    ids=["one message", "many that shall not be trimmed"],
)
def test_what_cannot_be_shortened_is_refused_with_both_numbers(settings, odd, messages, subject):
    odd.answer = picky("vLLM before")
    tokens = sum(len(message["content"]) for message in messages) // 4
    with behind(settings, odd) as model:
        _, error = read(model, messages, trim=len(messages) == 1)
        assert type(error) is PromptTooLong
        assert str(error) == str(PromptTooLong(tokens, 4096, PARAMS.max_new_tokens, subject=subject))
        assert model.servers[0].healthy


def test_an_answer_that_turns_out_too_long_after_it_began_is_not_asked_for_again(settings, odd):
    error = packet(b'data: {"error": {"message": "maximum context length is 4096 tokens"}}\n\n')
    odd.answer = [HEAD, event("Once upon"), error, LAST]
    with behind(settings, odd) as model:
        text, problem = read(model, [*LONG, *HELLO])
    assert (text, type(problem), len(odd.requests)) == ("Once upon", PromptTooLong, 1)


def test_a_conversation_of_very_many_messages_is_shortened_at_once(settings, odd):
    odd.answer = picky("OpenAI")
    talk = [{"role": role, "content": "word"} for _ in range(40_000) for role in ("user", "assistant")]
    with behind(settings, odd) as model:
        began = time.monotonic()
        text, reply = read(model, [*talk, *HELLO])
        assert time.monotonic() - began < 20
    assert (text, 75_000 < reply.usage.dropped_messages < 77_000) == ("Hello!", True)


def test_a_greeting_goes_with_the_first_exchange(settings, odd):
    odd.answer = picky("vLLM")
    greeting = {"role": "assistant", "content": "Hi!"}
    with behind(settings, odd) as model:
        assert read(model, [greeting, *LONG, *HELLO])[0] == "Hello!"
    sent = odd.requests[-1]["messages"]
    assert sent[0]["role"] == "user"
    assert sent == [*LONG, *HELLO][-len(sent) :]


def test_examples_stay_where_the_oldest_exchanges_are_left_out_and_are_turns_like_any_other(settings, odd):
    odd.answer = picky("vLLM")
    shown = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    with behind(settings, odd) as model:
        _, reply = read(model, [*({**turn, "is_example": True} for turn in shown), *LONG, *HELLO])
    assert odd.requests[-1]["messages"] == [*shown, *LONG[-4:], *HELLO]
    assert reply.usage.dropped_messages == 16
