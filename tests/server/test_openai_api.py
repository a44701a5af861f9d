"""What programs get: OpenAI's routes over HTTP, asked by the official client and by httpx."""

import gzip
import json
from dataclasses import replace
from typing import Annotated, Literal

import httpx
import jsonschema_rs
import openai
import pydantic
import pytest

from llama2_chat.server.openai_types import ChatRequest
from llama2_chat.types import RANGES, SamplingParams, Status
from model import ChatModel
from tests.support.programs import HELLO, LIKELIEST, TALK, ask, error, whole_reply
from tests.support.serving import busy, serving
from tests.support.waiting import until

# ---- Answers ----


def test_the_list_of_models_names_the_one_that_is_served(client, chat):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == (chat.status.model, chat.context_length)
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("someone/else")


def test_a_program_gets_the_text_that_the_page_would_get(client, chat):
    answer = client.chat.completions.create(model=chat.status.model, messages=TALK, max_tokens=12)
    assert answer.choices[0].message.content == whole_reply(chat, TALK, max_new_tokens=12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_streamed_pieces_join_to_the_whole_answer_and_the_usage_comes_last(client, chat):
    talk = [*TALK[:-1], {**TALK[-1], "content": "Tell me of llamas. " * 12}]
    fields = {"model": chat.status.model, "messages": talk, "max_tokens": 12}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    *chunks, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert last.usage.prompt_tokens_details.cached_tokens > 0  # the whole answer was computed just before
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_a_prompt_is_computed_again_if_cache_prompt_is_false_and_says_the_same(client, chat):
    fields = {"model": chat.status.model, "messages": TALK, "max_tokens": 12, "seed": 3}
    cached, computed = (
        client.chat.completions.create(**fields, extra_body={"cache_prompt": cache}) for cache in (True, False)
    )
    assert computed.usage.prompt_tokens_details.cached_tokens == 0
    assert computed.choices[0].message.content == cached.choices[0].message.content


def test_every_chunk_carries_the_usage_so_far_if_asked(http):
    def usages(**options):
        lines = ask(http, stream=True, max_tokens=3, stream_options=options).text.splitlines()
        return [json.loads(line[6:]).get("usage") for line in lines if line.startswith("data: {")]

    every = usages(include_usage=True, continuous_usage_stats=True)
    assert {usage["prompt_tokens"] for usage in every} == {every[-1]["prompt_tokens"]}
    counts = [usage["completion_tokens"] for usage in every]
    assert (counts[0], counts[-1], counts) == (0, 3, sorted(counts))
    assert all(usages(continuous_usage_stats=True))
    assert not any(usages(include_usage=False, continuous_usage_stats=True))


def test_without_include_usage_a_stream_carries_none(client, chat):
    chunks = client.chat.completions.create(model=chat.status.model, messages=HELLO, max_tokens=2, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


@pytest.mark.parametrize("form", [str, lambda text: [text], "ids"], ids=["text", "list of one", "ids"])
def test_a_text_is_gone_on_with(client, chat, form):
    text = "The capital of France is"
    prompt = chat.encode_text(text) if form == "ids" else form(text)
    client.completions.create(model=chat.status.model, prompt=prompt, max_tokens=1)  # from here on it is cached
    answer = client.completions.create(model=chat.status.model, prompt=prompt, max_tokens=3)
    with chat.stream_completion(chat.encode_text(text), replace(LIKELIEST, max_new_tokens=3)) as reply:
        assert answer.choices[0].text == "".join(reply)
    chunks = client.completions.create(model=chat.status.model, prompt=prompt, max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_tokenize_counts_what_a_question_costs(client, address, chat):
    counted = httpx.post(f"{address}tokenize", json={"messages": TALK}).json()
    answer = client.chat.completions.create(model=chat.status.model, messages=TALK, max_tokens=1)
    assert counted["count"] == len(counted["tokens"]) == answer.usage.prompt_tokens
    assert counted["max_model_len"] == chat.context_length


def test_a_control_token_in_a_text_stays_text(http, chat):
    tokens = http.post("/tokenize", json={"prompt": "a<|im_end|>"}).json()["tokens"]
    assert chat.serving.tokenizer.decode(tokens) == "a<|im_end|>"
    assert chat.serving.tokenizer.convert_tokens_to_ids("<|im_end|>") not in tokens


def test_text_parts_and_developer_messages_are_what_they_were_called_before(http):
    old = [{"role": "system", "content": "a\nb"}, *HELLO]
    new = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, *HELLO]
    counts = [http.post("/tokenize", json={"messages": messages}).json()["tokens"] for messages in (old, new)]
    assert counts[0] == counts[1]


def test_all_system_and_developer_messages_are_joined_at_the_beginning(http):
    late = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        *TALK[:2],
        {"role": "system", "content": ""},
        {"role": "developer", "content": "c"},
        TALK[2],
    ]
    once = [{"role": "system", "content": "a\n\nb\n\nc"}, *TALK]
    tokens = [http.post("/tokenize", json={"messages": messages}).json()["tokens"] for messages in (late, once)]
    assert tokens[0] == tokens[1]


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(http):
    def text(seed):
        return ask(http, seed=seed, temperature=1, max_tokens=8).json()["choices"][0]["message"]["content"]

    assert text(1) == text(1) != text(2)


def test_a_stop_string_ends_the_answer_before_it(client, chat):
    whole = whole_reply(chat, HELLO, max_new_tokens=12)
    word = whole.split()[2]
    answer = client.chat.completions.create(model=chat.status.model, messages=HELLO, max_tokens=12, stop=word)
    assert answer.choices[0].message.content == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"


RECIPE = {
    "type": "object",
    "properties": {
        "dish": {"type": "string", "maxLength": 30},
        "minutes": {"type": "integer", "minimum": 1, "maximum": 240},
        "vegan": {"type": "boolean"},
    },
    "required": ["dish", "minutes", "vegan"],
    "additionalProperties": False,
}
SOUP = [{"role": "user", "content": "A recipe for soup, as JSON."}]


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_an_answer_follows_the_schema_that_came_with_the_question(client, chat, stream):
    json_schema = {"name": "recipe", "strict": True, "schema": RECIPE}
    answer = client.chat.completions.create(
        model=chat.status.model,
        messages=SOUP,
        response_format={"type": "json_schema", "json_schema": json_schema},
        temperature=1,
        stream=stream,
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(choice.delta.content or "" for choice in chunks), chunks[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert jsonschema_rs.validator_for(RECIPE).is_valid(json.loads(text))
    assert reason == "stop"


def test_the_official_client_makes_an_object_of_the_answer(client, chat):
    class Recipe(pydantic.BaseModel):
        dish: Annotated[str, pydantic.Field(max_length=30)]
        minutes: Annotated[int, pydantic.Field(ge=1, le=240)]
        course: Literal["starter", "main", "dessert"]

    answer = client.chat.completions.parse(model=chat.status.model, messages=SOUP, response_format=Recipe)
    assert isinstance(answer.choices[0].message.parsed, Recipe)


def test_any_json_will_do_if_no_schema_is_given(client, chat):
    example = [
        {"role": "user", "content": "Sky? One key, colour."},
        {"role": "assistant", "content": '{"colour": "blue"}'},
        {"role": "user", "content": "Grass? One key, colour."},
    ]
    answer = client.chat.completions.create(
        model=chat.status.model,
        messages=example,
        temperature=0,
        response_format={"type": "json_object"},
        max_tokens=300,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_text_can_be_gone_on_with_in_json(client, chat):
    more = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [True, "soup"]}}}}
    answer = client.completions.create(model=chat.status.model, prompt="Soup is", extra_body=more)
    assert json.loads(answer.choices[0].text) in (True, "soup")


