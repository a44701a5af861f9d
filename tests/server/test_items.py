"""/v1/responses: conversations of items, and answers as items or as typed events while they grow."""

from typing import Literal

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from llama2_chat.errors import ChatError
from llama2_chat.server.item_types import ResponsesRequest
from llama2_chat.tools import PLAIN
from llama2_chat.types import SamplingParams, ToolOffer
from tests.support.programs import HELLO, error, freed, whole_reply
from tests.support.scripted import Scripted
from tests.support.toolbox import CALCULATOR, CLOCK, WEATHER, call, function
from tests.support.waiting import until

EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
PARIS = call("get_weather", '{"city": "Paris"}')
OFFERED = (WEATHER, CALCULATOR, CLOCK)
TOOLS = [{"type": "function", "parameters": None, "strict": False} | function(each) for each in OFFERED]
NAMED = {"type": "function", "name": "get_weather"}
CALLED = {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": PARIS["arguments"]}
RETURNED = {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "22 degrees"}]}

PICTURE = {"type": "input_image", "image_url": "x"}


def respond(http, **fields):
    answer = http.post("/v1/responses", json={"input": "Say hello.", **fields})
    assert answer.status_code == 200, answer.text
    return Response.model_validate(answer.json())


def events(http, **fields):
    text = http.post("/v1/responses", json={"input": "Say hello.", "stream": True, **fields}).text
    named = [event.split("\ndata: ") for event in text.removesuffix("\n\n").split("\n\n")]
    read = [EVENT.validate_json(data) for _, data in named]
    assert [f"event: {event.type}" for event in read] == [name for name, _ in named]
    assert [event.sequence_number for event in read] == [*range(len(read))]
    return read


def same(response):
    """What does not change from one answer to the next."""
    items = [item.model_dump(exclude={"id", "call_id"}) for item in response.output]
    return items, response.status, response.incomplete_details, response.usage.output_tokens


# ---- Answers ----


@pytest.mark.parametrize("tools", [[], TOOLS], ids=["without tools", "with tools"])
def test_a_text_comes_as_typed_events_in_their_order_and_whole_as_what_they_add_up_to(script, scripted, tools):
    scripted.say = lambda messages: Scripted("Hel", "lo!")
    read = events(script, tools=tools)
    assert [event.type.removeprefix("response.") for event in read] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    final = read[-1].response
    assert {event.item_id for event in read[3:8]} == {read[2].item.id, final.output[0].id}
    assert (final.output_text, read[6].text, read[0].response.id) == ("Hello!", "Hello!", final.id)
    assert same(final) == same(respond(script, tools=tools))


def test_a_call_comes_by_its_name_and_then_in_pieces(script, scripted):
    scripted.say = lambda messages: Scripted(*PLAIN.write(PARIS))
    _, _, added, *deltas, done, item_done, completed = events(script, tools=TOOLS)
    assert (added.item.name, added.item.arguments, added.item.status) == ("get_weather", "", "in_progress")
    assert [event.delta for event in deltas] == [*PARIS["arguments"]]
    assert (done.arguments, item_done.item.status) == (PARIS["arguments"], "completed")
    assert {added.item.id, done.item_id} == {item_done.item.id} == {completed.response.output[0].id}
    assert added.item.call_id == completed.response.output[0].call_id
    assert same(completed.response) == same(respond(script, tools=TOOLS))


def test_several_calls_are_items_of_their_own(script, scripted):
    scripted.say = lambda messages: Scripted(f"{PLAIN.write(PARIS)}\n{PLAIN.write(call('clock', '{}'))}")
    output = events(script, tools=TOOLS)[-1].response.output
    assert [(item.name, item.status) for item in output] == [("get_weather", "completed"), ("clock", "completed")]
    assert len({item.call_id for item in output}) == 2


@pytest.mark.parametrize("text", ["Hel", ""])
def test_an_answer_that_max_output_tokens_cuts_is_incomplete(script, scripted, text):
    scripted.say = lambda messages: Scripted(text, reason="length")
    last = events(script, max_output_tokens=1)[-1]
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "max_output_tokens")
    assert (last.response.output_text, last.response.output[0].status) == (text, "incomplete")
    assert same(last.response) == same(respond(script, max_output_tokens=1))


