"""What is made of a JSON schema before llguidance reads it: all that it then takes follows the schema."""

import json
import random

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from llama2_chat.engine.try_grammar import LIMITS, compile_here

BYTES = LLTokenizer("byte")
TEXTS = ["", "a", "ab", "cd", "2024-02-29", "2023-02-29", "0000-01-01", "a@b.org"]
NAMES = ["a", "b", "c", "xy"]


def compiled(schema):
    return compile_here("json_schema", json.dumps(schema))


def taking(result):
    """Whether it takes a value."""
    matcher = LLMatcher(BYTES, result.source, log_level=0, limits=LIMITS)

    def takes(value):
        matcher.reset()
        text = json.dumps(value).encode()
        return matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()

    return takes


def value(rng, depth=2):
    kind = rng.randrange(6 if depth else 4)
    if kind < 4:
        return rng.choice([None, rng.random() < 0.5, rng.choice([0, 3, 12, -5, 0.5, 7.25]), rng.choice(TEXTS)])
    if kind == 4:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {name: value(rng, depth - 1) for name in NAMES if rng.random() < 0.4}


ABC = {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {}}
# Schema, and values that follow it and must be taken.
SCHEMAS = {
    "unknown format": ({"type": "string", "format": "colour"}, ["red"]),
    "annotations": ({"type": "integer", "x-order": 1, "readOnly": True, "contentEncoding": "base64"}, [3]),
    "items may be equal": ({"type": "array", "uniqueItems": False}, [[1, 1]]),
    "items differ": ({"type": "array", "items": {"enum": ["a", "ab", 3]}, "uniqueItems": True}, [[], ["a", 3]]),
    "real date": ({"format": "date"}, ["2024-02-29", 3]),
    "narrower format": ({"type": "string", "format": "idn-email"}, ["a@b.org"]),
    "not a type": ({"not": {"type": ["string", "integer"]}}, [None, [1]]),
    "not a constant": ({"not": {"const": "ab"}}, ["a", "", "cd", 3]),
    "not values": ({"type": "string", "not": {"enum": ["a", "ab", ""]}}, ["cd"]),
    "not both": ({"not": {"required": ["a", "b"]}, "properties": ABC}, [{"a": 3}, {"b": "a"}, {}]),
    "not any of": ({"not": {"anyOf": [{"type": "string"}, {"minimum": 3}]}}, [0]),
    "not all of": ({"not": {"allOf": [{"type": "string"}, {"minLength": 2}]}}, ["a", 3]),
    "not not": ({"not": {"not": {"type": "boolean"}}}, [True]),
    "not items": ({"type": "array", "not": {"items": {"type": "string"}}}, [[3]]),
    "not properties": ({"type": "object", "not": {"properties": {"a": {"const": 3}}}}, [{"a": 12}]),
    "not a class of characters": ({"type": "string", "not": {"pattern": "^[a-b]+$"}}, ["cd"]),
    "not what is defined": ({"not": {"$ref": "#/$defs/t"}, "$defs": {"t": {"type": "string"}}}, [3]),
    "dependencies": ({"properties": ABC, "dependencies": {"a": ["b"]}}, [{"b": "a"}, {"a": 3, "b": "a"}]),
    "dependent schemas": ({"dependentSchemas": {"a": {"required": ["b"]}}}, [{"b": 3}, {"a": 3, "b": 3}]),
    "dependent names": ({"properties": ABC, "dependentRequired": {"b": ["c"]}}, [{"a": 3}, {"b": "a", "c": 3}]),
    "if": (
        {
            "properties": ABC,
            "if": {"properties": {"a": {"const": 3}}, "required": ["a"]},
            "then": {"required": ["b"]},
            "else": {"required": ["c"]},
        },
        [{"a": 3, "b": "a"}, {"a": 12, "c": None}],
    ),
    "contains": ({"type": "array", "contains": {"type": "integer"}}, [[3, "a"]]),
    "contains some": ({"type": "array", "contains": {"const": 3}, "minContains": 2, "minItems": 3}, [[3, 3, "a"]]),
    "names by pattern": ({"type": "object", "propertyNames": {"pattern": "^x"}}, [{"xy": 3}, {}]),
    "names by length": ({"properties": ABC, "propertyNames": {"maxLength": 1}}, [{"a": 3}]),
    "listed names": ({"propertyNames": {"enum": ["a", "xy"]}, "additionalProperties": {"minimum": 3}}, [{"xy": 3}]),
    "least properties": ({"type": "object", "properties": ABC, "minProperties": 1}, [{"a": 3}, {"c": 3}]),
    "most properties": ({"type": "object", "properties": ABC, "maxProperties": 1}, [{"a": 3}, {}]),
    "some properties": ({"properties": ABC, "minProperties": 2, "maxProperties": 2}, [{"a": 3, "b": "a"}]),
    "one of types": ({"oneOf": [{"type": "string"}, {"type": ["null", "integer"]}]}, ["a", None, 3]),
    "one of names": ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": ABC}, [{"a": 3}, {"b": "a"}]),
    "one of kinds": (
        {
            "oneOf": [
                {"properties": {"c": {"const": kind}, "a": {"type": type}}, "required": ["c"]}
                for kind, type in (("ab", "string"), ("cd", "integer"))
            ],
            "type": "object",
        },
        [{"c": "cd", "a": 3}],
    ),
    "nothing unevaluated": ({"type": "object", "properties": ABC, "unevaluatedProperties": False}, [{"a": 3}]),
}


