"""What a grammar promises: the answer follows it, in any company, and a bad one harms nobody."""

import functools
import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jsonschema_rs
import pytest
import torch
from tokenizers import AddedToken

from llama2_chat.engine import try_grammar
from llama2_chat.engine.grammar import Grammars
from llama2_chat.errors import BadGrammar, Busy
from llama2_chat.process import python_command
from llama2_chat.types import GrammarSpec, SamplingParams
from tests.support.serving import busy
from tests.support.small_tokenizer import gpt_2_shaped, llama_shaped
from tests.support.waiting import until

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "日本", 'a "quoted" word']}, "maxItems": 3},
        "home": {"anyOf": [{"$ref": "#/$defs/home"}, {"type": "null"}]},
    },
    "required": ["name", "age", "likes", "home"],
    "additionalProperties": False,
    "$defs": {
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"}},
            "additionalProperties": False,
        }
    },
}


def json_schema(schema):
    return GrammarSpec("json_schema", json.dumps(schema))


LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=120, grammar=json_schema(PERSON))
ANNA = [{"role": "user", "content": "Describe Anna, who is 25, as JSON."}]


def follows(text, schema):
    return jsonschema_rs.validator_for(schema).is_valid(json.loads(text))


# ---- Which ids may come next ----


@functools.cache
def grammars_of(tokenizer):
    """With more logits than tokens, as of a model that is padded."""
    return Grammars(tokenizer, len(tokenizer) + 32, {tokenizer.eos_token_id})


def allowed(grammar, vocab_size):
    mask = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)
    grammar.allow(mask)
    return (mask[:, None] >> torch.arange(32) & 1).flatten()[:vocab_size].nonzero()[:, 0].tolist()


def walk(tokenizer, schema, seed, most=400):
    """An answer at random, its text and whether it came to its end."""
    vocab_size, end = len(tokenizer) + 32, tokenizer.eos_token_id
    following, rng, ids = grammars_of(tokenizer).grammar(json_schema(schema)), random.Random(seed), []
    while not following.complete and len(ids) < most:
        choice = allowed(following, vocab_size)
        assert max(choice) < len(tokenizer)
        token = rng.choice(choice)
        if token == end:
            return tokenizer.decode(ids), True
        following.advance(token)
        ids.append(token)
    return tokenizer.decode(ids), following.complete


@pytest.fixture(params=["the embedded model's", "Llama 2's", "like Llama 2's", "like Llama 2's, older", "like GPT-2's"])
def tokenizer(request):
    match request.param:
        case "the embedded model's":
            return request.getfixturevalue("chat").serving.tokenizer
        case "Llama 2's":
            return request.getfixturevalue("llama2_tokenizer")
        case "like GPT-2's":
            return gpt_2_shaped("<|end|>")
    return llama_shaped(prepend=request.param.endswith("older"))


@pytest.mark.parametrize(
    "schema", [PERSON, {"type": "integer", "minimum": -5, "maximum": 70_000}], ids=["person", "number"]
)
def test_whatever_is_drawn_follows_the_schema(tokenizer, schema):
    answers = [walk(tokenizer, schema, seed) for seed in range(5)]
    assert all(ended and follows(text, schema) for text, ended in answers), answers


def test_tokens_that_are_forced_are_told_in_advance_and_asking_for_them_changes_nothing():
    tokenizer, rng = gpt_2_shaped("<|end|>"), random.Random(0)
    asked, unasked = (grammars_of(tokenizer).grammar(json_schema(PERSON), 60) for _ in range(2))
    told: list[int] = []
    came_true = 0
    while not unasked.complete:
        told = told or asked.forced()
        choice = allowed(unasked, len(tokenizer) + 32)
        assert allowed(asked, len(tokenizer) + 32) == choice
        if set(told[:1]) & set(choice):
            token, *told = told
            came_true += 1
        else:
            token, told = rng.choice(choice), []
        if token == tokenizer.eos_token_id:
            break
        asked.advance(token)
        unasked.advance(token)
    assert came_true >= 10


