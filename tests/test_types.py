"""What the shared words promise: sampling settings are checked where they are made."""

import math

import pytest

from llama2_chat.errors import BadGrammar, ChatError
from llama2_chat.types import MAX_GRAMMAR_CHARACTERS, GrammarSpec, SamplingParams


def test_the_defaults_are_the_ones_the_page_starts_with():
    params = SamplingParams()
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k) == (1024, 0.6, 0.9, 50)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0, 0)
    assert (params.seed, params.stop, params.grammar) == (None, (), None)


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("max_new_tokens", 1, 1_000_000),
        ("temperature", 0, 5),
        ("top_p", 1e-6, 1),
        ("top_k", 0, 1000),
        ("min_p", 0, 1),
        ("min_tokens", 0, 1_000_000),
        ("logprobs", 0, 20),
        ("repetition_penalty", 0.5, 2),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("seed", 0, 2**63 - 1),
    ],
)
def test_the_ends_of_a_range_are_in_it_and_beyond_them_is_refused_by_name(name, lowest, highest):
    for value in (lowest, highest):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (lowest - 1, highest + 1, math.nan, math.inf, -math.inf, 10**5000, "1", True, [1]):
        with pytest.raises(ChatError, match=name):
            SamplingParams(**{name: value})


def test_whole_numbers_may_arrive_as_floats_but_not_with_a_fraction():
    assert SamplingParams(top_k=40.0).top_k == 40
    assert isinstance(SamplingParams(max_new_tokens=5.0).max_new_tokens, int)
    with pytest.raises(ChatError, match="max_new_tokens"):
        SamplingParams(max_new_tokens=5.5)


def test_only_the_seed_and_logprobs_may_be_missing():
    assert SamplingParams(seed=None).seed is None
    assert SamplingParams(logprobs=None).logprobs is None
    with pytest.raises(ChatError, match="temperature"):
        SamplingParams(temperature=None)


def test_biases_are_a_mapping_or_pairs_in_the_order_of_their_ids():
    assert SamplingParams(logit_bias={7: 1, 3: -100}).logit_bias == ((3, -100.0), (7, 1.0))
    assert SamplingParams(logit_bias=((7, 1), (3, -100))) == SamplingParams(logit_bias={3: -100, 7: 1})
    many = dict.fromkeys(range(1025), 1)
    for bias in ({1: 101}, {1: math.nan}, {-1: 1}, {"1": 1}, {1: "x"}, {True: 1}, [1], 5, None, {1: 10**5000}, many):
        with pytest.raises(ChatError, match="logit_bias"):
            SamplingParams(logit_bias=bias)


def test_stop_token_ids_are_ids():
    assert SamplingParams(stop_token_ids=[3, 5]).stop_token_ids == (3, 5)
    for ids in (3, [-1], ["3"], [True], [1.0], None, [2**31], [0] * 1025):
        with pytest.raises(ChatError, match="stop_token_ids"):
            SamplingParams(stop_token_ids=ids)


def test_stop_takes_one_string_or_up_to_sixteen():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()
    for stop in (["x"] * 17, [""], [1], ["a", None], 5):
        with pytest.raises(ChatError, match="stop"):
            SamplingParams(stop=stop)


@pytest.mark.parametrize(
    "text", ["root ::= [0-9]+", "[]", "3", "", {}, 3, "[" * 20_000, '{"a": "%s"}' % ("x" * MAX_GRAMMAR_CHARACTERS)]
)
def test_a_json_schema_is_a_json_object_of_some_size(text):
    assert GrammarSpec("json_schema", '{"type": "object"}').text == '{"type": "object"}'
    with pytest.raises(BadGrammar, match="A JSON schema"):
        GrammarSpec("json_schema", text)


@pytest.mark.parametrize("kind", ["regex", "lark"])
def test_other_grammars_are_text_of_some_size(kind):
    assert SamplingParams(grammar=GrammarSpec(kind, "[]")).grammar.text == "[]"
    for text in ("", None, "x" * (MAX_GRAMMAR_CHARACTERS + 1)):
        with pytest.raises(BadGrammar, match=r"must be text|may have"):
            GrammarSpec(kind, text)


def test_a_grammar_of_no_known_kind_is_refused():
    with pytest.raises(BadGrammar, match="json_schema, regex, lark"):
        GrammarSpec("json", "{}")
    with pytest.raises(BadGrammar, match="GrammarSpec"):
        SamplingParams(grammar='{"type": "object"}')
