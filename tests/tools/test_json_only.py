"""Calls and answers from a server that takes JSON schemas and no tools."""

import json

import jsonschema_rs
import pytest

from llama2_chat.errors import BadGrammar
from llama2_chat.tools import PLAIN, JsonOnly, json_only_grammar
from llama2_chat.types import GrammarSpec, Tool, ToolOffer
from tests.support.toolbox import CLOCK, WEATHER, call

ODD = call("get_weather", json.dumps({"city": 'a "b": \\ , {'}))
HARD = 'Line\n"quoted" \\ / é 日本 😱 \t{}'


def through(text, **how):
    """What is made of the text, whole and letter by letter."""
    results = []
    for pieces in ([text], text):
        reader = JsonOnly("!", **how)
        results.append("".join(map(reader.read, pieces)) + reader.finish())
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("separators", [None, (",", ":"), (" ,", " : ")])
def test_a_call_is_the_same_however_a_server_spaces_it(indent, separators):
    arguments = json.loads(ODD["arguments"])
    written = json.dumps({"name": "get_weather", "arguments": arguments}, indent=indent, separators=separators)
    assert through(written) == "!" + PLAIN.write(ODD)


@pytest.mark.parametrize("ascii", [True, False])
def test_an_answer_is_its_text(ascii):
    assert through(json.dumps({"answer": HARD}, ensure_ascii=ascii)) == HARD


def test_an_answer_may_be_json_of_its_own():
    assert json.loads(through('{ "answer" : {"a": [1, "}"]} }', is_text=False)) == {"a": [1, "}"]}


@pytest.mark.parametrize("text", ["Hello there, you!", "  {no JSON, at all}", "{", '{"names": [1,  2]}'])
def test_a_server_that_ignores_the_schema_is_left_its_words(text):
    assert through(text) == text


@pytest.mark.parametrize(("must_call", "answers"), [(False, True), (True, False)])
def test_the_schema_takes_a_call_or_an_answer(must_call, answers):
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    draw = Tool("draw", "", {"properties": {"at": {"$ref": "#/$defs/p"}}, "required": ["at"], "$defs": {"p": point}})
    schema = json_only_grammar(ToolOffer((WEATHER, CLOCK, draw), must_call), None)
    is_valid = jsonschema_rs.validator_for(json.loads(schema.text)).is_valid
    assert is_valid({"name": "clock", "arguments": {}})
    assert is_valid({"name": "draw", "arguments": {"at": {"x": 1}}})
    assert not is_valid({"name": "draw", "arguments": {"at": {"x": "1"}}})
    assert not is_valid({"name": "clock", "arguments": {"city": "Paris"}})
    assert is_valid({"answer": "Hello!"}) is answers


def test_the_answer_may_have_a_schema_of_its_own_and_no_other_grammar():
    own = GrammarSpec("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}')
    is_valid = jsonschema_rs.validator_for(json.loads(json_only_grammar(ToolOffer((CLOCK,)), own).text)).is_valid
    assert is_valid({"answer": {"a": 1}})
    assert not is_valid({"answer": "Hello!"})
    with pytest.raises(BadGrammar, match="JSON schema only"):
        json_only_grammar(ToolOffer((CLOCK,)), GrammarSpec("regex", "a"))
