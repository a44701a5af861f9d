"""What a grammar with tools lets through: calls that follow their schemas, or text, decided by the first step."""

import json
from dataclasses import replace

import pytest
from llguidance import LLMatcher, LLTokenizer

from llama2_chat.engine.try_grammar import compile_here
from llama2_chat.errors import BadGrammar, ChatError
from llama2_chat.tools import PLAIN, answer_grammar
from llama2_chat.types import GrammarSpec, Tool, ToolOffer
from tests.support.toolbox import (
    CALCULATOR,
    CLOCK,
    FUNCTIONARY_STYLE,
    LLAMA_3_STYLE,
    MISTRAL_STYLE,
    QWEN_STYLE,
    WEATHER,
    call,
)

TOKENIZER = LLTokenizer("byte")
PARIS = call("get_weather", '{"city": "Paris", "unit": "c"}')
SUM = call("calculator", '{"expression": "1 + 1"}')
AUTO, MUST = ToolOffer((WEATHER, CALCULATOR, CLOCK)), ToolOffer((WEATHER, CALCULATOR, CLOCK), must_call=True)


def lets_through(grammar, text):
    tried = compile_here(grammar.kind, grammar.text)
    assert not tried.error
    matcher = LLMatcher(TOKENIZER, tried.source, log_level=0)
    return all(matcher.try_consume_tokens([byte]) for byte in text.encode()) and matcher.is_accepting()


STYLES = pytest.mark.parametrize(
    "style",
    [PLAIN, QWEN_STYLE, LLAMA_3_STYLE, MISTRAL_STYLE, FUNCTIONARY_STYLE],
    ids=["plain", "Qwen", "Llama 3", "Mistral", "Functionary"],
)


@STYLES
@pytest.mark.parametrize("offer", [AUTO, MUST], ids=["auto", "required"])
@pytest.mark.parametrize("written", [PARIS, SUM, call("clock", "{}")], ids=lambda call: call["name"])
def test_a_call_of_each_tool_gets_through(style, offer, written):
    assert lets_through(answer_grammar(offer, style), style.write(written))


@STYLES
@pytest.mark.parametrize(
    "wrong",
    [
        call("get_time", "{}"),
        call("clock", '{"a": 1}'),
        call("get_weather", "{}"),
        call("get_weather", '{"city": 1}'),
        call("get_weather", '{"city": "Paris", "unit": "k"}'),
        call("get_weather", '{"city": "Paris", "day": "today"}'),
        call("calculator", '{"expression":  "1"}'),
    ],
    ids=lambda call: call["arguments"],
)
def test_nothing_gets_through_that_only_looks_like_a_call(style, wrong):
    assert not lets_through(answer_grammar(AUTO, style), style.write(wrong))
    assert not lets_through(answer_grammar(AUTO, style), style.write(PARIS)[:-3])


@STYLES
def test_text_gets_through_unless_a_call_is_required(style):
    for text in ("Hello!", "日本 < 3\n\n* a", 'The "city" is {"a": 1}.'):
        assert lets_through(answer_grammar(AUTO, style), text)
        assert not lets_through(answer_grammar(MUST, style), text)


@STYLES
def test_where_nothing_may_be_called_only_text_gets_through(style):
    offer = replace(AUTO, may_call=False)
    assert lets_through(answer_grammar(offer, style), "It is sunny.")
    assert not lets_through(answer_grammar(offer, style), style.write(PARIS))
    own = GrammarSpec("regex", "[0-9]+")
    assert answer_grammar(offer, style, own) == own


def test_only_the_named_tool_can_be_called():
    grammar = answer_grammar(ToolOffer((WEATHER, CLOCK), must_call=True, names=("clock",)), PLAIN)
    assert lets_through(grammar, PLAIN.write(call("clock", "{}")))
    assert not lets_through(grammar, PLAIN.write(PARIS))


