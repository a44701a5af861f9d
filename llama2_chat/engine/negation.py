"""What can be told from a JSON schema: its types and values, whether two exclude each other, and what it does not take.

A negation takes nothing that the schema takes, and perhaps not all that it refuses: an answer that follows the
negation follows `not`. CannotSay is raised where only an empty one is left.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Any

ALL_TYPES = frozenset({"array", "boolean", "null", "number", "object", "string"})
MAX_DEPTH = 12  # of references and of what is negated
# A pattern of one class of characters, which every character must be in.
ONE_CLASS = re.compile(r"\^(\[(?!\^)(?:[^\]\\]|\\.)+\])[+*]\$")


class CannotSay(Exception):
    """There is no narrower way to say it here."""


class Reader:
    """Reads the parts of one schema, which may refer to each other."""

    def __init__(self, root: Any) -> None:
        self._root = root

    def resolve(self, schema: Any) -> Any:
        """What it refers to, if that is all it says."""
        for _ in range(MAX_DEPTH):
            if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
                return schema
            schema = self._target(schema["$ref"])
        raise CannotSay

    def _target(self, pointer: str) -> Any:
        if not pointer.startswith("#"):
            raise CannotSay
        target = self._root
        for part in pointer[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part)] if isinstance(target, list) else target[part]
            except (LookupError, ValueError, TypeError):
                raise CannotSay from None
        return target

    def types(self, schema: Any, depth: int = 0) -> frozenset[str]:
        """Types that it may take; integers are numbers."""
        with contextlib.suppress(CannotSay):
            schema = self.resolve(schema)
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return ALL_TYPES if schema is not False else frozenset()
        found = ALL_TYPES
        if "type" in schema:
            named = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            found &= {"number" if name == "integer" else name for name in named}
        if (values := self.values(schema)) is not None:
            found &= {_type(value) for value in values}
        for word in ("anyOf", "oneOf"):
            if word in schema:
                found &= frozenset().union(*(self.types(each, depth + 1) for each in schema[word]))
        for each in schema.get("allOf", []):
            found &= self.types(each, depth + 1)
        return found

    def values(self, schema: Any) -> list[Any] | None:
        """All that it may take, or None if it does not list them."""
        with contextlib.suppress(CannotSay):
            schema = self.resolve(schema)
        if not isinstance(schema, dict):
            return None
        if "const" in schema:
            return [schema["const"]]
        return schema["enum"] if isinstance(schema.get("enum"), list) else None

    def are_disjoint(self, one: Any, other: Any) -> bool:
        """Whether it is plain that nothing is both: of other types, other values, or with another constant in it."""
        if not self.types(one) & self.types(other):
            return True
        if _none_in_common(self.values(one), self.values(other)):
            return True
        with contextlib.suppress(CannotSay):
            one, other = self.resolve(one), self.resolve(other)
        if not (self.types(one) == self.types(other) == {"object"}):
            return False
        common = set(one.get("required", [])) & set(other.get("required", []))
        properties = [each.get("properties", {}) for each in (one, other)]
        return any(_none_in_common(*(self.values(each.get(name)) for each in properties)) for name in common)

    def name_pattern(self, names: Any) -> str | None:
        """A pattern that says what names of properties may be; None if it says nothing."""
        if not isinstance(names, dict):
            if names is False:
                return "^[^\\s\\S]$"
            return None
        says = {word: value for word, value in names.items() if word in NEGATIONS or word == "format"}
        says.pop("type", None)
        if not says:
            return None
        if says.keys() == {"pattern"}:
            return names["pattern"]
        if says.keys() <= {"enum", "const"} and (values := self.values(names)) is not None:
            return f"^({'|'.join(re.escape(value) for value in values if isinstance(value, str))})$"
        if says.keys() <= {"minLength", "maxLength"}:
            return f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
        raise CannotSay

    def negation(self, schema: Any, depth: int = 0) -> Any:
        """A schema that takes nothing that this one takes."""
        if depth > MAX_DEPTH:
            raise CannotSay
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict):
            raise CannotSay
        alternatives: list[Any] = []
        if "$ref" in schema:
            alternatives.append(self.negation(self.resolve(schema), depth + 1))
        says = [word for word in schema if word in NEGATIONS]
        for word in says:
            with contextlib.suppress(CannotSay, TypeError, ValueError):
                alternatives += NEGATIONS[word](self, schema, depth + 1)
        if not says and not alternatives and not _asserts(schema):
            return False
        if not alternatives:
            raise CannotSay
        return alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}

    # ---- What violates one word ----

    def _all_of(self, schema: Any, depth: int) -> list[Any]:
        return self._each(schema["allOf"], lambda each: self.negation(each, depth))

    def _any_of(self, schema: Any, depth: int, word: str = "anyOf") -> list[Any]:
        return [{"allOf": [self.negation(each, depth) for each in schema[word]]}]

    def _properties(self, schema: Any, depth: int) -> list[Any]:
        def violated(name: str) -> Any:
            return _object({name: self.negation(schema["properties"][name], depth)}, [name])

        return self._each(schema["properties"], violated)

    def _items(self, schema: Any, depth: int) -> list[Any]:
        if "prefixItems" in schema or isinstance(schema["items"], list):
            raise CannotSay
        return [{"type": "array", "prefixItems": [self.negation(schema["items"], depth)], "minItems": 1}]

    def _contains(self, schema: Any, depth: int) -> list[Any]:
        if "minContains" in schema or "maxContains" in schema:
            raise CannotSay
        return [{"type": "array", "items": self.negation(schema["contains"], depth)}]

    def _each(self, parts: Iterable[Any], violated: Callable[[Any], Any]) -> list[Any]:
        """Those of them that can be said."""
        found = []
        for part in parts:
            with contextlib.suppress(CannotSay):
                found.append(violated(part))
        return found


def _asserts(schema: dict[str, Any]) -> bool:
    """Whether it may refuse anything, in words that cannot be negated here."""
    return bool(schema.keys() & UNNEGATED)


def _object(properties: Any, required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _other_types(types: Any) -> list[Any]:
    named = {types} if isinstance(types, str) else set(types)
    others = ALL_TYPES - {"number" if name == "integer" else name for name in named}
    return [{"type": sorted(others)}] if others else []


def _other_values(values: list[Any]) -> list[Any]:
    found = _other_types({_type(value) for value in values})
    strings = {value for value in values if isinstance(value, str)}
    if strings:
        found.append({"type": "string", "pattern": f"^{_none_of(strings)}$"})
    numbers = [value for value in values if _type(value) == "number"]
    if numbers:
        found.append({"type": "number", "exclusiveMinimum": max(numbers)})
        found.append({"type": "number", "exclusiveMaximum": min(numbers)})
    booleans = [value for value in values if isinstance(value, bool)]
    if len(set(booleans)) == 1:
        found.append({"const": not booleans[0]})
    return found


def _none_of(strings: set[str]) -> str:
    """A regular expression of all strings but these."""
    if not strings:
        return "[\\s\\S]*"
    firsts = sorted({string[0] for string in strings if string})
    written = [f"\\x{{{ord(first):x}}}" for first in firsts]
    parts = [f"[^{''.join(written)}][\\s\\S]*" if firsts else "[\\s\\S]+"]
    for first, escaped in zip(firsts, written, strict=True):
        parts.append(escaped + _none_of({string[1:] for string in strings if string[:1] == first}))
    return f"({'|'.join(parts)}){'' if '' in strings else '?'}"


def _outside_class(pattern: str) -> list[Any]:
    match = ONE_CLASS.fullmatch(pattern)
    if match is None:
        raise CannotSay
    return [{"type": "string", "pattern": f"[^{match[1][1:]}"}]


def _bound(word: str, other: str, kind: str) -> Callable[[Reader, Any, int], list[Any]]:
    """A bound is violated by the opposite one. Draft 4 has exclusive ones that are true or false."""

    def violated(_: Reader, schema: Any, depth: int) -> list[Any]:
        if isinstance(schema[word], bool) or isinstance(schema.get(f"exclusive{word[0].upper()}{word[1:]}"), bool):
            raise CannotSay
        return [{"type": kind, other: schema[word]}]

    return violated


def _count(word: str, other: str, kind: str, step: int) -> Callable[[Reader, Any, int], list[Any]]:
    def violated(_: Reader, schema: Any, depth: int) -> list[Any]:
        count = schema[word] + step
        return [{"type": kind, other: count}] if count >= 0 else []

    return violated


def _type(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
    return "null"


def _none_in_common(one: list[Any] | None, other: list[Any] | None) -> bool:
    if one is None or other is None:
        return False
    return not any(_type(a) == _type(b) and a == b for a in one for b in other)


NEGATIONS: dict[str, Callable[[Reader, Any, int], list[Any]]] = {
    "type": lambda _, schema, depth: _other_types(schema["type"]),
    "const": lambda _, schema, depth: _other_values([schema["const"]]),
    "enum": lambda _, schema, depth: _other_values(schema["enum"]),
    "not": lambda _, schema, depth: [schema["not"]],
    "allOf": Reader._all_of,
    "anyOf": Reader._any_of,
    "oneOf": lambda reader, schema, depth: reader._any_of(schema, depth, "oneOf"),
    "required": lambda _, schema, depth: [_object({name: False}, []) for name in schema["required"]],
    "properties": Reader._properties,
    "items": Reader._items,
    "contains": Reader._contains,
    "pattern": lambda _, schema, depth: _outside_class(schema["pattern"]),
    "minimum": _bound("minimum", "exclusiveMaximum", "number"),
    "maximum": _bound("maximum", "exclusiveMinimum", "number"),
    "exclusiveMinimum": _bound("exclusiveMinimum", "maximum", "number"),
    "exclusiveMaximum": _bound("exclusiveMaximum", "minimum", "number"),
    "minLength": _count("minLength", "maxLength", "string", -1),
    "maxLength": _count("maxLength", "minLength", "string", 1),
    "minItems": _count("minItems", "maxItems", "array", -1),
    "maxItems": _count("maxItems", "minItems", "array", 1),
    "minProperties": _count("minProperties", "maxProperties", "object", -1),
    "maxProperties": _count("maxProperties", "minProperties", "object", 1),
}
UNNEGATED = {
    "additionalItems", "additionalProperties", "dependencies", "dependentRequired", "dependentSchemas", "if",
    "multipleOf", "patternProperties", "prefixItems", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
    "uniqueItems", "format", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
