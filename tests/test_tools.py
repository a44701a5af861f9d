"""Tools offered to a model in this process: the first step is a call that is valid, or text."""

import json
from dataclasses import replace

import jsonschema_rs
import pytest

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from llama2_chat.tools import PLAIN
from llama2_chat.types import GrammarSpec, SamplingParams, Tool, ToolOffer
from model import ChatModel
from tests.support.small_model import untrained
from tests.support.templates import functionary, mistral_with_tools, qwen
from tests.support.toolbox import CLOCK, FUNCTIONARY_STYLE, MISTRAL_STYLE, QWEN_STYLE, WEATHER, call, read

LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=60)
WILD = replace(LIKELIEST, temperature=2, top_k=0, top_p=1)
OFFER = ToolOffer((WEATHER, CLOCK))
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]
DONE = [
    *PARIS,
    {"role": "assistant", "content": "", "tool_calls": [call("get_weather", '{"city": "Paris"}', "1")]},
    {"role": "tool", "content": "22 degrees", "tool_call_id": "1"},
]


def answer(chat, offer, params=LIKELIEST, messages=PARIS, **more):
    with chat.stream_reply(messages, params, tools=offer, **more) as reply:
        pieces = list(reply)
    return read(pieces, chat.call_style, [tool.name for tool in offer.tools])[2], reply


def follows(call, tools):
    (tool,) = (tool for tool in tools if tool.name == call["name"])
    return jsonschema_rs.validator_for(tool.parameters or {}).is_valid(json.loads(call["arguments"]))


@pytest.fixture(scope="module", params=[qwen, mistral_with_tools, functionary], ids=lambda make: make.__name__)
def trained_for_tools(request, settings):
    """A model of random weights whose template takes tools."""
    tokenizer = request.param()
    chat = ChatModel(settings).serve(tokenizer, untrained(tokenizer, 2048))
    yield chat
    chat.close()


def test_a_call_that_is_required_is_valid_and_ends_the_answer(chat):
    read, reply = answer(chat, ToolOffer((WEATHER,), must_call=True))
    assert [follows(call, (WEATHER,)) for call in read.calls] == [True]
    assert (read.text, reply.finish_reason) == ("", "stop")


@pytest.mark.parametrize("seed", range(2))
def test_whatever_a_model_draws_is_a_valid_call_or_text(trained_for_tools, seed):
    offer = ToolOffer((WEATHER, CLOCK), must_call=seed % 2 == 1)
    read, reply = answer(trained_for_tools, offer, replace(WILD, seed=seed, max_new_tokens=300))
    assert bool(read.calls) or not offer.must_call
    assert all(follows(call, offer.tools) for call in read.calls)
    assert reply.finish_reason in ("stop", "length")


def test_a_template_with_tools_gets_them_and_the_conversation_as_it_was(trained_for_tools):
    tokenizer = trained_for_tools.serving.tokenizer
    assert trained_for_tools.call_style in (QWEN_STYLE, MISTRAL_STYLE, FUNCTIONARY_STYLE)
    objects = tuple(map(prompt.tool_object, OFFER.tools))
    assert trained_for_tools.encode(DONE, OFFER) == prompt.encode(tokenizer, DONE, tools=objects)
    assert trained_for_tools.encode(DONE) == prompt.encode(tokenizer, DONE)


def test_a_template_without_tools_is_told_in_words_and_the_next_prompt_begins_as_the_last_one(chat):
    assert chat.call_style == PLAIN
    asked, done = chat.encode(PARIS, OFFER), chat.encode(DONE, OFFER)
    assert done[: len(asked)] == asked
    assert "get_weather(city: string" in chat.serving.tokenizer.decode(asked)
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in chat.serving.tokenizer.decode(chat.encode(DONE))


def test_beside_tools_an_answer_may_have_to_follow_a_schema(chat):
    schema = GrammarSpec("json_schema", '{"enum": ["yes", "no"]}')
    read, _ = answer(chat, ToolOffer((CLOCK,)), replace(LIKELIEST, grammar=schema))
    assert read.calls == [call("clock", "{}")] or json.loads(read.text) in ("yes", "no")


def test_examples_are_not_counted_among_the_messages_that_no_longer_fit(chat):
    long = [{"role": "user", "content": "tea " * 4000}, {"role": "assistant", "content": "tea " * 4000}]
    with chat.stream_reply([*long, *PARIS], replace(LIKELIEST, max_new_tokens=1), tools=OFFER) as reply:
        assert reply.usage.dropped_messages == 2


def test_an_answer_that_has_begun_cannot_call_tools(chat):
    begun = [*PARIS, {"role": "assistant", "content": "It is"}]
    with pytest.raises(ChatError, match="has begun"):
        chat.stream_reply(begun, LIKELIEST, tools=OFFER)
    with chat.stream_reply(begun, replace(LIKELIEST, max_new_tokens=1), tools=replace(OFFER, may_call=False)) as reply:
        assert "".join(reply)


def test_where_nothing_may_be_called_the_prompt_is_the_same_and_the_answer_is_text(chat):
    none = replace(OFFER, may_call=False)
    assert chat.encode(DONE, none) == chat.encode(DONE, OFFER)
    read, _ = answer(chat, none, replace(LIKELIEST, max_new_tokens=8), DONE)
    assert read.text
    assert "{" not in read.text[:1]


@pytest.mark.parametrize(
    "parameters",
    [{"properties": {"a": {"type": "strin"}}}, {"type": "object", "properties": {"a": False}, "required": ["a"]}],
)
def test_a_tool_whose_schema_cannot_be_followed_is_refused(chat, parameters):
    with pytest.raises(ChatError, match="cannot be held"):
        chat.stream_reply(PARIS, LIKELIEST, tools=ToolOffer((Tool("odd", "", parameters),)))
