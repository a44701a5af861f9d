"""Parameters as answers are held to them: nothing but what the tool names, and strings that end before the answer does.

Both only narrow a schema, so that whatever follows the narrower one follows the tool's own.
"""

from __future__ import annotations

import json
from typing import Any

from llama2_chat.errors import BadGrammar
from llama2_chat.types import GrammarSpec, Tool, ToolOffer

ANYTHING: dict[str, Any] = {"type": "object"}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANNOTATIONS = {"title", "description", "default", "examples"}
# Beside these, what an object may hold cannot be told from its own properties.
OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref", "not"}
# Where they stand, a string has an end, or more than one kind of it.
BOUNDED = {"maxLength", "enum", "const", "format", "pattern"}
SHORTEST = 8  # characters that a string may always have
FORM_TOKENS = 12  # of a call, besides its strings and the names that its schema holds
# Of most texts a token holds more, of digits and some languages less.
CHARACTERS_PER_TOKEN = 2


def parameters(tool: Tool, most_tokens: int | None = None) -> dict[str, Any]:
    """The JSON schema of a tool's arguments, an object's always.

    most_tokens: of the whole answer; None if there is room for everything.
    """
    schema = NOTHING if tool.parameters is None else tool.parameters or ANYTHING
    if "type" not in schema and "$ref" not in schema:
        schema = {**schema, "type": "object"}
    closed = _closed(schema)
    if most_tokens is None:
        return closed
    strings = _count_strings(closed)
    written = FORM_TOKENS + len(json.dumps(closed.get("properties", ""))) // CHARACTERS_PER_TOKEN // 2
    room = (most_tokens - written) * CHARACTERS_PER_TOKEN
    return _bounded(closed, max(room // strings, SHORTEST)) if strings else closed


def call_schemas(offer: ToolOffer, arguments: str, most_tokens: int | None = None) -> dict[str, dict[str, Any]]:
    """Of a call as JSON, under a name for each tool. arguments: the name that they have in it."""
    return {
        f"tool{i}": closed_object(name={"const": tool.name}, **{arguments: parameters(tool, most_tokens)})
        for i, tool in enumerate(offer.callable)
    }


def schema_of(answer: GrammarSpec) -> dict[str, Any]:
    """Raises BadGrammar for another grammar."""
    if answer.kind != "json_schema":
        raise BadGrammar("Beside tools, an answer can follow a JSON schema only, no other grammar.")
    schema: dict[str, Any] = json.loads(answer.text)
    return schema


def one_of(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What follows any of the schemas, whose references within themselves still hold."""
    definitions = {name: _moved(schema, f"#/$defs/{name}") for name, schema in schemas.items()}
    return {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in schemas], "$defs": definitions}


def closed_object(**properties: dict[str, Any]) -> dict[str, Any]:
    """Of an object that has all of these and nothing else. What they refer to within themselves is found there."""
    at_home = {name: _moved(schema, f"#/properties/{name}") for name, schema in properties.items()}
    return {"type": "object", "properties": at_home, "required": list(at_home), "additionalProperties": False}


def _moved(schema: Any, path: str) -> Any:
    if isinstance(schema, list):
        return [_moved(each, path) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, path) for name, value in schema.items()}
    ref = moved.get("$ref")
    return {**moved, "$ref": path + ref[1:]} if isinstance(ref, str) and ref.startswith("#") else moved


def _closed(schema: Any) -> Any:
    """Without annotations, and without room for more properties: a small model goes on adding some of its own."""

    def close(schema: dict[str, Any]) -> dict[str, Any]:
        schema = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
        is_object = "properties" in schema and not OPEN & schema.keys()
        return {**schema, "additionalProperties": False} if is_object else schema

    return _changed(schema, close)


def _bounded(schema: Any, most: int) -> Any:
    def bound(schema: dict[str, Any]) -> dict[str, Any]:
        if not _is_free_string(schema):
            return schema
        least = schema.get("minLength")
        return {**schema, "maxLength": max(most, least) if isinstance(least, int) else most}

    return _changed(schema, bound)


def _is_free_string(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "string" and not BOUNDED & schema.keys()


def _count_strings(schema: Any) -> int:
    found = 0

    def count(schema: dict[str, Any]) -> dict[str, Any]:
        nonlocal found
        found += _is_free_string(schema)
        return schema

    _changed(schema, count)
    return found


def _changed(schema: Any, change: Any) -> Any:
    """The schema with each schema in it changed, but within `allOf`, whose members all hold at once, and `not`."""
    if not isinstance(schema, dict):
        return schema
    below = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(members := below.get(name), dict):
            below[name] = {key: _changed(value, change) for key, value in members.items()}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(members := below.get(name), list) and "properties" not in below:
            below[name] = [_changed(value, change) for value in members]
    for name in ("items", "additionalProperties"):
        if isinstance(below.get(name), dict):
            below[name] = _changed(below[name], change)
    return change(below)
