"""What a model is told that was never trained for tools: plain turns, the same from one question to the next."""

import jsonschema_rs
import pytest

from llama2_chat.tools import PLAIN, plain
from llama2_chat.tools.signature import sample_arguments, signature
from llama2_chat.types import Tool, ToolOffer
from tests.support.toolbox import CALCULATOR, CLOCK, WEATHER, call

OFFER = ToolOffer((WEATHER, CALCULATOR))
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Paris?"}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [call("get_weather", '{"city": "Paris"}', "1")]}
TOLD = {"role": "tool", "content": "22 degrees", "tool_call_id": "1"}


def test_calls_and_results_become_words():
    *_, asked, called, told = plain([*ASKED, CALLED, TOLD], OFFER)
    assert asked["content"].startswith("Weather in Paris?\n\n(")
    assert called == {"role": "assistant", "content": PLAIN.write(CALLED["tool_calls"][0])}
    assert told["content"].startswith("get_weather returned: 22 degrees\n\n(")


def test_so_they_do_where_no_tools_are_offered_any_more_and_nothing_else_changes():
    assert plain([*ASKED, CALLED, TOLD], None) == [
        *ASKED,
        {"role": "assistant", "content": '{"name": "get_weather", "arguments": {"city": "Paris"}}'},
        {"role": "tool", "content": "get_weather returned: 22 degrees"},
    ]


def test_each_prompt_begins_as_the_one_before_it_did():
    longer = [
        [*ASKED],
        [*ASKED, CALLED, TOLD],
        [*ASKED, CALLED, TOLD, {"role": "assistant", "content": "22."}, ASKED[1]],
    ]
    prompts = [plain(messages, OFFER) for messages in longer]
    assert prompts[1][: len(prompts[0])] == prompts[0]
    assert prompts[2][: len(prompts[1])] == prompts[1]


def test_what_the_model_must_do_changes_nothing_in_its_prompt():
    must = ToolOffer(OFFER.tools, must_call=True, names=("calculator",), parallel=True)
    assert plain(ASKED, must) == plain(ASKED, OFFER) == plain(ASKED, ToolOffer(OFFER.tools, may_call=False))


def test_the_system_text_names_the_tools_and_examples_are_turns_of_their_own():
    system, *turns = plain(ASKED, OFFER)
    assert system["content"].startswith("Be brief.\n\n")
    assert (
        '- get_weather(city: string, its name; unit: "c" | "f", optional): The weather in a city.' in system["content"]
    )
    assert [turn.get("is_example", False) for turn in turns] == [True] * (len(turns) - 1) + [False]
    assert [turn["role"] for turn in turns[:4]] == ["user", "assistant", "tool", "assistant"]


def test_results_in_a_row_are_reminded_of_once():
    two = [*ASKED, {**CALLED, "tool_calls": [call("clock", "{}", "a"), call("clock", "{}", "b")]}, TOLD, TOLD]
    assert [turn["content"].count("(Write") for turn in plain(two, OFFER)[-2:]] == [0, 1]


NESTED = Tool(
    "book",
    "",
    {
        "type": "object",
        "properties": {
            "guests": {"type": "array", "items": {"$ref": "#/$defs/guest"}},
            "nights": {"type": ["integer", "null"], "minimum": 2},
            "breakfast": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None},
            "room": {"const": "double"},
        },
        "required": ["guests", "nights", "breakfast", "room"],
        "$defs": {"guest": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
    },
)


@pytest.mark.parametrize("tool", [WEATHER, CALCULATOR, NESTED], ids=lambda tool: tool.name)
def test_examples_follow_the_schema_of_their_tool(tool):
    assert jsonschema_rs.validator_for(tool.parameters).is_valid(sample_arguments(tool))


def test_a_signature_says_what_is_nested():
    assert signature(NESTED) == (
        'book(guests: list of {name: string}; nights: integer | null; breakfast: boolean | null; room: "double")'
    )
    assert signature(CLOCK) == "clock()"


@pytest.mark.parametrize(
    "schema",
    [
        *(
            {"$ref": "#"},
            {"$ref": "#/a"},
            {"properties": []},
            {"properties": {"a": True}},
            {"required": 5},
            {"anyOf": []},
        ),
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"properties": {"a": {"enum": []}}, "required": [1]},
    ],
)
def test_odd_schemas_get_a_signature_all_the_same(schema):
    assert signature(Tool("odd", "", schema)).startswith("odd(")
    assert isinstance(sample_arguments(Tool("odd", "", schema)), dict)
