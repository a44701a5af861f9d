"""A tool's input as an MCP server describes it, in what a grammar can follow, and in words that a model reads.

The server checks what it gets; the grammar only has to lead there. So what is not understood is left out, and a
description that makes no sense at all becomes any object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ANY_OBJECT = {"type": "object"}
TYPES = {"string", "number", "integer", "boolean", "null", "array", "object"}
COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
LIMITS = ("minimum", "maximum")
MOST_NODES = 200
MOST_CHOICES = 100
MOST_COUNTED = 1_000
MOST_CHARACTERS = 20_000  # of all of it in JSON
LARGEST = 1e15  # a limit of numbers; what is beyond, infinity above all, limits nothing
WRITTEN = 300  # characters of the signature


def simplified(schema: Any) -> dict[str, Any]:
    """The same without references and rare words; ANY_OBJECT for what is no schema of an object."""
    try:
        simple = _Simplifier(schema).node(schema, ())
        written = json.dumps(simple, allow_nan=False)
    except (_NoSchema, RecursionError, TypeError, ValueError):
        return ANY_OBJECT
    return simple if simple.get("type") == "object" and len(written) <= MOST_CHARACTERS else ANY_OBJECT


def signature(schema: Mapping[str, Any]) -> str:
    """Of a simplified schema: {path: string, limit?: integer}."""
    text = _written(schema)
    return text if len(text) <= WRITTEN else text[: WRITTEN - 1] + "…"


class _NoSchema(Exception):
    pass


class _Simplifier:
    def __init__(self, root: Any) -> None:
        self._root, self._nodes = root, 0

    def node(self, schema: Any, inside: tuple[str, ...]) -> dict[str, Any]:
        """inside: the references that lead here; one that comes again has no end."""
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise _NoSchema
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise _NoSchema
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in inside:
                raise _NoSchema
            return self.node(self._target(reference), (*inside, reference))
        if "const" in schema:
            return {"const": schema["const"]}
        if isinstance(schema.get("enum"), list) and 0 < len(schema["enum"]) <= MOST_CHOICES:
            return {"enum": schema["enum"]}
        for word in ("anyOf", "oneOf"):
            if isinstance(schema.get(word), list) and schema[word]:
                return {"anyOf": [self.node(option, inside) for option in schema[word]]}
        return self._typed(schema, inside)

    def _typed(self, schema: dict[str, Any], inside: tuple[str, ...]) -> dict[str, Any]:
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if kinds is None:
            return {}
        if not kinds or not all(kind in TYPES for kind in map(str, kinds if isinstance(kinds, list) else [kinds])):
            raise _NoSchema
        simple: dict[str, Any] = {"type": kinds}
        for word in COUNTS:
            if type(schema.get(word)) is int and 0 <= schema[word] <= MOST_COUNTED:
                simple[word] = schema[word]
        for word in LIMITS:
            if type(schema.get(word)) in (int, float) and -LARGEST <= schema[word] <= LARGEST:
                simple[word] = schema[word]
        for least, most in (*zip(COUNTS[::2], COUNTS[1::2], strict=True), LIMITS):
            if least in simple and most in simple and simple[least] > simple[most]:
                raise _NoSchema
        if "items" in schema:
            simple["items"] = self.node(schema["items"], inside)
        properties = schema.get("properties")
        if isinstance(properties, dict):
            simple["properties"] = {name: self.node(value, inside) for name, value in properties.items()}
            required = schema.get("required", [])
            simple["required"] = [name for name in properties if name in required] if isinstance(required, list) else []
            simple["additionalProperties"] = False
        return simple

    def _target(self, reference: Any) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise _NoSchema
        target = self._root
        for part in reference[2:].split("/"):
            if not isinstance(target, dict) or part not in target:
                raise _NoSchema
            target = target[part]
        return target


def _written(schema: Mapping[str, Any]) -> str:
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " | ".join(map(repr, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(map(_written, schema["anyOf"]))
    if schema.get("properties"):
        required = schema["required"]
        fields = [
            f"{name}{'' if name in required else '?'}: {_written(value)}"
            for name, value in schema["properties"].items()
        ]
        return "{" + ", ".join(fields) + "}"
    kinds = schema.get("type", "anything")
    if kinds == "array":
        return f"[{_written(schema.get('items', {}))}, ...]"
    return " | ".join(kinds) if isinstance(kinds, list) else kinds
