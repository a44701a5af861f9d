"""Parameters as answers are held to them: nothing but what the tool names.

That only narrows a schema, so that whatever follows the narrower one follows the tool's own.
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


def parameters(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments, an object's always."""
    schema = NOTHING if tool.parameters is None else tool.parameters or ANYTHING
    if "type" not in schema and "$ref" not in schema:
        schema = {**schema, "type": "object"}
    closed: dict[str, Any] = _closed(schema)
    return closed


def call_schemas(offer: ToolOffer, arguments: str) -> dict[str, dict[str, Any]]:
    """Of a call as JSON, under a name for each tool. arguments: the name that they have in it."""
    return {
        f"tool{i}": closed_object(name={"const": tool.name}, **{arguments: parameters(tool)})
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
    """Without annotations, and without room for more properties: a small model goes on adding some of its own.

    Not within `allOf`, whose members all hold at once, and `not`.
    """
    if not isinstance(schema, dict):
        return schema
    closed = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
    for name in ("properties", "$defs", "definitions"):
        if isinstance(members := closed.get(name), dict):
            closed[name] = {key: _closed(value) for key, value in members.items()}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(members := closed.get(name), list) and "properties" not in closed:
            closed[name] = [_closed(value) for value in members]
    for name in ("items", "additionalProperties"):
        closed |= {name: _closed(closed[name])} if isinstance(closed.get(name), dict) else {}
    is_object = "properties" in closed and not OPEN & closed.keys()
    return {**closed, "additionalProperties": False} if is_object else closed
