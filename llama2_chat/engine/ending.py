"""How many tokens JSON of a schema may need to come to its end: estimates, on which way_out.py then goes along."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from llama2_chat.engine.negation import CannotSay, Reader

# What way_out.py writes of several types, the first that it may, and how many tokens that takes at most.
SHORTEST = {"string": 2, "integer": 20, "number": 20, "null": 1, "boolean": 1, "array": 2, "object": 2}
PATTERN = 40  # of what follows a pattern or a format: a uuid has 36 characters
FORM = 4  # quotes, a colon, a comma
WAYS = ("allOf", "anyOf", "oneOf", "prefixItems", "items", "additionalProperties", "unevaluatedProperties")
NAMED_WAYS = ("properties", "patternProperties", "$defs", "definitions")


class Ending(NamedTuple):
    least: int  # tokens from the beginning of a value to its end
    step: int  # by how many more one token may put the end off: what it may open

    def within(self, depth: int) -> int:
        """Tokens from anywhere to the end, where so many brackets and braces are open."""
        return self.least + self.step * (depth + 1)


def longest(endings: Iterable[Ending | None]) -> Ending | None:
    """Of any of them; None if one has no bound, or there are none."""
    known = list(endings)
    bounds = [each for each in known if each is not None]
    if not bounds or len(bounds) < len(known):
        return None
    return Ending(max(each.least for each in bounds), max(each.step for each in bounds))


def ending_of(schema: Any) -> Ending | None:
    """Of JSON that follows the schema; None for a schema that has no such bound, or is none."""
    measured = _Measure(schema)
    try:
        least, step = measured.least(schema), max(map(measured.opened, [("", True), *_within(schema)]))
    except (AttributeError, RecursionError, TypeError, ValueError):
        return None
    return Ending(int(least), int(step)) if least + step < math.inf else None


class _Measure:
    """How long values of one schema's parts are that way_out.py writes. What refers to itself in them is endless."""

    def __init__(self, root: Any) -> None:
        self._read = Reader(root)
        self._known: dict[int, float] = {}

    def opened(self, part: tuple[str, Any]) -> float:
        """What a token may begin with that opens this part, a property of this name if it has one."""
        name, schema = part
        return _literal(name) + FORM + self.least(schema)

    def least(self, schema: Any) -> float:
        if id(schema) not in self._known:
            self._known[id(schema)] = math.inf  # while it is measured
            self._known[id(schema)] = self._least(schema)
        return self._known[id(schema)]

    def _least(self, schema: Any) -> float:
        if not isinstance(schema, dict):
            return SHORTEST["string"]
        if (values := self._read.values({**schema, "$ref": None})) is not None:
            return max(map(_literal, values), default=0)
        parts = sum(map(self.least, schema.get("allOf", ())))
        if "$ref" in schema:
            try:
                return parts + self.least(self._read.resolve({"$ref": schema["$ref"]}))
            except CannotSay:
                return math.inf
        for word in ("anyOf", "oneOf"):
            if word in schema:
                parts += self._of_first(schema[word])
        return parts + (self._of_type(self._type(schema), schema) if "type" in schema or not parts else 0)

    def _of_first(self, alternatives: list[Any]) -> float:
        """Of the one that is written, or the longest of those that begin alike."""
        first = min((self._rank(each) for each in alternatives), default=0)
        return max((self.least(each) for each in alternatives if self._rank(each) == first), default=0)

    def _rank(self, schema: Any) -> int:
        types = self._read.types(schema)
        return next((n for n, name in enumerate(SHORTEST) if name in types), len(SHORTEST))

    def _type(self, schema: dict[str, Any]) -> str:
        named = schema.get("type", "object" if "properties" in schema else "string")
        return min([named] if isinstance(named, str) else named, key=[*SHORTEST].index)

    def _of_type(self, name: str, schema: dict[str, Any]) -> float:
        shortest = SHORTEST[name]
        if name == "string":
            is_patterned = "pattern" in schema or "format" in schema
            return shortest + max(schema.get("minLength", 0), PATTERN if is_patterned else 0)
        if name == "array":
            return shortest + self._of_items(schema.get("prefixItems", ()), schema)
        return shortest + (self._of_properties(schema) if name == "object" else 0)

    def _of_items(self, first: list[Any], schema: dict[str, Any]) -> float:
        count = schema.get("minItems", 0)
        others = max(count - len(first), 0)
        more = others * (FORM + self.least(schema.get("items"))) if others else 0
        return more + sum(FORM + self.least(each) for each in first[:count])

    def _of_properties(self, schema: dict[str, Any]) -> float:
        """On the way to one that is required, others may be taken along."""
        names, count = schema.get("properties", {}), schema.get("minProperties", 0)
        if not (schema.get("required") or count):
            return 0
        more = [(name, True) for name in schema.get("required", ()) if name not in names]
        return sum(map(self.opened, [*names.items(), *more])) + count * self.opened(("", True))


def _within(schema: Any) -> Iterator[tuple[str, Any]]:
    """All schemas within it, with their names if they are properties."""
    if not isinstance(schema, dict):
        return
    below = [item for word in NAMED_WAYS if isinstance(schema.get(word), dict) for item in schema[word].items()]
    for word in WAYS:
        parts = schema.get(word, ())
        below += [("", part) for part in (parts if isinstance(parts, list | tuple) else [parts])]
    for name, part in below:
        yield name, part
        yield from _within(part)


def _literal(value: Any) -> int:
    """Tokens of a value in JSON: two characters of most texts, one of others and of digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    return 2 + sum(1 if char.isdigit() or char > "\x7f" else 0.5 for char in text).__ceil__()