@pytest.mark.parametrize("text", ['{"a": "é 日本 😱\\n", "b": [1, -2.5e3, true, null]}', "{}"])
def test_json_may_be_written_as_python_writes_it(tokenizer, text):
    following = grammars_of(tokenizer).grammar(json_schema({"type": "object"}))
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert token in allowed(following, len(tokenizer) + 32), tokenizer.convert_ids_to_tokens(token)
        following.advance(token)
    assert following.complete
    assert allowed(following, len(tokenizer) + 32) == [tokenizer.eos_token_id]


def test_an_answer_of_llama_2_may_begin_with_its_space(llama2_tokenizer):
    following = grammars_of(llama2_tokenizer).grammar(json_schema({"type": "object"}))
    first = llama2_tokenizer.convert_ids_to_tokens(allowed(following, 32032))
    assert {"▁", "▁{", "{"} <= set(first)
    following.advance(29871)
    assert "▁" not in llama2_tokenizer.convert_ids_to_tokens(allowed(following, 32032))


@pytest.mark.parametrize(
    "schema", [{"type": "object"}, {"type": "object", "x-guidance": {"whitespace_flexible": True}}]
)
def test_nobody_goes_on_with_whitespace_for_ever(chat, schema):
    following = grammars_of(chat.serving.tokenizer).grammar(json_schema(schema))
    for token in chat.serving.tokenizer.encode('{"a":', add_special_tokens=False):
        following.advance(token)
    texts = [chat.serving.tokenizer.decode([token]) for token in allowed(following, len(chat.serving.tokenizer) + 32)]
    assert {text[:1] for text in texts} == {" "}
    assert not any(text[1:2].isspace() for text in texts)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (GrammarSpec("regex", "(yes|no)[.!]"), "no!"),
        (GrammarSpec("lark", 'start: "a" n\nn: /[0-9]/ | %json {"enum": [10]}'), "a10"),
    ],
    ids=["regex", "lark"],
)
def test_a_text_may_follow_a_regular_expression_or_a_grammar(tokenizer, grammar, text):
    following = grammars_of(tokenizer).grammar(grammar)
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert token in allowed(following, len(tokenizer) + 32), tokenizer.convert_ids_to_tokens(token)
        following.advance(token)
    assert following.complete


def test_a_word_in_angle_brackets_that_is_a_token_is_text_all_the_same():
    # Tokens that a model writes around its calls: llguidance took them for control tokens, and the answer ended with an
    # error where a grammar demanded one.
    tokenizer = gpt_2_shaped("<|end|>", more_tokens=(AddedToken("<call>"),))
    end, call = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<call>"))
    following = Grammars(tokenizer, len(tokenizer), {end}).grammar(GrammarSpec("lark", 'start: "<call>" /[<>a-z]+/'))
    assert call in allowed(following, len(tokenizer))
    following.advance(call)
    assert call in allowed(following, len(tokenizer))
    assert end not in allowed(following, len(tokenizer))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "minimum": 0.5, "maximum": 0.7},
        {"type": "integer"},
        {"type": "array", "items": {"type": "number"}, "maxItems": 3},
    ],
    ids=["between", "whole", "some"],
)
def test_a_number_ends(tokenizer, schema):
    """A small model went on with 0.5111… until max_new_tokens."""
    following, text = grammars_of(tokenizer).grammar(json_schema(schema)), ""
    digits = [token for token in range(len(tokenizer)) if tokenizer.decode([token]) in set("123456789")]
    for _ in range(80):
        choice = allowed(following, len(tokenizer) + 32)
        more = [token for token in digits if token in choice]
        if not more and tokenizer.eos_token_id in choice:
            break
        following.advance(token := (more or choice)[0])
        text += tokenizer.decode([token])
    numbers = re.findall(r"[0-9.]+", text)
    assert numbers
    assert all(len(number.replace(".", "")) <= 17 for number in numbers)
    assert follows(text, schema) or schema["type"] == "array"


LETTER = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 1},
        "from": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["text", "tags", "from"],
    "additionalProperties": False,
}


@functools.cache
def with_quotes(tokenizer):
    return {token for token in range(len(tokenizer)) if '"' in tokenizer.decode([token])}


