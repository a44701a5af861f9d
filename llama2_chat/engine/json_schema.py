"""A JSON schema in the words that llguidance reads.

What the specification says to ignore goes. What llguidance does not know is said otherwise, exactly or more narrowly,
so that every answer follows the schema. Where that cannot be done for format, minProperties, oneOf, propertyNames or
uniqueItems, they are left out, and named; other words are left for llguidance to refuse. Nothing bounds the work here:
see try_grammar.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from typing import Any

from llama2_chat.engine.negation import ALL_TYPES, CannotSay, Reader

VALUES = {"const", "default", "enum", "example", "examples", "required", "type"}  # not made of schemas
MAPS = {"properties", "patternProperties", "$defs", "definitions"}
# Translated from what they said first, so that nothing is negated that has been narrowed.
LATER = {
    "not", "if", "then", "else", "contains", "propertyNames",
    "dependencies", "dependentRequired", "dependentSchemas",
}  # fmt: skip
MAX_SUBSETS_OF = 6  # values: 64 arrays of different ones, in their order
MAX_ALTERNATIVES = 8  # of a oneOf, and in what each must not be

KNOWN_FORMATS = {
    "date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown",
}  # fmt: skip
NARROWER_FORMATS = {  # those of the specification that llguidance does not know
    "idn-email": {"format": "email"},
    "idn-hostname": {"format": "hostname"},
    "iri": {"format": "uri"},
    "uri-reference": {"format": "uri"},
    "iri-reference": {"format": "uri"},
    "uri-template": {"format": "uri"},
    "json-pointer": {"pattern": "^(/([^~/]|~[01])*)*$"},
    "relative-json-pointer": {"pattern": "^(0|[1-9][0-9]*)(#|(/([^~/]|~[01])*)*)$"},
}
YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26]|0[48])00)"
# llguidance's dates may be in the year 0, and the 29th of February of any.
REAL_DATE = f"^({YEAR}-(0[13-9]|1[0-2]|02-([01][0-9]|2[0-8]))|{LEAP_YEAR}-02-29)"

Schema = dict[str, Any]


class Rewriter:
    """Of one schema. relaxed: names what answers may violate, once rewritten."""

    def __init__(self, root: Schema, exact_one_of: bool = True) -> None:
        """exact_one_of: narrow the alternatives of a oneOf to what no other takes, if that can be said."""
        self._read, self._exact_one_of = Reader(root), exact_one_of
        self._root = {name: value for name, value in root.items() if name != "x-guidance"}  # llguidance's own options
        self.relaxed: set[str] = set()
        self.narrowed_one_of = False

    def rewritten(self) -> Schema:
        return self.rewrite(self._root)

    def rewrite(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        # Where a $ref may point, there stays a schema: words that nobody knows are kept, with what is in them.
        written = {name: self._child(name, value) for name, value in schema.items()}
        more: list[Any] = []
        for translate in TRANSLATIONS:
            with contextlib.suppress(CannotSay):  # then llguidance refuses it, and says so
                more += translate(self, schema, written)
        if more:
            written["allOf"] = [*written.get("allOf", []), *more]
        return written

    def _child(self, name: str, value: Any) -> Any:
        if name in VALUES or name in LATER:
            return value
        if name in MAPS and isinstance(value, dict):
            return {key: self.rewrite(child) for key, child in value.items()}
        return [self.rewrite(child) for child in value] if isinstance(value, list) else self.rewrite(value)

    # ---- One word each: changes `written`, and gives what must hold beside it ----

    def _format(self, schema: Schema, written: Schema) -> list[Any]:
        name = schema.get("format")
        if not isinstance(name, str):
            return []
        if name in ("date", "date-time"):
            return [{"pattern": REAL_DATE}]
        if name in KNOWN_FORMATS:
            return []
        del written["format"]
        if name == "regex":
            self.relaxed.add("format")
        narrower = NARROWER_FORMATS.get(name)
        return [narrower] if narrower else []

    def _unique_items(self, schema: Schema, written: Schema) -> list[Any]:
        if not isinstance(schema.get("uniqueItems"), bool):
            return []
        del written["uniqueItems"]
        most = schema.get("maxItems")
        if not schema["uniqueItems"] or (isinstance(most, int) and most <= 1):
            return []
        values = self._read.values(schema.get("items", True))
        if values is None or len(values) > MAX_SUBSETS_OF or "prefixItems" in schema:
            self.relaxed.add("uniqueItems")
            return []
        sizes = range(schema.get("minItems", 0), min(len(values), schema.get("maxItems", len(values))) + 1)
        subsets = [list(subset) for size in sizes for subset in itertools.combinations(values, size)]
        return [{"anyOf": [{"enum": subsets}, {"type": sorted(ALL_TYPES - {"array"})}]}]

    def _dependencies(self, schema: Schema, written: Schema) -> list[Any]:
        found = []
        for word in ("dependencies", "dependentRequired", "dependentSchemas"):
            if isinstance(schema.get(word), dict):
                found += list(written.pop(word).items())
        return [self._depends(name, dependency) for name, dependency in found]

    def _depends(self, name: str, dependency: Any) -> Schema:
        if isinstance(dependency, str):  # as draft 3 has it
            dependency = [dependency]
        present: Schema = {"required": [name]}
        if isinstance(dependency, list):
            present = {"required": list(dict.fromkeys([name, *dependency]))}
        else:
            present = {"allOf": [present, self.rewrite(dependency)]}
        return {"anyOf": [{"properties": {name: False}}, present]}

    def _not(self, schema: Schema, written: Schema) -> list[Any]:
        if "not" not in schema:
            return []
        negated = self.rewrite(self._read.negation(schema["not"]))
        del written["not"]
        return [negated]

    def _if(self, schema: Schema, written: Schema) -> list[Any]:
        condition, then, other = (written.pop(word, True) for word in ("if", "then", "else"))
        if "if" not in schema or (then is True and other is True):
            return []
        alternatives = [{"allOf": [self.rewrite(condition), self.rewrite(then)]}]
        with contextlib.suppress(CannotSay):  # then the condition always holds
            alternatives.append({"allOf": [self.rewrite(self._read.negation(condition)), self.rewrite(other)]})
        return [{"anyOf": alternatives}]

    def _contains(self, schema: Schema, written: Schema) -> list[Any]:
        """The first items are those that the array must contain."""
        if "contains" not in schema:
            return []
        least = schema.get("minContains", 1)
        if "prefixItems" in schema or isinstance(schema.get("items"), list) or "maxContains" in schema or least > 4:
            raise CannotSay
        del written["contains"]
        written.pop("minContains", None)
        item = {"allOf": [self.rewrite(schema["contains"]), written.get("items", True)]}
        return [{"prefixItems": [item] * least, "minItems": least}] if least else []

    def _property_names(self, schema: Schema, written: Schema) -> list[Any]:
        """As a pattern of the properties that have no name here."""
        if "propertyNames" not in schema:
            return []
        try:
            pattern = self._read.name_pattern(self._read.resolve(schema["propertyNames"]))
            if pattern is not None:
                self._name_by(pattern, schema, written)
        except (CannotSay, re.error):
            self.relaxed.add("propertyNames")
        del written["propertyNames"]
        return []

    def _name_by(self, pattern: str, schema: Schema, written: Schema) -> None:
        if "patternProperties" in schema:
            raise CannotSay
        allowed = re.compile(pattern)
        if "properties" in written:
            properties = written["properties"].items()
            written["properties"] = {name: value if allowed.search(name) else False for name, value in properties}
        others = written.get("additionalProperties", True)
        if others is not False:
            written |= {"patternProperties": {pattern: others}, "additionalProperties": False}

    def _counts(self, schema: Schema, written: Schema) -> list[Any]:
        """minProperties and maxProperties, which llguidance takes only where every named property is required."""
        least, most = schema.get("minProperties", 0), schema.get("maxProperties", math.inf)
        properties, required = schema.get("properties", {}), list(schema.get("required", []))
        if least - len(set(required) | set(properties)) > 1:
            self.relaxed.add("minProperties")  # llguidance lets a name that is not listed come twice
        optional = [name for name, value in properties.items() if name not in required and value is not False]
        if (least == 0 and most == math.inf) or not optional:
            return []
        if most < math.inf:
            optional = self._at_most(most, required, optional, written)
        return self._at_least(least, required, optional, written)

    def _at_most(self, most: int, required: list[str], optional: list[str], written: Schema) -> list[str]:
        """Those that are required, as many as fit of the optional ones, and no others."""
        if "patternProperties" in written:
            raise CannotSay
        kept = optional[: max(0, most - len(required))]
        others = written.get("additionalProperties", True)
        properties = dict.fromkeys(required, others) | written["properties"]
        written["properties"] = {
            name: value if name in required or name in kept else False for name, value in properties.items()
        }
        written["additionalProperties"] = False
        del written["maxProperties"]
        return kept

    def _at_least(self, least: int, required: list[str], optional: list[str], written: Schema) -> list[Any]:
        missing = least - len(required)
        if missing > len(optional):
            written["required"] = required + optional  # and others
            return []
        written.pop("minProperties", None)
        if missing == 1 and 1 < len(optional) <= MAX_ALTERNATIVES:
            return [{"anyOf": _one_of_these(optional)}]
        if missing > 0:
            written["required"] = required + optional[:missing]
        return []

    def _one_of(self, schema: Schema, written: Schema) -> list[Any]:
        """Taken as anyOf by llguidance, so that each alternative must exclude those that it is not disjoint from."""
        alternatives = schema.get("oneOf")
        if not isinstance(alternatives, list):
            return []
        for index, alternative in enumerate(alternatives):
            others = alternatives[:index] + alternatives[index + 1 :]
            overlapping = [other for other in others if not self._read.are_disjoint(alternative, other)]
            if overlapping:
                self._exclude(written["oneOf"], index, overlapping)
        return []

    def _exclude(self, alternatives: list[Any], index: int, others: list[Any]) -> None:
        try:
            if not self._exact_one_of or len(others) > MAX_ALTERNATIVES:
                raise CannotSay
            excluded = [self._read.negation(other) for other in others]
            if any(len(other.get("anyOf", ())) > MAX_ALTERNATIVES for other in excluded if isinstance(other, dict)):
                raise CannotSay
        except CannotSay:
            self.relaxed.add("oneOf")
            return
        self.narrowed_one_of = True
        narrowed = [self.rewrite(other) for other in excluded]
        alternative = alternatives[index] if isinstance(alternatives[index], dict) else {}
        alternatives[index] = {**alternative, "allOf": [*alternative.get("allOf", []), *narrowed]}

    def _unevaluated(self, schema: Schema, written: Schema) -> list[Any]:
        applicators = {"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "$dynamicRef"}
        for word, usual in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
            if word in schema and usual in schema:
                del written[word]
            elif word in schema and not applicators & schema.keys():
                written[usual] = written.pop(word)
        return []


def _one_of_these(names: list[str]) -> list[Schema]:
    """At least one of them: the first that is there."""
    return [{"required": [name], "properties": dict.fromkeys(names[:index], False)} for index, name in enumerate(names)]


TRANSLATIONS = (
    Rewriter._format,
    Rewriter._unique_items,
    Rewriter._dependencies,
    Rewriter._not,
    Rewriter._if,
    Rewriter._contains,
    Rewriter._counts,
    Rewriter._property_names,
    Rewriter._one_of,
    Rewriter._unevaluated,
)