def test_a_failed_answer_says_why_after_what_it_had_said(script, scripted):
    scripted.say = lambda messages: Scripted("Hel", error=ChatError("The GPU ran out of memory."))
    last = events(script)[-1]
    assert (last.type, last.response.error.message) == ("response.failed", "The GPU ran out of memory.")
    assert (last.response.error.code, last.response.output_text) == ("server_error", "Hel")
    answer = script.post("/v1/responses", json={"input": "Hi"})
    assert (answer.status_code, error(answer)["message"]) == (500, "The GPU ran out of memory.")


def test_what_was_asked_for_is_repeated_and_nothing_is_stored(script, scripted):
    scripted.say = lambda messages: Scripted("Hello!")
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    asked = {"instructions": "Be brief.", "temperature": 0.5, "top_p": 0.7, "max_output_tokens": 9, "user": "me"}
    asked |= {"metadata": {"a": "b"}, "truncation": "auto", "tools": TOOLS, "tool_choice": NAMED}
    more = {"store": True, "parallel_tool_calls": False, "text": {"format": schema}, "include": []}
    answered = script.post("/v1/responses", json={"input": "Hi", **asked, **more}).json()
    assert {name: answered[name] for name in asked if name != "tools"} == {
        name: value for name, value in asked.items() if name != "tools"
    }
    assert [tool["name"] for tool in answered["tools"]] == ["get_weather", "calculator", "clock"]
    assert (answered["store"], answered["parallel_tool_calls"]) == (False, False)
    assert answered["text"]["format"] == schema


def test_logprobs_stand_with_their_text(http):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 4, "temperature": 0}
    read = events(http, **fields)
    told = [token.token for event in read if event.type == "response.output_text.delta" for token in event.logprobs]
    (part,) = read[-1].response.output[0].content
    assert [token.token for token in part.logprobs] == told
    assert "".join(told).startswith(part.text) or part.text
    assert {len(token.top_logprobs) for token in part.logprobs} == {2}
    assert len(respond(http, **fields).output[0].content[0].logprobs) == len(part.logprobs) == 4


def test_who_leaves_frees_the_model(http, small):
    asked = {"input": "Tell me a long story.", "stream": True, "temperature": 0}  # else the answer may end at once
    with http.stream("POST", "/v1/responses", json=asked) as answer:
        next(answer.iter_lines())
        until(lambda: small.occupancy.running)
    freed(small)


# ---- Questions ----


def test_items_are_the_conversation_that_a_chat_would_have():
    said = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {
            **{"type": "message", "role": "assistant", "id": "msg_1", "status": "completed"},
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        CALLED,
        CALLED | {"call_id": "b", "name": "clock", "arguments": "{}", "id": "fc_1", "status": "completed"},
        RETURNED,
        {"type": "function_call_output", "call_id": "b", "output": "9:00"},
    ]
    request = ResponsesRequest(input=said, instructions="Be brief.")
    assert request.conversation() == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {
            **{"role": "assistant", "content": "I look."},
            "tool_calls": [call("get_weather", PARIS["arguments"], "a"), call("clock", "{}", "b")],
        },
        {"role": "tool", "content": "22 degrees", "tool_call_id": "a", "name": ""},
        {"role": "tool", "content": "9:00", "tool_call_id": "b", "name": ""},
    ]


@pytest.mark.parametrize(
    ("fields", "offer"),
    [
        ({"tool_choice": "none"}, ToolOffer(OFFERED, may_call=False)),
        ({"tool_choice": NAMED}, ToolOffer(OFFERED, must_call=True, names=("get_weather",))),
        ({"parallel_tool_calls": True}, ToolOffer(OFFERED, parallel=True)),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}},
            ToolOffer(OFFERED, names=("get_weather",)),
        ),
    ],
)
def test_tools_are_told_of_in_their_flat_form(fields, offer):
    assert ResponsesRequest(input="Hi", tools=TOOLS, **fields).offer == offer