@pytest.mark.parametrize(
    ("style", "parallel", "several"),
    [
        (PLAIN, None, False),
        (PLAIN, True, True),
        (QWEN_STYLE, None, True),
        (QWEN_STYLE, False, False),
        (MISTRAL_STYLE, None, True),
        (FUNCTIONARY_STYLE, None, True),
    ],
)
def test_several_calls_at_once_where_a_template_writes_them_or_they_are_asked_for(style, parallel, several):
    grammar = answer_grammar(ToolOffer((WEATHER, CALCULATOR), parallel=parallel), style)
    assert lets_through(grammar, style.write(PARIS, SUM)) is several
    assert not lets_through(grammar, style.write(*[PARIS] * 40))


def test_a_call_may_follow_a_text_where_it_has_a_marker_and_nowhere_else():
    assert lets_through(answer_grammar(AUTO, QWEN_STYLE), f"I look.\n{QWEN_STYLE.write(PARIS)}")
    assert not lets_through(answer_grammar(AUTO, QWEN_STYLE), f"I look.\n{QWEN_STYLE.write(PARIS)[:-4]}")
    assert not lets_through(answer_grammar(AUTO, QWEN_STYLE), f"{QWEN_STYLE.write(PARIS)}\nI looked.")


@STYLES
def test_beside_tools_an_answer_can_follow_a_schema_of_its_own(style):
    schema = {"properties": {"name": {"$ref": "#/$defs/n"}}, "required": ["name"], "$defs": {"n": {"type": "string"}}}
    grammar = answer_grammar(AUTO, style, GrammarSpec("json_schema", json.dumps({"type": "object"} | schema)))
    assert lets_through(grammar, '{"name": "Bob"}')
    assert not lets_through(grammar, '{"name": 1}')
    assert lets_through(grammar, style.write(PARIS))
    assert not lets_through(grammar, "Hello!")
    with pytest.raises(BadGrammar, match="JSON schema only"):
        answer_grammar(AUTO, style, GrammarSpec("regex", "a+"))


def test_references_within_a_schema_hold_and_a_caller_cannot_loosen_the_form():
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    tool = Tool("draw", "", {"properties": {"at": {"$ref": "#/$defs/point"}}, "$defs": {"point": point}})
    tool.parameters["x-guidance"] = {"whitespace_flexible": True}
    grammar = answer_grammar(ToolOffer((tool,)), PLAIN)
    assert lets_through(grammar, PLAIN.write(call("draw", '{"at": {"x": 1}}')))
    assert not lets_through(grammar, PLAIN.write(call("draw", '{"at": {"x": 1, "y": 2}}')))
    assert not lets_through(grammar, PLAIN.write(call("draw", '{"at":   {"x": 1}}')))


def test_a_schema_may_hold_what_other_grammars_are_told_by():
    tool = Tool("set", "", {"properties": {"a": {"enum": ["root ::= x", "b"]}}, "required": ["a"]})
    assert lets_through(answer_grammar(ToolOffer((tool,)), PLAIN), PLAIN.write(call("set", '{"a": "root ::= x"}')))


def test_a_strict_tool_makes_the_grammar_strict():
    assert answer_grammar(ToolOffer((CLOCK, replace(WEATHER, strict=True))), PLAIN).strict
    assert not answer_grammar(AUTO, PLAIN).strict


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Tool("a b"), "letters, digits"),
        (lambda: Tool(""), "letters, digits"),
        (lambda: Tool("say", "", {"type": "string"}), "must be of type object"),
        (lambda: ToolOffer(()), "1 to 128 tools"),
        (lambda: ToolOffer((CLOCK, CLOCK)), "two tools called 'clock'"),
        (lambda: ToolOffer((CLOCK,), names=("watch",)), "no tool called 'watch'"),
    ],
)
def test_an_offer_that_makes_no_sense_is_refused(make, why):
    with pytest.raises(ChatError, match=why):
        make()
