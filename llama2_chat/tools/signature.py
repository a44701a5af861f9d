"""A tool as a person would note it down, and arguments that it would take, as an example. Both from its JSON schema."""

from __future__ import annotations

import json
from typing import Any

from llama2_chat.types import Tool

DEEPEST = 4  # objects in objects that are written out
NUMBERS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")


def signature(tool: Tool) -> str:
    """One line: name, parameters with their types, and what it does."""
    schema = tool.parameters or {}
    described = " ".join(tool.description.split())
    return f"{tool.name}({_fields(schema, schema, 0)})" + (f": {described}" if described else "")


def sample_arguments(tool: Tool) -> dict[str, Any]:
    """Arguments of the tool's types, for an example; patterns and formats are beyond it."""
    schema = tool.parameters or {}
    value = _sample(schema, schema, "value", 0)
    return value if isinstance(value, dict) else {}


def _fields(schema: Any, root: dict[str, Any], depth: int) -> str:
    schema = _resolved(schema, root)
    properties, required = _properties(schema), _required(schema)
    written = []
    for name, value in properties.items():
        described = _resolved(value, root).get("description")
        notes = [_type(value, root, depth)]
        notes += [] if name in required else ["optional"]
        notes += [" ".join(described.split())] if isinstance(described, str) and depth == 0 else []
        written.append(f"{name}: {', '.join(notes)}")
    return "; ".join(written)


def _type(schema: Any, root: dict[str, Any], depth: int) -> str:
    schema = _resolved(schema, root)
    if "const" in schema or isinstance(schema.get("enum"), list):
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema.get("enum", [schema.get("const")]))
    if isinstance(choices := schema.get("anyOf") or schema.get("oneOf"), list) and depth < DEEPEST:
        return " | ".join(dict.fromkeys(_type(choice, root, depth + 1) for choice in choices))
    kind = schema.get("type", "object" if "properties" in schema else "any")
    if kind == "array" and depth < DEEPEST:
        return f"list of {_type(schema.get('items'), root, depth + 1)}"
    if kind == "object" and _properties(schema) and depth < DEEPEST:
        return f"{{{_fields(schema, root, depth + 1)}}}"
    return " | ".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def _sample(schema: Any, root: dict[str, Any], name: str, depth: int) -> Any:
    schema = _resolved(schema, root)
    for given in ("const", "default"):
        if given in schema and not (given == "default" and schema[given] is None):
            return schema[given]
    for given in ("enum", "examples"):
        if isinstance(schema.get(given), list) and schema[given]:
            return schema[given][0]
    if isinstance(choices := schema.get("anyOf") or schema.get("oneOf"), list) and choices and depth < DEEPEST:
        return _sample(choices[0], root, name, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) and kind else kind:
        case "integer" | "number":
            return next((schema[bound] for bound in NUMBERS if isinstance(schema.get(bound), int)), 1)
        case "boolean":
            return True
        case "null":
            return None
        case "array":
            return [_sample(schema.get("items"), root, name, depth + 1)] if depth < DEEPEST else []
        case "object":
            required = _required(schema) or list(_properties(schema))[:1]
            fields = [(each, _properties(schema).get(each)) for each in required]
            return {each: _sample(value, root, each, depth + 1) for each, value in fields} if depth < DEEPEST else {}
    return f"some {name}".replace("_", " ")


def _resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """The schema, or what it refers to within the root; an empty one for whatever cannot be read."""
    for _ in range(DEEPEST):
        if not (isinstance(schema, dict) and isinstance(ref := schema.get("$ref"), str) and ref.startswith("#")):
            break
        target: Any = root
        for part in ref.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, dict) else None
        schema = target
    return schema if isinstance(schema, dict) else {}


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _required(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