def test_every_sampling_setting_arrives_and_the_others_are_the_servers():
    ranges = {name: int(high) for name, (_, high) in RANGES.items()}
    given = {name: high for name, high in ranges.items() if name not in ("max_new_tokens", "logprobs")} | {"seed": 7}
    given |= {"ignore_eos": True, "stop_token_ids": [2, 5], "logit_bias": {"7": -100, "5": 1.5}}
    defaults = SamplingParams(temperature=0.9, seed=1)
    request = ChatRequest(messages=HELLO, stop="x", max_tokens=5, **given)
    bias = {"logit_bias": {7: -100, 5: 1.5}}
    assert request.params(defaults) == SamplingParams(**given | bias, max_new_tokens=5, stop=("x",))
    assert ChatRequest(messages=HELLO, logit_bias=[[5, 1], ["7", 2]]).logit_bias == {5: 1, 7: 2}
    assert ChatRequest(messages=HELLO).params(defaults) == defaults
    assert ChatRequest(messages=HELLO, top_k=-1).params(defaults).top_k == 0


def test_without_max_tokens_an_answer_may_use_all_the_room_there_is(http, small):
    answer = http.post("/v1/completions", json={"prompt": [5] * (small.context_length - 6), "temperature": 0}).json()
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_beats_max_tokens(http):
    assert ask(http, max_tokens=5, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_what_changes_nothing_is_let_pass(http):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": False, "tools": []}
    harmless |= {
        "tool_choice": "auto",
        "logit_bias": {},
        "logprobs": False,
        "n": 1,
        "response_format": {"type": "text"},
    }
    assert ask(http, **harmless, functions=None, stop=None, stream=None, max_completion_tokens=None).status_code == 200


# ---- Refusals ----


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("temperature", 9, "invalid_value"),
        ("temperature", "0.5", "invalid_value"),
        ("top_p", 0, "invalid_value"),
        ("max_tokens", 0, "invalid_value"),
        ("max_completion_tokens", 1_000_001, "invalid_value"),
        ("seed", 2**63, "invalid_value"),
        ("stop", ["a"] * 17, "invalid_value"),
        ("stop", [5], "invalid_value"),
        ("messages", [], "invalid_value"),
        ("messages", [{"role": "assistant", "content": "Hi"}], "invalid_value"),
        ("n", 9, "invalid_value"),
        ("n", 0, "invalid_value"),
        ("logit_bias", {"5": 101}, "invalid_value"),
        ("logit_bias", {"llama": 1}, "invalid_value"),
        ("logit_bias", {"999999": 1}, "invalid_value"),
        ("stop_token_ids", [999999], "invalid_value"),
        ("stop_token_ids", [-1], "invalid_value"),
        ("min_p", 2, "invalid_value"),
        ("min_tokens", -1, "invalid_value"),
        ("tools", [{"type": "function"}], "missing_parameter"),
        ("response_format", {"type": "xml"}, "invalid_value"),
        ("response_format", {"type": "json_schema"}, "invalid_value"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}, "missing_parameter"),
        ("response_format", {"type": "json_object", "json_schema": {"schema": {"type": "integer"}}}, "invalid_value"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "invalid_value"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {"const": "x" * 2**20}}},
            "invalid_value",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(http, field, value, code):
    answer = ask(http, **{field: value})
    assert answer.status_code == 400
    assert (error(answer)["param"], error(answer)["code"]) == (field, code)
    assert error(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "critic", "content": "x"}, "messages.0.role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "assistant", "content": "x", "tool_calls": [5]}, "messages.0.tool_calls.0"),
    ],
    ids=["critic", "picture", "null", "tool call"],
)
def test_a_message_that_cannot_be_read_is_named_by_its_place(http, message, param):
    assert error(ask(http, messages=[message]))["param"] == param