def babble(tokenizer, schema, most, seed):
    """An answer that never ends a string by itself."""
    following, rng, ids = grammars_of(tokenizer).grammar(json_schema(schema), most), random.Random(seed), []
    while not following.complete and len(ids) < most:
        choice = allowed(following, len(tokenizer) + 32)
        going_on = set(choice) - with_quotes(tokenizer) or set(choice)
        following.advance(token := rng.choice(sorted(going_on)))
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def test_strings_end_before_the_last_token(tokenizer):
    text = babble(tokenizer, LETTER, 110, seed=1)
    assert follows(text, LETTER), text


ADDRESS = {"type": "string", "pattern": r"[\w.-]+@([\w.-]+\.)+[\w]+"}


def test_a_text_that_follows_a_pattern_ends_before_its_last_token(tokenizer):
    assert follows(babble(tokenizer, ADDRESS, 40, seed=1), ADDRESS)


def test_a_text_alone_ends_before_its_last_token(tokenizer):
    for schema in (
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "string", "minLength": 9},
    ):
        assert follows(babble(tokenizer, schema, 20, seed=1), schema)


def test_digits_that_a_schema_asks_for_are_allowed(chat):
    tokenizer, number = chat.serving.tokenizer, 10**25
    following = grammars_of(tokenizer).grammar(json_schema({"minimum": number, "maximum": number}))
    for token in tokenizer.encode(str(number), add_special_tokens=False):
        assert token in allowed(following, len(tokenizer) + 32)
        following.advance(token)


# ---- Answers ----


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_small_model_gives_what_the_schema_asks_for(chat, temperature):
    with chat.stream_reply(ANNA, replace(LIKELIEST, temperature=temperature, seed=1)) as reply:
        assert follows("".join(reply), PERSON)
    assert reply.finish_reason == "stop"


def test_what_is_cut_says_so(chat):
    with chat.stream_reply(ANNA, replace(LIKELIEST, max_new_tokens=5)) as reply:
        "".join(reply)
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("length", 5)


@pytest.mark.slow
def test_the_same_json_alone_and_among_others_who_want_json_and_who_do_not(chat):
    def begin(n):
        likeliest = replace(
            LIKELIEST, max_new_tokens=20, grammar=(None, LIKELIEST.grammar, json_schema({"type": "object"}))[n % 3]
        )
        return chat.stream_reply([{"role": "user", "content": f"Describe person {n} as JSON."}], likeliest)

    alone = ["".join(begin(n)) for n in range(5)]
    together = [begin(n) for n in range(5)]
    assert ["".join(reply) for reply in together] == alone


# ---- Schemas that are no good ----


def links(count):
    return {str(n): {"items": {"$ref": f"#/d/{n + 1}"}} for n in range(count)}


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"not": {"multipleOf": 3}}, "not"),
        ({"type": "strin"}, "strin"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "patterns have no look-around here. Say it without"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a'"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "127.0.0.1"),
        ({"$ref": "#"}, "no value satisfies it"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "no value"),
        ({"const": "\ud83d"}, "half of a surrogate pair"),
        ({"type": "array", "minItems": "2"}, 'minItems must be of type positive integer; it was "2"'),
        ({"type": "string", "maxLength": 10**12}, "a length or a count in it is too large"),
        ({"type": "string", "format": "date", "pattern": "^x"}, "all the patterns.* at once. Leave out one of them"),
        ({"patternProperties": {"^a": {}, "b$": {}}}, r"one name can have both patterns, \^a and b\$"),
        ({"unevaluatedItems": False, "allOf": [{}]}, "its .unevaluatedItems. cannot be followed. Leave it out"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(chat, schema, why):
    with pytest.raises(BadGrammar, match=why) as refused:
        chat.stream_reply(ANNA, replace(LIKELIEST, grammar=json_schema(schema)))
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (GrammarSpec("regex", "("), "this regular expression: .*unclosed group"),
        (GrammarSpec("regex", "(?=a)b"), "look-around"),
        (GrammarSpec("lark", 'start: "a'), "this grammar: .*lexer error"),
        (GrammarSpec("lark", "start: number"), 'unknown name: "number", at line 1, column 8'),
        (GrammarSpec("lark", 'start: %json {"type": "strin"}'), 'this grammar: there is no type "strin"'),
    ],
)
def test_another_grammar_that_cannot_be_followed_is_refused_with_the_reason(chat, grammar, why):
    with pytest.raises(BadGrammar, match=why) as refused:
        chat.stream_reply(ANNA, replace(LIKELIEST, grammar=grammar))
    assert "\n" not in str(refused.value)


