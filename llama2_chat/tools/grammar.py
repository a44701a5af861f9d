"""The first step of an answer, decided by a grammar: calls of tools whose arguments follow their schemas, or text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llama2_chat.errors import BadGrammar
from llama2_chat.tools.schemas import call_schemas, one_of, parameters, schema_of
from llama2_chat.types import CallStyle, GrammarSpec, ToolOffer

MOST_CALLS = 16  # at once: a small model may not find an end


def answer_grammar(offer: ToolOffer, style: CallStyle, answer: GrammarSpec | None = None) -> GrammarSpec:
    """What a reply with tools may say, in llguidance's kind of Lark.

    answer: what a text must follow, if it is not free.
    Raises BadGrammar for an answer that is no JSON schema, and for tools that are too much for a grammar.
    """
    if not offer.may_call:
        return answer or GrammarSpec("lark", "\n".join(["start: text", *_free_text(style)]) + "\n")
    if answer is not None and not offer.must_call and not style.marker:
        return _json_grammar(offer, style, answer)
    may_follow = style.marker and not offer.must_call and answer is None
    rules = ["start: calls" if offer.must_call else "start: calls | text" + (" | before rest" if may_follow else "")]
    rules += _call_rules(offer, style, bool(may_follow))
    for i, tool in enumerate(offer.callable):
        rules.append(f"tool{i}: {_quoted(tool.name + style.middle)} arguments{i}")
        rules.append(f"arguments{i}: %json {_json(parameters(tool))}")
    if not offer.must_call:
        rules += _free_text(style) if answer is None else [f"text: %json {_json(schema_of(answer))}"]
    if may_follow:
        # The longest match counts: at the beginning, the marker must be that of a call.
        rules.append(f"before[suffix={_quoted(style.marker)}]: BEFORE")
        rules.append(f"BEFORE: /(?s:.+)/ & ~/(?s:{_regex(style.marker)}.*)/")
    return GrammarSpec("lark", "\n".join(rules) + "\n", _is_strict(offer, answer))


def _json_grammar(offer: ToolOffer, style: CallStyle, answer: GrammarSpec) -> GrammarSpec:
    """Where calls and answers are both JSON, they have to be read as such: both may begin with the same words."""
    arguments = re.fullmatch(r'", "(\w+)": ?', style.middle)
    if not (style.opening == '{"name": "' and arguments and style.closing == "}"):
        raise BadGrammar("This model cannot have both tools and a JSON schema for its answer. Leave one of them out.")
    schemas = call_schemas(offer, arguments[1]) | {"answer": schema_of(answer)}
    return GrammarSpec("json_schema", json.dumps(one_of(schemas)), _is_strict(offer, answer))


def _is_strict(offer: ToolOffer, answer: GrammarSpec | None) -> bool:
    return any(tool.strict for tool in offer.callable) or (answer is not None and answer.strict)


def _call_rules(offer: ToolOffer, style: CallStyle, may_follow: bool) -> Iterator[str]:
    """`rest` are calls of which the marker has been written already."""
    tool = " | ".join(f"tool{i}" for i in range(len(offer.callable)))
    more = ""
    if style.between is not None and _may_be_several(offer, style):
        more = f" ({_quoted(style.between)} tool){{0,{MOST_CALLS - 1}}}"
    yield f"calls: {_quoted(style.opening)} tool{more} {_quoted(style.closing)}"
    if may_follow:
        yield f"rest: {_quoted(style.opening.removeprefix(style.marker))} tool{more} {_quoted(style.closing)}"
    yield f"tool: {tool}"


def _may_be_several(offer: ToolOffer, style: CallStyle) -> bool:
    """By itself where a model's own template writes several; of another model if several are asked for."""
    return offer.parallel if offer.parallel is not None else bool(style.marker)


def _free_text(style: CallStyle) -> list[str]:
    # Where a call is JSON by itself, JSON of another kind would only be a call gone wrong.
    call = rf".*{_regex(style.marker)}.*" if style.marker else r"\s*\{.*"
    return ["text: TEXT", f"TEXT: /(?s:.+)/ & ~/(?s:{call})/"]


def _json(schema: dict[str, Any]) -> str:
    # "::=" would make it a grammar of llama.cpp's kind.
    return json.dumps(schema).replace("::=", "\\u003a:=")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace("\n", "n")