def test_what_clients_send_by_default_is_accepted():
    request = ResponsesRequest(
        **{"input": "Hi", "store": None, "include": ["reasoning.encrypted_content"], "service_tier": "auto"},
        **{"reasoning": {"effort": None}, "prompt_cache_key": "x", "stream_options": {"include_obfuscation": False}},
        **{"previous_response_id": None, "conversation": None, "background": False, "max_tool_calls": 4},
        **{"text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": [], "tool_choice": "auto"},
    )
    request.reject_unsupported()
    assert request.params(SamplingParams()) == SamplingParams()
    ResponsesRequest(input="Hi", **dict.fromkeys(ResponsesRequest.model_fields.keys() - {"input"}))


@pytest.mark.parametrize(
    ("fields", "field", "why"),
    [
        ({"input": []}, "input", "a text, or a list of items"),
        ({"input": 5}, "input", "a text, or a list of items"),
        ({"input": ""}, "input", "The message is empty"),
        ({"input": [5]}, "input.0", "an item of type message"),
        ({"input": [{"type": "web_search_call"}]}, "input.0", "an item of type message"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.item_reference", "send the item itself"),
        ({"input": [*HELLO, {"role": "assistant", "content": "Hello"}]}, "input", "End it with one of the user"),
        ({"input": [*HELLO, CALLED]}, "input", "Add what the tools returned"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input", "call_id is missing"),
        ({"input": [{"role": "user", "content": [PICTURE]}]}, "input.0.message.content", "must be text"),
        ({"tools": [{"type": "web_search"}]}, "tools", "there is no web_search here"),
        ({"tool_choice": {"type": "web_search"}, "tools": TOOLS}, "tool_choice", "none, auto, required or"),
        ({"tool_choice": "required"}, "tool_choice", "it goes with tools only"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
        ({"background": True}, "background", "stream the answer"),
        ({"prompt": {"id": "x"}}, "prompt", "/v1/responses an input"),
        ({"messages": HELLO}, "messages", "/v1/responses an input"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not available"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"text": {"verbosity": "low"}}, "text", "cannot be set"),
        ({"text": {"format": {"type": "json_schema"}}}, "text", "needs one"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "strin"}}}}, "text", "cannot be held"),
        ({"metadata": {"a": 1}}, "metadata", "string"),
        ({"n": 2}, "n", "1"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_field_and_the_reason(http, fields, field, why):
    answer = http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1, **fields})
    assert (answer.status_code, error(answer)["param"]) == (400, field), answer.text
    assert why in error(answer)["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")]
)
def test_an_answer_cannot_be_asked_for_by_its_id(http, method, path):
    answer = http.request(method, f"/v1/responses/resp_1{path}")
    assert (answer.status_code, error(answer)["code"]) == (404, "not_stored")
    assert "send the whole conversation" in error(answer)["message"]


# ---- By the official client ----


class Recipe(pydantic.BaseModel):
    dish: str
    course: Literal["starter", "main", "dessert"]


@pytest.mark.slow
def test_the_official_client_gets_what_a_chat_would_get(client, chat):
    answer = client.responses.create(model=chat.status.model, input=HELLO, max_output_tokens=8)
    assert answer.output_text == whole_reply(chat, HELLO, max_new_tokens=8)
    assert (answer.status, answer.usage.output_tokens) == ("incomplete", 8)
    with client.responses.stream(model=chat.status.model, input=HELLO, max_output_tokens=8) as stream:
        assert [event.delta for event in stream if event.type == "response.output_text.delta"]


@pytest.mark.slow
def test_the_official_client_reads_objects_calls_and_results(client, chat):
    fields = {"model": chat.status.model, "max_output_tokens": 200}
    parsed = client.responses.parse(**fields, input="A recipe for soup.", text_format=Recipe)
    assert isinstance(parsed.output_parsed, Recipe)
    with client.responses.stream(**fields, input="A recipe for soup.", text_format=Recipe) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    tools = [openai.pydantic_function_tool(Recipe, name="cook")["function"] | {"type": "function"}]
    fields |= {"tools": tools}
    with client.responses.stream(**fields, input="Cook!", tool_choice="required") as stream:
        (called,) = stream.get_final_response().output
    assert Recipe.model_validate(called.parsed_arguments)
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "Done."}
    talk = [{"role": "user", "content": "Cook!"}, called.model_dump(exclude={"parsed_arguments"}), result]
    assert client.responses.create(**fields, input=talk, tool_choice="none").output_text