@pytest.mark.parametrize(("schema", "followed"), SCHEMAS.values(), ids=SCHEMAS)
def test_only_what_follows_the_schema_is_taken(schema, followed):
    result, rng = compiled(schema), random.Random(1)
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    assert (result.error, result.relaxed) == ("", ())
    takes = taking(result)
    for example in followed:
        assert validator.is_valid(example)
        assert takes(example), example
    for example in (value(rng) for _ in range(100)):
        assert validator.is_valid(example) or not takes(example), example


@pytest.mark.parametrize(
    ("schema", "word", "violating"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems", [3, 3]),
        ({"propertyNames": {"pattern": "^a", "maxLength": 2}}, "propertyNames", {"b": 3}),
        ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}], "type": "integer"}, "oneOf", 12),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", 3),
        ({"type": "string", "format": "regex"}, "format", "("),
        ({"type": "object", "minProperties": 2}, "minProperties", None),
    ],
    ids=["uniqueItems", "propertyNames", "oneOf", "oneOf that takes nothing", "format", "minProperties"],
)
def test_what_cannot_be_followed_is_relaxed_and_named(schema, word, violating):
    result = compiled(schema)
    assert (result.error, result.relaxed) == ("", (word,))
    assert violating is None or taking(result)(violating)


@pytest.mark.parametrize("schema", [{"not": {"multipleOf": 3}}, {"contains": {}, "maxContains": 2}, {"not": {}}])
def test_what_can_be_neither_followed_nor_relaxed_is_refused(schema):
    assert compiled(schema).error


@pytest.mark.parametrize(
    "schema", [{"enum": 3}, {"properties": []}, {"required": 3}, {"oneOf": {}}, {"not": 3}, {"if": 3, "then": {}}]
)
def test_what_is_no_schema_is_refused_in_a_sentence(schema):
    assert compiled({**schema, "uniqueItems": True}).error.startswith("Answers cannot be held to this JSON schema: ")


def test_names_of_properties_are_no_words_of_a_schema():
    schema = {"properties": {"format": {"type": "integer"}, "not": {"type": "integer"}}, "additionalProperties": False}
    assert taking(compiled(schema))({"format": 3, "not": 3})
    assert taking(compiled({"const": {"uniqueItems": True, "format": "x"}}))({"uniqueItems": True, "format": "x"})


def test_a_definition_anywhere_is_translated():
    schema = {"$ref": "#/components/schemas/date", "components": {"schemas": {"date": {"format": "colour"}}}}
    assert taking(compiled(schema))("red")


def test_a_schema_within_a_grammar_is_translated_too():
    lark = 'start: "say " %json {"type": "array", "uniqueItems": true, "items": {"format": "colour"}}'
    result = compile_here("lark", lark)
    assert (result.error, result.relaxed) == ("", ("uniqueItems",))
    matcher = LLMatcher(BYTES, result.source, log_level=0)
    assert matcher.consume_tokens(list(b'say ["red"'))
    allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
    assert bytes(allowed[allowed < 256].tolist()) == b",]"  # and no whitespace before them


def test_llama_cpps_grammars_are_read():
    result = compile_here("lark", 'root ::= "a" number+\nnumber ::= [0-9]')
    matcher = LLMatcher(BYTES, result.source, log_level=0)
    assert matcher.try_consume_tokens(list(b"a12b")) == 3
    assert "number" in compile_here("lark", 'root ::= "a" number').error
