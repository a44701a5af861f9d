"""Tools behind INFERENCE_URL: passed on, or done by a JSON schema where the server does not take them."""

import json

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.tools import PLAIN
from llama2_chat.types import GrammarSpec, SamplingParams, ToolOffer
from tests.support.odd_server import DONE, HEAD, LAST, event, packet, status, words
from tests.support.remote import HELLO, PARAMS, behind
from tests.support.toolbox import CLOCK, WEATHER, call
from tests.support.toolbox import read as read_calls

OFFER = ToolOffer((WEATHER, CLOCK))
PARIS = call("get_weather", '{"city": "Paris"}')
TALK = [
    *HELLO,
    {"role": "assistant", "content": "", "tool_calls": [call("clock", "{}", "a"), call("clock", "", "b")]},
    {"role": "tool", "content": "9:00", "tool_call_id": "a"},
    {"role": "tool", "content": "9:01", "tool_call_id": "b"},
]
NO_TOOLS = {"error": {"message": '"auto" tool choice requires --enable-auto-tool-choice to be set'}}


def piece(index, **function):
    """A part of a call, as servers stream it."""
    more = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
    delta = {"tool_calls": [{"index": index, "function": function, **more}]}
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return packet(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())


def calls(*pieces, finish="tool_calls", text="Let me see."):
    return [HEAD, event(text), *pieces, event(finish=finish), *DONE, LAST]


def ask(settings, odd, offer=OFFER, messages=HELLO, params=PARAMS):
    """What comes back, read as calls, and the reply."""
    with behind(settings, odd) as model, model.stream_reply(messages, params, tools=offer) as reply:
        return read_calls(list(reply), model.call_style, [tool.name for tool in offer.tools])[2], reply


def test_tools_calls_and_results_are_passed_on(settings, odd):
    odd.answer = calls(
        piece(0, name="get_weather", arguments=""),
        piece(0, arguments='{"city": '),
        piece(0, arguments='"Paris"}'),
        piece(1, name="clock", arguments=None),
    )
    read, reply = ask(settings, odd, ToolOffer(OFFER.tools, parallel=True), TALK)
    assert (read.text, read.calls) == ("Let me see.", [PARIS, call("clock", "{}")])
    assert reply.finish_reason == "stop"
    (asked,) = odd.requests
    assert [tool["function"]["name"] for tool in asked["tools"]] == ["get_weather", "clock"]
    assert (asked["tool_choice"], asked["parallel_tool_calls"]) == ("auto", True)
    functions = [each["function"] for each in asked["messages"][1]["tool_calls"]]
    assert functions == [{"name": "clock", "arguments": "{}"}, {"name": "clock", "arguments": ""}]
    assert asked["messages"][1]["content"] is None
    assert asked["messages"][2] == {"role": "tool", "content": "9:00", "tool_call_id": "a"}


@pytest.mark.parametrize(
    ("names", "choice"), [((), "required"), (("clock",), {"type": "function", "function": {"name": "clock"}})]
)
def test_what_must_be_called_is_passed_on(settings, odd, names, choice):
    ask(settings, odd, ToolOffer(OFFER.tools, must_call=True, names=names))
    assert odd.requests[0]["tool_choice"] == choice


def test_that_nothing_may_be_called_is_passed_on_or_left_unsaid(settings, odd):
    odd.answer = lambda question: status(400, NO_TOOLS) if "tools" in question else words('{"answer": "No."}')
    read, _ = ask(settings, odd, ToolOffer(OFFER.tools, may_call=False), TALK)
    assert read.text == '{"answer": "No."}'
    first, second = odd.requests
    assert (first["tool_choice"], len(first["tools"])) == ("none", 2)
    assert "response_format" not in second
    assert "get_weather" not in json.dumps(second)


def test_a_call_that_the_server_cut_off_is_no_call(settings, odd):
    odd.answer = calls(piece(0, name="get_weather", arguments='{"city": "Pa'), finish="length")
    read, reply = ask(settings, odd)
    assert (read.calls, reply.finish_reason) == ([], "length")


def test_a_marker_in_an_answer_makes_no_call(settings, odd):
    odd.answer = words("\x02" + PLAIN.write(PARIS))
    read, _ = ask(settings, odd)
    assert (read.calls, read.text) == ([], PLAIN.write(PARIS))


@pytest.mark.parametrize(
    "refusal",
    [status(400, NO_TOOLS), status(500, {"error": {"message": "tools param requires --jinja flag"}})],
    ids=["vLLM", "llama.cpp"],
)
@pytest.mark.parametrize(
    ("answer", "text", "called"),
    [
        ('{"answer": "No, \\"never\\"."}', 'No, "never".', []),
        ('{\n  "name": "get_weather",\n  "arguments": {"city":"Paris"}\n}', "", [PARIS]),
        ("I ignore schemas.", "I ignore schemas.", []),
    ],
    ids=["text", "call", "neither"],
)
def test_a_server_without_tools_is_asked_for_json(settings, odd, refusal, answer, text, called):
    odd.answer = lambda question: refusal if "tools" in question else words(*answer)
    read, _ = ask(settings, odd, messages=TALK)
    assert (read.text, read.calls) == (text, called)
    _, asked = odd.requests
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & asked.keys()
    assert asked["response_format"]["json_schema"]["schema"]["anyOf"]
    assert {message["role"] for message in asked["messages"]} == {"system", "user", "assistant"}
    assert "clock returned: 9:00\n\nclock returned: 9:01" in asked["messages"][-1]["content"]


def test_an_answer_that_must_follow_a_schema_does_so_there_too(settings, odd):
    odd.answer = lambda question: status(400, NO_TOOLS) if "tools" in question else words('{"answer": {"a": 1}}')
    grammar = GrammarSpec("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}')
    read, _ = ask(settings, odd, params=SamplingParams(max_new_tokens=8, grammar=grammar))
    assert json.loads(read.text) == {"a": 1}


def test_what_a_server_says_about_something_else_is_no_reason_to_ask_again(settings, odd):
    odd.answer = status(400, {"error": {"message": "top_k must be -1"}})
    with pytest.raises(ChatError, match="top_k"):
        ask(settings, odd)
    assert len(odd.requests) == 1


def test_results_without_tools_on_offer_are_words_where_the_server_does_not_take_them(settings, odd):
    odd.answer = lambda question: (
        status(400, {"error": {"message": "unknown role tool"}})
        if any(message["role"] == "tool" for message in question["messages"])
        else words("It is nine.")
    )
    with behind(settings, odd) as model, model.stream_reply(TALK, PARAMS) as reply:
        assert "".join(reply) == "It is nine."
    assert "response_format" not in odd.requests[-1]