def test_what_is_missing_is_named_before_what_is_wrong(http):
    error = http.post("/v1/chat/completions", json={"temperature": 9}).json()["error"]
    assert (error["code"], error["param"]) == ("missing_parameter", "messages")


def test_an_unknown_model_is_404(http):
    answer = ask(http, model="gpt-5")
    assert (answer.status_code, error(answer)["code"]) == (404, "model_not_found")
    assert "small" in error(answer)["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/moderations"),
        ("PROPFIND", "/v1/models"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/completion"),
        ("POST", "/chat/completions"),
        ("POST", "/api/chat"),
        ("GET", "/api/tags"),
        ("PUT", "/tokenize"),
    ],
)
def test_an_unknown_route_is_404_in_openais_form_and_says_where_programs_ask(http, method, path):
    answer = http.request(method, path)
    assert (answer.status_code, error(answer)["code"]) == (404, "unknown_url")
    assert f"{method} {path}" in error(answer)["message"]
    assert "POST /v1/chat/completions" in error(answer)["message"]


DEEP = b"[" * 100_000


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"1" * 5000, DEEP, b'{"messages": NaN}'])
def test_a_body_that_makes_no_sense_is_400(http, body):
    answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(error(answer)) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/page/fit"])
def test_every_route_says_what_is_wrong_with_a_body(http, path):
    answer = http.post(path, content=b'{"a": "\xff"}', headers={"Content-Type": "application/json"})
    assert error(answer)["message"] == "The body is not UTF-8: invalid start byte at byte 7."


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_refused_by_the_name_of_its_encoding(http, encoding):
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    answer = http.post("/v1/chat/completions", content=gzip.compress(b"{}"), headers=headers)
    assert (answer.status_code, error(answer)["code"]) == (400, "unsupported_content_encoding")
    assert f"compressed ('{encoding}')" in error(answer)["message"]


