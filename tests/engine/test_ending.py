"""Calls that begin where there is still room for them come to their end, whatever the model would rather write."""

import functools
import json
import random

import jsonschema_rs
import pytest
import torch

from llama2_chat.engine.ending import Ending, ending_of, longest
from llama2_chat.engine.grammar import LIMITS, Grammar
from llama2_chat.engine.grammar_tokens import llguidance_tokenizer
from llama2_chat.engine.try_grammar import compile_here
from llama2_chat.engine.vocabulary import Vocabulary
from llama2_chat.tools import PLAIN, CallReader, answer_grammar
from llama2_chat.types import Tool, ToolOffer
from tests.support.random_schemas import random_tools
from tests.support.toolbox import QWEN_STYLE

llguidance = pytest.importorskip("llguidance")


@functools.cache
def vocabulary_of(tokenizer):
    made = llguidance_tokenizer(tokenizer, len(tokenizer), {tokenizer.eos_token_id})
    return made, Vocabulary(made)


def writing(tokenizer, offer, style, most_tokens):
    """A grammar at the beginning of an answer."""
    spec = answer_grammar(offer, style)
    found, (made, vocabulary) = compile_here(spec.kind, spec.text), vocabulary_of(tokenizer)
    return Grammar(llguidance.LLMatcher(made, found.source, limits=LIMITS), vocabulary, spec, found, most_tokens)


def babble(tokenizer, grammar, written, most_tokens, rng):
    """What is written, and on at random, but no string, list or object is ended that need not be; all of it."""
    texts = vocabulary_of(tokenizer)[1].texts
    for token in written:
        grammar.advance(token)
    ids = list(written)
    while not grammar.complete and len(ids) < most_tokens:
        mask = torch.zeros(-(-len(tokenizer) // 32), dtype=torch.int32)
        grammar.allow(mask)
        allowed = (mask[:, None] >> torch.arange(32) & 1).flatten().nonzero()[:, 0].tolist()
        ids.append(rng.choice([id for id in allowed if not set(b'"]}') & set(texts[id])] or allowed))
        grammar.advance(ids[-1])
    return tokenizer.decode(ids, skip_special_tokens=True)


def called(text, style, tools):
    reader = CallReader(style, [tool.name for tool in tools])
    reader.read(text)
    return reader.calls


@pytest.mark.parametrize("seed", range(12))
def test_a_call_that_begins_in_time_ends_in_time(chat, seed):
    rng = random.Random(seed)
    tools = tuple(Tool(**each) for each in random_tools(rng, 2))
    style, tokenizer = (PLAIN, QWEN_STYLE)[seed % 2], chat.serving.tokenizer
    offer = ToolOffer(tools, must_call=True, parallel=False)
    room = writing(tokenizer, offer, style, 1000).last_start
    most_tokens = 1000 - room + 40  # of which the call's name takes some
    text = babble(tokenizer, writing(tokenizer, offer, style, most_tokens), [], most_tokens, rng)
    (call,) = called(text, style, tools)
    (schema,) = (tool.parameters for tool in tools if tool.name == call["name"])
    assert jsonschema_rs.validator_for(schema).is_valid(json.loads(call["arguments"]))


def test_a_call_ends_in_time_behind_a_text_with_an_odd_quote_in_it(chat):
    tools = (Tool("say", "", {"properties": {"text": {"type": "string"}}, "required": ["text"]}),)
    tokenizer, begun = chat.serving.tokenizer, f'A 5" pipe, {{say}}:\n{QWEN_STYLE.opening}say'
    ids = tokenizer.encode(begun, add_special_tokens=False)
    most_tokens = len(ids) + 80
    text = babble(
        tokenizer, writing(tokenizer, ToolOffer(tools), QWEN_STYLE, most_tokens), ids, most_tokens, random.Random(1)
    )
    assert called(text, QWEN_STYLE, tools)


def test_what_a_schema_asks_for_bounds_how_long_it_takes_to_end():
    text, digits = {"type": "string"}, {"type": "integer"}
    assert ending_of({"properties": {"a": text}}) == Ending(2, 9)
    assert ending_of({"properties": {"a": text}, "required": ["a"]}).least == 11
    assert ending_of({"type": "array", "items": digits, "minItems": 10**9}).least > 10**9
    assert ending_of({"type": "string", "minLength": 500}).least == 502
    assert ending_of({"enum": ["x" * 100, 1]}).least == 52
    assert ending_of({"anyOf": [{"type": "object", "required": ["abc"]}, {"type": "null"}]}).least == 1


def test_what_refers_to_itself_has_an_end_only_where_it_need_not():
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    }
    assert ending_of(node).least < 20
    node["properties"]["next"] = {"$ref": "#"}
    assert ending_of(node) is None
    assert longest([Ending(1, 1), None]) is longest([]) is None
    assert longest([Ending(1, 5), Ending(2, 3)]) == Ending(2, 5)


@pytest.mark.parametrize(
    "odd", [{"type": "strin"}, {"minItems": "2", "type": "array"}, {"properties": []}, {"allOf": 1}, 1]
)
def test_what_is_no_schema_has_no_bound_or_some(odd):
    assert ending_of(odd) is None or ending_of(odd).least >= 0