HOSTILE = {
    "divisors": {"type": "integer", "allOf": [{"multipleOf": prime} for prime in (7, 11, 13, 17, 19, 23)]},
    "names": {"type": "object", "patternProperties": {f"^{n}$": {} for n in range(1500)}},
    "intersections": {"type": "string", "allOf": [{"pattern": str(n)} for n in range(1000)]},
    "a chain": {"$ref": "#/d/0", "d": links(800) | {"800": {}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_schema_is_refused_in_time_while_others_are_answered(chat, schema):
    # Compiling the first took 100 s and 4 GB; the chain ended the process.
    schema = json_schema(schema)
    with chat.stream_reply(ANNA, replace(LIKELIEST, grammar=None, max_new_tokens=1000)) as reply:
        next(reply)
        before, began = reply.usage.completion_tokens, time.monotonic()
        with pytest.raises(BadGrammar, match=r"complex|too large"):
            chat.stream_reply(ANNA, replace(LIKELIEST, grammar=schema))
        assert time.monotonic() - began < try_grammar.COMPILE_WALL_S
        next(reply)
        assert reply.finish_reason is None
        assert reply.usage.completion_tokens > before


def test_a_pattern_that_grows_too_hard_in_the_middle_ends_its_own_answer_only(chat):
    hard = json_schema({"type": "string", "pattern": ".{0,4000}(foo|bar).{0,4000}"})
    wild = replace(LIKELIEST, temperature=5, top_k=0, top_p=1, seed=1, grammar=hard)
    with chat.stream_reply(ANNA, replace(LIKELIEST, grammar=None, max_new_tokens=30)) as neighbour:
        with pytest.raises(BadGrammar, match="too complex"), chat.stream_reply(ANNA, wild) as reply:
            "".join(reply)
        assert "".join(neighbour)


def test_a_schema_is_looked_at_once_and_never_wears_out(chat, monkeypatch):
    calls, try_apart = [], try_grammar._try_apart
    monkeypatch.setattr(try_grammar, "_try_apart", lambda spec: (calls.append(spec), try_apart(spec))[1])
    schema = json_schema({"type": "boolean", "description": "looked at once"})
    for _ in range(3):
        with chat.stream_reply(ANNA, replace(LIKELIEST, grammar=schema)) as reply:
            assert "".join(reply) in ("true", "false")
    assert len(calls) == 1


def test_whoever_sends_what_is_known_waits_for_nobody(chat, monkeypatch):
    known, unknown = json_schema({"type": "boolean", "description": "known"}), json_schema({"const": "unknown"})
    grammars = grammars_of(chat.serving.tokenizer)
    grammars.grammar(known)
    monkeypatch.setattr("llama2_chat.engine.grammar.PATIENCE_S", 0)
    with try_grammar._one_at_a_time:  # while somebody else's is being compiled
        assert grammars.grammar(known).relaxed == ()
        with pytest.raises(Busy):
            grammars.grammar(unknown)


def test_many_who_come_together_to_a_cold_start_are_all_answered(chat):
    grammars, schema = Grammars(chat.serving.tokenizer, len(chat.serving.tokenizer), {2}), json_schema({"const": 1})
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: grammars.grammar(schema), range(8)))
    assert [allowed(each, len(chat.serving.tokenizer)) for each in made] == [allowed(made[0], 49152)] * 8


def test_the_process_for_the_next_grammar_is_started_beforehand(monkeypatch):
    monkeypatch.setattr(try_grammar, "SPARE_AFTER_S", 0.2)
    specs = [GrammarSpec("regex", f"started beforehand {n}") for n in range(2)]
    try_grammar.tried(specs[0], 40)
    until(lambda: try_grammar._spare)
    (waiting,) = try_grammar._spare
    assert waiting.poll() is None
    assert try_grammar.tried(specs[1], 40).error == ""
    assert waiting.returncode == 0
    assert try_grammar._spare != [waiting]


def killed(start):
    process = start()
    process.kill()
    process.wait()
    return process


def none_for(start):
    raise BlockingIOError("Resource temporarily unavailable")


@pytest.mark.parametrize("start", [killed, none_for])
def test_a_grammar_is_not_too_complex_because_its_process_was_killed(monkeypatch, start):
    # After some minutes without memory, a schema of one number was refused as too complex until the next start.
    spec = GrammarSpec("regex", f"compiled once there is memory: {start.__name__}")
    with monkeypatch.context() as short_of_memory:
        short_of_memory.setattr(try_grammar, "_spare", [])
        short_of_memory.setattr(try_grammar, "_start", functools.partial(start, try_grammar._start))
        with pytest.raises(Busy, match="too busy"):
            try_grammar.tried(spec, 40)
    assert try_grammar.tried(spec, 40).error == ""


def test_a_process_that_has_ended_while_it_waited_for_a_grammar_is_replaced(monkeypatch):
    monkeypatch.setattr(try_grammar, "_spare", [killed(try_grammar._start)])
    assert try_grammar.tried(GrammarSpec("regex", "the spare was killed"), 40).error == ""


@pytest.mark.slow
def test_a_process_that_was_slow_to_start_has_its_second_all_the_same(monkeypatch):
    code = python_command("llama2_chat.engine.try_grammar:try_grammar")
    code[-1] = f"import time\nwhile time.process_time() < 1.1: pass\n{code[-1]}"
    monkeypatch.setattr(try_grammar, "_spare", [])
    monkeypatch.setattr(try_grammar, "python_command", lambda function: code)
    assert try_grammar.tried(GrammarSpec("regex", "slow to start"), 40).error == ""


def test_what_was_found_out_is_forgotten_when_it_fills_the_memory(monkeypatch):
    known = try_grammar._Known()
    monkeypatch.setattr(try_grammar, "KEPT_CHARACTERS", 5000)
    specs = [GrammarSpec("regex", letter * 1000) for letter in "abc"]
    for spec in specs:
        known.add(spec, try_grammar.Tried(source="x"))
    assert [known.get(spec) is not None for spec in specs] == [False, True, True]


def test_a_schema_is_relaxed_only_where_it_is_not_strict(chat):
    schema = json_schema({"type": "array", "items": {"type": "integer"}, "maxItems": 2, "uniqueItems": True})
    with chat.stream_reply(ANNA, replace(LIKELIEST, grammar=schema)) as reply:
        assert reply.relaxed == ("uniqueItems",)
    with pytest.raises(BadGrammar, match=r"uniqueItems.*strict"):
        chat.stream_reply(ANNA, replace(LIKELIEST, grammar=replace(schema, strict=True)))
    with chat.stream_reply(ANNA, replace(LIKELIEST, grammar=replace(LIKELIEST.grammar, strict=True))) as reply:
        assert reply.relaxed == ()


def test_a_schema_of_a_hundred_thousand_characters_is_followed(chat):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "description": "x" * 100_000}
    with chat.stream_reply(ANNA, replace(LIKELIEST, grammar=json_schema(schema))) as reply:
        assert json.loads("".join(reply))["a"] == 1


@pytest.mark.slow
def test_a_schema_waits_in_line_like_any_other_question(chat):
    with busy(chat, ANNA, replace(LIKELIEST, grammar=None, max_new_tokens=20)):
        reply = chat.stream_reply(ANNA, LIKELIEST)
        assert reply.queue_position == 1
    assert follows("".join(reply), PERSON)


def test_the_process_that_tries_a_grammar_knows_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sesame")
    started = {}
    monkeypatch.setattr(try_grammar.subprocess, "Popen", lambda *args, **kwargs: started.update(kwargs))
    try_grammar._start()
    assert "sesame" not in started["env"].values()