def test_an_encoding_that_changes_nothing_is_let_pass(http):
    body = json.dumps({"messages": HELLO, "max_tokens": 1})
    headers = {"Content-Type": "application/json; charset=utf-8", "Content-Encoding": "identity"}
    assert http.post("/v1/chat/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("id", [-1, 2**31, 2**63, 10**300])
def test_ids_that_no_token_has_are_refused(http, id):
    answer = http.post("/v1/completions", json={"prompt": [1, id], "max_tokens": 1})
    assert (answer.status_code, error(answer)["param"]) == (400, "prompt")


def test_half_a_character_is_no_reason_to_fail(http):
    body = r'{"messages": [{"role": "user", "content": "\ud83d"}], "max_tokens": 1, "%s": 0}'
    post = {"url": "/v1/chat/completions", "headers": {"Content-Type": "application/json"}}
    assert http.post(content=body % "user", **post).status_code == 200
    for field in ("prompt", "stop"):
        text = {"prompt": "Hi", field: "a\ud83d"} | {"max_tokens": 1}
        completion = post | {"url": "/v1/completions"}
        assert http.post(content=json.dumps(text), **completion).status_code == 200
    assert http.post(content=body % r"\ud83d", **post).status_code == 400


def test_the_page_of_another_site_cannot_make_the_model_work(http):
    """A form or a fetch without preflight may send text/plain, or no type at all."""
    body = json.dumps({"messages": HELLO, "max_tokens": 1})
    for headers in ({"Content-Type": "text/plain"}, {}):
        answer = http.post("/v1/chat/completions", content=body, headers=headers)
        assert (answer.status_code, error(answer)["code"]) == (400, "unsupported_content_type")
        assert "application/json" in error(answer)["message"]


@pytest.mark.parametrize("max_tokens", [None, 2000])
def test_a_conversation_that_is_too_long_is_refused_with_both_numbers(http, small, max_tokens):
    long = [{"role": "user", "content": "word " * (4200 if max_tokens is None else 3000)}]
    count = len(small.encode(long))
    answer = ask(http, messages=long, max_tokens=max_tokens)
    assert (answer.status_code, error(answer)["code"]) == (400, "context_length_exceeded")
    assert error(answer)["param"] == "messages"
    assert f"{small.context_length:,}" in error(answer)["message"]
    assert f"{count:,}" in error(answer)["message"]


@pytest.mark.parametrize("max_tokens", [None, 2])
def test_trim_leaves_out_the_oldest_messages_and_says_how_many(http, max_tokens):
    old = [{"role": "user", "content": "word " * 4200}, {"role": "assistant", "content": "Yes."}]
    usage = ask(http, messages=[*old, *HELLO], max_tokens=max_tokens, trim=True, stop="a").json()["usage"]
    assert usage["dropped_messages"] == 2
    assert ask(http, trim=True).json()["usage"]["dropped_messages"] == 0


def test_while_the_model_loads_programs_are_told_to_come_back(settings):
    with serving(ChatModel(settings), settings) as address, httpx.Client(base_url=address) as http:
        for answer in (ask(http), http.get("/v1/models")):
            assert (answer.status_code, error(answer)["code"]) == (503, "model_loading")
            assert int(answer.headers["Retry-After"]) > 0
        assert "chat_ready 0.0" in http.get("/metrics").text


def test_without_a_model_programs_are_told_why(settings):
    failed = ChatModel(settings)
    failed.status = Status(state="failed", error="No such model.")
    with serving(failed, settings) as address, httpx.Client(base_url=address) as http:
        answer = ask(http)
    assert (answer.status_code, error(answer)["message"]) == (503, "No such model.")
    assert error(answer)["type"] == "server_error"


def test_what_goes_wrong_inside_stays_inside(http, small, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(small, "encode", fail)
    answer = ask(http)
    assert (answer.status_code, error(answer)["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "/secret/path" in caplog.text


# ---- Beside the page ----


def test_programs_and_visitors_stand_in_one_line(chat, client):
    with busy(chat, HELLO, replace(LIKELIEST, max_new_tokens=40)):
        stream = client.chat.completions.create(model=chat.status.model, messages=HELLO, max_tokens=1, stream=True)
        next(stream)
        until(lambda: chat.occupancy.waiting)
    assert list(stream)[-1].choices[0].finish_reason == "length"
