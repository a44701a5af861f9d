"""What an answer is asked to follow over HTTP, in whoever's words."""

import json
import re

import pytest

from tests.support.programs import HELLO

LETTERS = ["yes.", "no ä"]
JSON = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
FIELDS = [
    ({"guided_json": JSON}, r'\{"a": (true|false)\}'),
    ({"guided_json": json.dumps(JSON)}, r'\{"a": (true|false)\}'),
    ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
    ({"guided_choice": LETTERS}, r"yes\.|no ä"),
    ({"guided_grammar": 'root ::= "a" [0-9]'}, "a[0-9]"),
    ({"structured_outputs": {"json": JSON, "disable_any_whitespace": True}}, r'\{"a": (true|false)\}'),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ({"structured_outputs": {"choice": LETTERS}}, r"yes\.|no ä"),
    ({"structured_outputs": {"grammar": 'start: "a" /[0-9]/'}}, "a[0-9]"),
    ({"grammar": 'root ::= "a" [0-9]'}, "a[0-9]"),
    ({"json_schema": JSON}, r'\{"a": (true|false)\}'),
    ({"response_format": {"type": "json_object", "schema": JSON}}, r'\{"a": (true|false)\}'),
]


@pytest.mark.parametrize(("fields", "pattern"), FIELDS, ids=[json.dumps(fields)[:40] for fields, _ in FIELDS])
def test_a_grammar_is_followed_in_whoevers_words_it_comes(http, fields, pattern):
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "temperature": 2, "max_tokens": 30, **fields})
    choice = answer.json()["choices"][0]
    assert re.fullmatch(pattern, choice["message"]["content"]), choice
    assert choice["finish_reason"] == "stop"


def test_a_text_is_completed_by_a_choice_too(http):
    answer = http.post("/v1/completions", json={"prompt": "Is it?", "max_tokens": 30, "guided_choice": LETTERS})
    assert answer.json()["choices"][0]["text"] in LETTERS


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {}, "guided_json": "", "guided_regex": "", "guided_choice": [], "grammar": ""},
        {"structured_outputs": None, "guided_json": False, "guided_grammar": None, "json_schema": None},
        {"structured_outputs": {"json_object": False}, "response_format": {"type": "text"}},
    ],
)
def test_fields_that_are_empty_ask_for_nothing(http, fields):
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0}
    free, empty = (http.post("/v1/chat/completions", json=each).json() for each in (body, body | fields))
    assert free["choices"] == empty["choices"]


@pytest.mark.parametrize(
    ("fields", "name", "why"),
    [
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_choice": "yes"}, "guided_choice", "list"),
        ({"guided_choice": [3]}, "guided_choice", "string"),
        ({"guided_json": "[]"}, "guided_json", "JSON object"),
        ({"guided_grammar": 'root ::= "a'}, "guided_grammar", "this grammar"),
        ({"grammar": "nothing"}, "grammar", "this grammar"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one grammar only"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format", "one grammar only"),
        ({"guided_regex": "(a{1000}){1000}"}, "guided_regex", "regular expression"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format", "json_object only"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_grammar_that_cannot_be_followed_is_refused_by_the_name_of_its_field(http, fields, name, why):
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, name, "invalid_value")
    assert why in error["message"]


TAGS = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 2, "uniqueItems": True}


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_what_is_relaxed_of_a_schema_stands_in_a_header(http, stream):
    body = {"messages": HELLO, "max_tokens": 20, "stream": stream}
    formats = [{"type": "json_schema", "json_schema": {"name": "x", "schema": each}} for each in (TAGS, JSON)]
    relaxed, whole = (http.post("/v1/chat/completions", json=body | {"response_format": each}) for each in formats)
    assert relaxed.headers["X-Schema-Relaxed"] == "uniqueItems"
    assert "X-Schema-Relaxed" not in whole.headers


def test_nothing_is_relaxed_where_the_schema_is_strict(http):
    strict = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": TAGS}}
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "response_format": strict})
    assert answer.status_code == 400
    assert "uniqueItems" in answer.json()["error"]["message"]
