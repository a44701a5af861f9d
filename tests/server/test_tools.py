"""Tools over HTTP: what a program may offer, and the calls that it gets, whole and streamed."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import jsonschema_rs
import openai
import pytest

from llama2_chat.server.openai_types import ChatRequest
from llama2_chat.tools import PLAIN
from llama2_chat.types import ToolOffer
from model import ChatModel
from tests.support.programs import HELLO, error
from tests.support.random_schemas import random_tools
from tests.support.scripted import Scripted
from tests.support.serving import serving
from tests.support.small_model import untrained
from tests.support.toolbox import CALCULATOR, CLOCK, WEATHER, call, function

PARIS = call("get_weather", '{"city": "Paris"}')


def tool(tool):
    return {"type": "function", "function": function(tool)}


TOOLS = [tool(each) for each in (WEATHER, CALCULATOR, CLOCK)]
IN_PARIS = {"name": "get_weather", "arguments": PARIS["arguments"]}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": IN_PARIS}]}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def with_parameters(schema):
    return {"type": "function", "function": {"name": "odd", "parameters": schema}}


def follows(called, tools):
    (schema,) = (each["function"].get("parameters", {}) for each in tools if each["function"]["name"] == called["name"])
    return jsonschema_rs.validator_for(schema).is_valid(json.loads(called["arguments"]))


def choice(http, tools=TOOLS, **fields):
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "tools": tools, "temperature": 2, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def chunks(http, tools=TOOLS, **fields):
    body = {"messages": HELLO, "tools": tools, "temperature": 2, "stream": True, **fields}
    lines = http.post("/v1/chat/completions", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [event["choices"][0] for event in events]


def joined(chunks):
    """The message that a program puts together, and the reason."""
    content, calls = "", []
    for delta in (chunk["delta"] for chunk in chunks):
        content += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert (piece["index"], piece["function"]["arguments"]) == (len(calls), "")
                calls.append({name: piece[name] for name in ("id", "type", "function")})
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    message = {"role": "assistant", "content": content or None} | ({"tool_calls": calls} if calls else {})
    return message, chunks[-1]["finish_reason"]


@pytest.fixture
def says(script, scripted):
    """Called with the pieces of each answer, for as long as no others are given; the client."""

    def begin(*pieces):
        scripted.say = lambda messages: Scripted(*pieces)
        return script

    return begin


# ---- Calls ----


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_is_required_is_valid_and_the_same_whole_and_streamed(http, tool_choice):
    whole = choice(http, tool_choice=tool_choice, seed=1, max_tokens=150)
    (called,) = whole["message"]["tool_calls"]
    assert follows(called["function"], TOOLS)
    assert (whole["finish_reason"], whole["message"]["content"], called["type"]) == ("tool_calls", None, "function")
    assert joined(chunks(http, tool_choice=tool_choice, seed=1, max_tokens=150)) == (
        whole["message"],
        whole["finish_reason"],
    )


def test_a_call_arrives_by_its_name_and_then_in_pieces(says):
    _, name, *arguments, last = [chunk["delta"] for chunk in chunks(says(*PLAIN.write(PARIS)))]
    assert name["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}
    assert [delta["tool_calls"][0] for delta in arguments] == [
        {"index": 0, "function": {"arguments": letter}} for letter in PARIS["arguments"]
    ]
    assert last == {}


def test_calls_have_ids_of_their_own_and_with_a_seed_the_same_ones(says):
    http = says(PLAIN.write(PARIS))

    def ids(**fields):
        return choice(http, **fields)["message"]["tool_calls"][0]["id"]

    assert ids() != ids()
    assert ids(seed=1) == ids(seed=1) != ids(seed=2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools: There are two tools called 'get_weather'."),
        (
            {"tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice: There is no tool called 'no' among those that came with the question; "
            "it was {'type': 'function', 'function': {'name': 'no'}}.",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_said_in_one_sentence_with_one_full_stop(script, fields, sentence):
    answer = script.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, **fields})
    assert error(answer)["message"] == sentence


def test_text_is_an_answer_like_any_other(says):
    assert joined(chunks(says("It is ", "sunny."))) == ({"role": "assistant", "content": "It is sunny."}, "stop")


def test_none_never_calls(says):
    whole = choice(says(PLAIN.write(PARIS)), tool_choice="none")
    assert (whole["message"]["content"], whole["finish_reason"]) == (PLAIN.write(PARIS), "stop")
    assert "tool_calls" not in whole["message"]


@pytest.mark.parametrize("limit", [1, 3, 6, 12])
def test_no_call_is_claimed_that_max_tokens_cuts(http, limit):
    # Cut in its first letters, it was the text '{"name":'.
    fields = {"tool_choice": NAMED, "max_tokens": limit, "seed": 1}
    whole = choice(http, **fields)
    assert (whole["finish_reason"], "tool_calls" in whole["message"]) == ("length", False)
    assert whole["message"]["content"] == ""
    message, reason = joined(chunks(http, **fields))
    assert (reason, "tool_calls" in message) == ("length", False)
    assert not message.get("content")


def test_arguments_come_as_they_are_written_where_max_tokens_leaves_room_for_them(http):
    fields = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "temperature": 0}
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": NAMED, "stream": True, "max_tokens": 150, **fields}
    lines = http.post("/v1/chat/completions", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    calling = [event["usage"]["completion_tokens"] for event in events if "tool_calls" in str(event["choices"])]
    assert len(set(calling)) > 4


def test_a_call_that_a_stop_string_cuts_is_not_claimed(says):
    message, _ = joined(chunks(says(PLAIN.write(PARIS)[:-4]), stop="Paris"))
    assert message == {"role": "assistant", "content": None}


def test_each_of_several_answers_has_calls_of_its_own(script, scripted):
    texts = iter([PLAIN.write(PARIS), "Hello!"])
    scripted.say = lambda messages: Scripted(next(texts))
    answer = script.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, "n": 2}).json()
    assert [each["finish_reason"] for each in answer["choices"]] == ["tool_calls", "stop"]
    assert [each["message"]["content"] for each in answer["choices"]] == [None, "Hello!"]


def test_functions_are_answered_as_openai_did_at_first(says):
    http = says(PLAIN.write(PARIS))
    fields = {"tools": None, "functions": [function(WEATHER)], "function_call": {"name": "get_weather"}}
    whole = choice(http, **fields)
    assert (whole["finish_reason"], "tool_calls" in whole["message"]) == ("function_call", False)
    assert whole["message"]["function_call"] == IN_PARIS
    _, name, arguments, _ = chunks(http, **fields)
    assert name["delta"] == {"function_call": {"name": "get_weather", "arguments": ""}}
    assert arguments["delta"] == {"function_call": {"arguments": PARIS["arguments"]}}


def test_the_official_client_goes_on_with_what_a_tool_returned(small_address, small):
    with openai.OpenAI(base_url=f"{small_address}v1", api_key="none", max_retries=0) as client:
        fields = {"model": small.status.model, "tools": TOOLS, "max_tokens": 300}
        called = client.chat.completions.create(**fields, messages=HELLO, tool_choice=NAMED).choices[0].message
        result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "22 degrees"}
        told = client.chat.completions.create(**fields | {"max_tokens": 2}, messages=[*HELLO, called, result])
        assert told.usage.completion_tokens == 2


# ---- What a request may say ----


def test_calls_and_results_are_understood_in_both_of_openais_ways():
    said = [
        *HELLO,
        CALLED,
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "22 degrees"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": "{}"}},
        {"role": "function", "name": "clock", "content": "9:00"},
    ]
    assert ChatRequest(messages=said).conversation()[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{**PARIS, "id": "a"}]},
        {"role": "tool", "content": "22 degrees", "tool_call_id": "a", "name": ""},
        {"role": "assistant", "content": "", "tool_calls": [call("clock", "{}", "clock")]},
        {"role": "tool", "content": "9:00", "tool_call_id": "clock", "name": "clock"},
    ]


OFFERED = (WEATHER, CALCULATOR, CLOCK)
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("fields", "offer"),
    [
        ({}, ToolOffer(OFFERED)),
        ({"tool_choice": None, "parallel_tool_calls": False}, ToolOffer(OFFERED, parallel=False)),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, ToolOffer(OFFERED, parallel=True)),
        ({"tool_choice": "none"}, ToolOffer(OFFERED, may_call=False)),
        ({"tool_choice": "required"}, ToolOffer(OFFERED, must_call=True)),
        ({"tool_choice": NAMED}, ToolOffer(OFFERED, must_call=True, names=("get_weather",))),
        ({"tool_choice": ALLOWED}, ToolOffer(OFFERED, must_call=True, names=("get_weather",))),
        ({"tools": []}, None),
        ({"tools": None, "functions": [function(CLOCK)]}, ToolOffer((CLOCK,), parallel=False)),
    ],
)
def test_what_may_be_called_is_for_the_program_to_say(fields, offer):
    assert ChatRequest(messages=HELLO, **{"tools": TOOLS, **fields}).offer == offer


@pytest.mark.parametrize(
    ("fields", "field", "why"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "of type function"),
        ({"tools": [tool(CLOCK), tool(CLOCK)]}, "tools", "two tools called 'clock'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
        ({"tools": [tool(CLOCK)] * 129}, "tools", "128"),
        ({"tool_choice": "sometimes"}, "tool_choice", "none, auto, required or"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice", "no tool called 'rm'"),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "it goes with tools only"),
        ({"functions": [function(CLOCK)]}, "functions", "older name of tools"),
        (
            {"tools": [tool(replace(WEATHER, parameters={"properties": {"a": {"type": "strin"}}}))]},
            "tools",
            "cannot be held",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}]},
            "tools",
            "object",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_field_and_the_reason(http, fields, field, why):
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, **fields})
    assert (answer.status_code, error(answer)["param"]) == (400, field)
    assert why in error(answer)["message"]


def test_a_conversation_that_ends_with_a_call_lacks_its_result(http):
    answer = http.post("/v1/chat/completions", json={"messages": [*HELLO, CALLED], "tools": TOOLS})
    assert (answer.status_code, error(answer)["param"]) == (400, "messages")
    assert "Add what the tools returned" in error(answer)["message"]


def test_tokenize_counts_tools_too(http):
    counts = [
        http.post("/tokenize", json={"messages": HELLO, **more}).json()["count"] for more in ({}, {"tools": TOOLS})
    ]
    answer = choice(http, max_tokens=1)
    assert counts[0] + 50 < counts[1]
    assert answer


# ---- Any tools ----


@pytest.mark.slow
def test_each_of_200_random_requests_gets_calls_that_are_valid_and_the_same_whole_and_streamed(chat, settings):
    many = ChatModel(settings).serve(chat.serving.tokenizer, untrained(chat.serving.tokenizer, 8192))

    def ask(http, n):
        rng = random.Random(n // 20)  # twenty requests for the same tools
        tools = [{"type": "function", "function": each} for each in random_tools(rng, 5)]
        name = rng.choice(tools)["function"]["name"]
        named = {"type": "function", "function": {"name": name}}
        tool_choice = ["auto", "required", named, "required", named, "none"][n % 6]
        fields = {"tool_choice": tool_choice, "seed": n, "parallel_tool_calls": n % 40 < 20}
        fields["max_tokens"] = 30 if tool_choice in ("auto", "none") else 150  # random weights find no end of a text
        whole = choice(http, tools, **fields)
        assert joined(chunks(http, tools, **fields)) == (whole["message"], whole["finish_reason"])
        calls = whole["message"].get("tool_calls", [])
        assert all(follows(each["function"], tools) for each in calls), (tools, whole)
        if tool_choice == "none":
            assert not calls
        else:
            assert calls or tool_choice == "auto" or whole["finish_reason"] == "length"
        return len(calls)

    with (
        serving(many, settings) as address,
        httpx.Client(base_url=address, timeout=600) as http,
        ThreadPoolExecutor(3) as pool,
    ):
        calls = list(pool.map(lambda n: ask(http, n), range(200)))
    many.close()
    assert sum(calls) > 100
