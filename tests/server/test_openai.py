"""What programs get: OpenAI's routes over HTTP, asked by the official client, by httpx and by a bare socket."""

import contextlib
import json
import logging
import socket
import threading
import time
from dataclasses import replace
from typing import Annotated, Literal
from urllib.parse import urlsplit

import httpx
import jsonschema_rs
import openai
import pydantic
import pytest
import torch
from gradio_client import Client
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.errors import ChatError
from llama2_chat.loading.load import Loaded
from llama2_chat.server import api
from llama2_chat.server.openai_types import ChatRequest
from llama2_chat.types import SamplingParams, Status
from model import ChatModel
from tests.support.serving import busy, serving

# Gradio 6.31 uses what pandas 3 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1)
HELLO = [{"role": "user", "content": "Say hello."}]
TALK = [*HELLO, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "And in French?"}]
CONTEXT = 4096


def whole_reply(chat, messages, **params):
    with chat.stream_reply(messages, replace(LIKELIEST, **params)) as reply:
        return "".join(reply)


@pytest.fixture(scope="module")
def small(chat, settings):
    """The embedded model's tokenizer and few random weights: fast, talkative, one answer and one in line."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(chat.serving.tokenizer), max_position_embeddings=CONTEXT, **shape)
    small = ChatModel(replace(settings, max_batch=1, queue_limit=1))
    small.status = Status(model="small")
    yield small.serve(chat.serving.tokenizer, Loaded(LlamaForCausalLM(config).eval(), "float32", "cpu", ""))
    small.close()


@pytest.fixture(scope="module")
def address(chat, settings):
    for messages in (HELLO, TALK):  # a prompt from the KV cache may differ in its last bits from one that is computed
        whole_reply(chat, messages, max_new_tokens=1)
    with serving(chat, replace(settings, sampling=LIKELIEST)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def small_address(small, settings):
    with serving(small, settings) as address:
        yield address


@pytest.fixture
def http(small_address):
    with httpx.Client(base_url=small_address, timeout=60) as http:
        yield http


def ask(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, **fields})


def error(answer):
    return answer.json()["error"]


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
    fields = {"model": chat.status.model, "messages": TALK, "max_tokens": 12}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    *chunks, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert last.usage.prompt_tokens_details.cached_tokens > 0  # the whole answer was computed just before
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


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
    fields = {"messages": SOUP, "response_format": {"type": "json_object"}, "max_tokens": 300}
    for seed in range(5):  # an object of any kind may go on for long
        answer = client.chat.completions.create(model=chat.status.model, seed=seed, temperature=1, **fields).choices[0]
        if answer.finish_reason == "stop":
            break
    assert isinstance(json.loads(answer.message.content), dict)


def test_a_text_can_be_gone_on_with_in_json(client, chat):
    more = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [True, "soup"]}}}}
    answer = client.completions.create(model=chat.status.model, prompt="Soup is", extra_body=more)
    assert json.loads(answer.choices[0].text) in (True, "soup")


def test_every_sampling_setting_arrives_and_the_others_are_the_servers():
    given = {"temperature": 0.1, "top_p": 0.2, "top_k": 3, "repetition_penalty": 1.2, "seed": 7}
    given |= {"presence_penalty": 0.3, "frequency_penalty": 0.4}
    defaults = SamplingParams(temperature=0.9, seed=1)
    asked = ChatRequest(messages=HELLO, stop="x", **given)
    assert asked.params(defaults, 5) == SamplingParams(**given, max_new_tokens=5, stop=("x",))
    assert ChatRequest(messages=HELLO).params(defaults, 5) == replace(defaults, max_new_tokens=5)
    assert ChatRequest(messages=HELLO, top_k=-1).params(defaults, 5).top_k == 0


def test_without_max_tokens_an_answer_may_use_all_the_room_there_is(http):
    answer = http.post("/v1/completions", json={"prompt": [5] * (CONTEXT - 6), "temperature": 0}).json()
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
        ("max_completion_tokens", 4097, "invalid_value"),
        ("seed", 2**63, "invalid_value"),
        ("stop", ["a"] * 9, "invalid_value"),
        ("stop", [""], "invalid_value"),
        ("messages", [], "invalid_value"),
        ("messages", [{"role": "assistant", "content": "Hi"}], "invalid_value"),
        ("n", 2, "unsupported_parameter"),
        ("n", 0, "unsupported_parameter"),
        ("logprobs", True, "unsupported_parameter"),
        ("logit_bias", {"5": 1}, "unsupported_parameter"),
        ("tools", [{"type": "function"}], "unsupported_parameter"),
        ("response_format", {"type": "xml"}, "invalid_value"),
        ("response_format", {"type": "json_schema"}, "invalid_value"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}, "missing_parameter"),
        ("response_format", {"type": "json_object", "json_schema": {"schema": {"type": "integer"}}}, "invalid_value"),
        ("response_format", {"type": "json_object", "schema": {"type": "integer"}}, "invalid_value"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "invalid_value"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {"const": "x" * 40_000}}},
            "invalid_value",
        ),
        ("guided_choice", ["a"], "unsupported_parameter"),
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
        ({"role": "tool", "content": "x"}, "messages.0.role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages.0.tool_calls"),
    ],
    ids=["tool", "picture", "null", "tool call"],
)
def test_a_message_that_cannot_be_read_is_named_by_its_place(http, message, param):
    assert error(ask(http, messages=[message]))["param"] == param


def test_an_unknown_model_is_404(http):
    answer = ask(http, model="gpt-5")
    assert (answer.status_code, error(answer)["code"]) == (404, "model_not_found")
    assert "small" in error(answer)["message"]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_an_unknown_route_is_404_in_json(http, method):
    answer = http.request(method, "/v1/embeddings")
    assert (answer.status_code, error(answer)["code"]) == (404, "unknown_url")


DEEP = b"[" * 100_000


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"1" * 5000, DEEP, b'{"messages": NaN}'])
def test_a_body_that_makes_no_sense_is_400(http, body):
    answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(error(answer)) == {"message", "type", "param", "code"}


def test_half_a_character_is_no_reason_to_fail(http):
    body = r'{"messages": [{"role": "user", "content": "\ud83d"}], "max_tokens": 1, "%s": 0}'
    post = {"url": "/v1/chat/completions", "headers": {"Content-Type": "application/json"}}
    assert http.post(content=body % "user", **post).status_code == 200
    assert http.post(content=body % r"\ud83d", **post).status_code == 400


def test_the_page_of_another_site_cannot_make_the_model_work(http):
    """A form or a fetch without preflight may send text/plain, or no type at all."""
    body = json.dumps({"messages": HELLO, "max_tokens": 1})
    for headers in ({"Content-Type": "text/plain"}, {}):
        assert http.post("/v1/chat/completions", content=body, headers=headers).status_code == 400


@pytest.mark.parametrize("max_tokens", [None, 2000])
def test_a_conversation_that_is_too_long_is_refused_with_both_numbers(http, small, max_tokens):
    long = [{"role": "user", "content": "word " * (4200 if max_tokens is None else 3000)}]
    count = len(small.encode(long))
    answer = ask(http, messages=long, max_tokens=max_tokens)
    assert (answer.status_code, error(answer)["code"]) == (400, "context_length_exceeded")
    assert error(answer)["param"] == "messages"
    assert f"{CONTEXT:,}" in error(answer)["message"]
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
    def fail(messages):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(small, "encode", fail)
    answer = ask(http)
    assert (answer.status_code, error(answer)["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "/secret/path" in caplog.text


# ---- Keys and limits ----


def test_with_keys_the_api_needs_one_of_them_and_the_page_none(small, settings):
    with (
        serving(small, replace(settings, api_keys=("one", "zwölf"))) as address,
        httpx.Client(base_url=address) as http,
    ):
        for key in (None, "Bearer", "Bearer on", "Bearer one,zwölf", "Basic one"):
            http.headers = {} if key is None else {b"Authorization": key.encode()}
            for answer in (ask(http), http.get("/v1/models"), http.get("/metrics"), http.post("/tokenize")):
                assert (answer.status_code, error(answer)["code"]) == (401, "invalid_api_key"), key
        assert http.get("/").status_code == http.get("/healthz").status_code == 200
        for key in ("one", "zwölf"):
            http.headers = {b"Authorization": f"Bearer {key}".encode()}
            assert ask(http).status_code == 200
        stranger = openai.OpenAI(base_url=f"{address}v1", api_key="two", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_that_is_too_large_is_not_read(small, settings, chunked):
    with serving(small, replace(settings, body_limit_mb=0.001)) as address, httpx.Client(base_url=address) as http:
        body = (b"x" * 600 for _ in range(2)) if chunked else b"x" * 1200
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, error(answer)["code"]) == (413, "request_too_large")
        assert http.post("/gradio_api/queue/join", content=b"x" * 1200).status_code == 413
        assert ask(http).status_code == 200


@contextlib.contextmanager
def streaming(http, **fields):
    """The lines of an answer that goes on for long, once its first event is here."""
    long = {"messages": HELLO, "max_tokens": 3000, "stream": True, **fields}
    with http.stream("POST", "/v1/chat/completions", json=long) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_a_full_line_is_429_and_says_when_to_come_back(http, small):
    with streaming(http), streaming(http):  # one runs, one waits
        answer = ask(http)
    assert (answer.status_code, error(answer)["code"]) == (429, "rate_limit_exceeded")
    assert int(answer.headers["Retry-After"]) > 0
    freed(small)


@contextlib.contextmanager
def crowd(address, path, body):
    """More clients than the server has threads, all of whom wait for something until the end."""

    def ask():
        httpx.post(f"{address}{path}", json=body, timeout=60)

    many = [threading.Thread(target=ask) for _ in range(50)]
    for thread in many:
        thread.start()
    time.sleep(1)
    try:
        yield
    finally:
        for thread in many:
            thread.join()


def is_served(http):
    began = time.monotonic()
    assert ask(http).status_code == http.get("/metrics").status_code == 200
    assert time.monotonic() - began < 3


@pytest.mark.slow
def test_many_schemas_that_wait_to_be_read_hold_up_nobody_else(http, small, small_address):
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    body = {"messages": HELLO, "max_tokens": 1, "response_format": asked}
    with contextlib.ExitStack() as waiting, small._grammars._one_at_a_time:
        waiting.enter_context(crowd(small_address, "v1/chat/completions", body))
        is_served(http)
    freed(small)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "fields"), [("v1/chat/completions", {"max_tokens": 1}), ("tokenize", {})])
def test_many_long_texts_hold_up_nobody_else(http, small, small_address, path, fields, monkeypatch):
    long, come, encode = "x" * api.LONG_BODY, threading.Event(), small.encode
    monkeypatch.setattr(
        small, "encode", lambda messages: encode(messages) if messages == HELLO else come.wait(20) and encode(HELLO)
    )
    with crowd(small_address, path, {"messages": [{"role": "user", "content": long}], **fields}):
        try:
            is_served(http)
        finally:
            come.set()
    freed(small)


def test_one_client_cannot_take_all_and_others_are_not_its_neighbours(small, settings):
    limited = replace(settings, client_limit=1, trusted_proxies="127.0.0.1")
    with serving(small, limited) as address, httpx.Client(base_url=address, timeout=60) as http:
        http.headers["X-Forwarded-For"] = "192.0.2.1"
        with streaming(http):
            answer = ask(http)
            assert (answer.status_code, error(answer)["code"]) == (429, "rate_limit_exceeded")
            http.headers["X-Forwarded-For"] = "192.0.2.2"
            with streaming(http):
                pass
        freed(small)
        assert ask(http).status_code == 200


def test_a_key_is_one_client_however_it_is_written(small, settings):
    limited = replace(settings, api_keys=("one", "two"), client_limit=1)
    with serving(small, limited) as address, httpx.Client(base_url=address, timeout=60) as http:
        http.headers["Authorization"] = "Bearer one"
        with streaming(http):
            for again in ("Bearer one", "bearer one", "BEARER   one"):
                http.headers["Authorization"] = again
                assert ask(http).status_code == 429, again
            http.headers["Authorization"] = "Bearer two"
            with streaming(http):
                pass
        freed(small)


def test_an_address_that_no_trusted_proxy_vouches_for_is_not_believed(small, settings):
    limited = replace(settings, client_limit=1, trusted_proxies="10.0.0.1")
    with serving(small, limited) as address, httpx.Client(base_url=address, timeout=60) as http:
        with streaming(http):
            http.headers["X-Forwarded-For"] = "192.0.2.2"
            assert ask(http).status_code == 429
        freed(small)


def test_the_limit_holds_on_the_page_too(small, settings):
    with serving(small, replace(settings, client_limit=1)) as address, httpx.Client(base_url=address) as http:
        page = Client(address, verbose=False)
        with streaming(http), pytest.raises(Exception, match="no more are allowed"):
            page.predict("Hello", api_name="/chat")
        freed(small)


# ---- Streams that end before their time ----


def freed(chat, within_s=5):
    """Seconds until nobody runs and nobody waits."""
    began = time.monotonic()
    while chat.occupancy.running or chat.occupancy.waiting:
        assert time.monotonic() - began < within_s, chat.occupancy
        time.sleep(0.002)
    return time.monotonic() - began


@contextlib.contextmanager
def raw(address, **fields):
    """A bare socket that has sent its question."""
    body = json.dumps({"messages": HELLO, "max_tokens": 3500, **fields})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=20) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        yield connection


def until(condition):
    while not condition():
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_leaves_frees_the_model(small_address, small, stream):
    with raw(small_address, stream=stream) as connection:
        if stream:
            connection.recv(1000)
        until(lambda: small.occupancy.running)
    assert freed(small) < 0.5  # an answer of this length takes many seconds


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_leaves_while_it_waits_leaves_the_line(http, small_address, small, stream):
    with streaming(http):
        with raw(small_address, stream=stream):
            until(lambda: small.occupancy.waiting)
        until(lambda: not small.occupancy.waiting)
        assert small.occupancy.running
    freed(small)


def test_a_stream_begins_while_it_waits_in_line_and_shows_signs_of_life(http, monkeypatch):
    monkeypatch.setattr(api, "HEARTBEAT_S", 0.05)
    with streaming(http), streaming(http) as lines:
        assert [line for line in (next(lines) for _ in range(5)) if line] == [": waiting", ": waiting"]


def test_the_official_client_reads_over_signs_of_life(small_address, monkeypatch):
    monkeypatch.setattr(api, "HEARTBEAT_S", 0.0001)
    with openai.OpenAI(base_url=f"{small_address}v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="small", messages=HELLO, max_tokens=5, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


class FailingReply:
    """A piece, then an error, as when the GPU fails in the middle of an answer."""

    def __init__(self, reply):
        self.reply, self.pieces = reply, iter(["Well, "])

    def __getattr__(self, name):
        return getattr(self.reply, name)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        self.reply.close()

    def __aiter__(self):
        return self

    async def __anext__(self):
        for piece in self.pieces:
            return piece
        raise ChatError("The GPU ran out of memory.")


@pytest.fixture
def failing(small, monkeypatch):
    complete = small.stream_completion
    monkeypatch.setattr(small, "stream_completion", lambda *args: FailingReply(complete(*args)))


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(http, failing):
    *_, piece, last = [line for line in ask(http, stream=True).text.splitlines() if line]
    assert "Well, " in piece
    told = json.loads(last.removeprefix("data: "))["error"]
    assert (told["message"], told["type"]) == ("The GPU ran out of memory.", "server_error")


def test_the_official_client_raises_what_a_stream_ends_with(small_address, failing):
    with openai.OpenAI(base_url=f"{small_address}v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="small", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="ran out of memory"):
            list(stream)


def test_an_error_before_the_whole_answer_is_500_with_its_sentence(http, failing):
    answer = ask(http)
    assert (answer.status_code, error(answer)["message"]) == (500, "The GPU ran out of memory.")


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_an_answer_that_the_server_ends_says_so(http, small, stream, monkeypatch):
    replies, complete = [], small.stream_completion
    monkeypatch.setattr(small, "stream_completion", lambda *args: replies.append(complete(*args)) or replies[-1])

    def stop():  # what ChatModel.close() does to every reply
        until(lambda: small.occupancy.running)
        replies[0].close()

    thread = threading.Thread(target=stop)
    thread.start()
    answer = ask(http, max_tokens=3000, stream=stream)
    thread.join()
    assert "The server is being stopped" in answer.text
    assert "[DONE]" not in answer.text
    assert answer.status_code == (200 if stream else 503)


# ---- Figures and the log ----


def number(http, name):
    lines = [line.split(" ") for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(value) for _, value in lines)


def test_metrics_count_requests_tokens_times_and_errors(small, settings):
    with serving(small, settings) as address, httpx.Client(base_url=address, timeout=60) as http:
        usage = ask(http, max_tokens=3, messages=TALK).json()["usage"]
        ask(http, n=2)
        ask(http, max_tokens=2, stream=True)
        assert number(http, 'chat_requests_total{ending="length",route="/v1/chat/completions"}') == 2
        assert number(http, 'chat_errors_total{kind="unsupported_parameter"}') == 1
        assert number(http, "chat_completion_tokens_total") == 5
        assert number(http, "chat_prompt_tokens_total") > usage["prompt_tokens"]
        assert number(http, "chat_time_to_first_token_seconds_count") == 2
        assert number(http, "chat_tokens_per_second_count") == 2
        assert number(http, "chat_ready") == 1


def test_metrics_tell_what_goes_on_right_now(http, small):
    with streaming(http), streaming(http):
        assert (number(http, "chat_requests_running"), number(http, "chat_requests_waiting")) == (1, 1)
        assert 0 < number(http, "chat_kv_tokens ") < number(http, "chat_kv_tokens_in_all")
    freed(small)


def test_questions_from_the_page_are_counted_too(small, settings):
    with serving(small, settings) as address, httpx.Client(base_url=address) as http:
        Client(address, verbose=False).predict("Hello", "", 3, api_name="/chat")
        assert number(http, 'chat_requests_total{ending="length",route="page"}') == 1
        with pytest.raises(Exception, match="type a message"):
            Client(address, verbose=False).predict(" ", api_name="/chat")
        assert number(http, 'chat_errors_total{kind="invalid_value"}') == 1


@pytest.mark.parametrize("word_for_word", [False, True])
def test_the_log_has_a_line_for_each_request_and_words_only_if_asked(small, settings, caplog, word_for_word):
    caplog.set_level(logging.INFO, "metrics")
    secret = [{"role": "user", "content": "sesame\nstreet"}]
    with (
        serving(small, replace(settings, log_messages=word_for_word)) as address,
        httpx.Client(base_url=address) as http,
    ):
        answers = [ask(http, messages=secret, stream=stream, temperature=0) for stream in (False, True)]
        until(lambda: len(caplog.messages) == 2)
    assert [answer.status_code for answer in answers] == [200, 200]
    lines = [json.loads(line) for line in caplog.messages]
    assert [line["ending"] for line in lines] == ["length", "length"]
    assert all(line["completion_tokens"] == 2 and line["seconds"] > 0 for line in lines)
    assert ("sesame" in caplog.text) is word_for_word
    if word_for_word:
        assert lines[0]["answer"] == lines[1]["answer"] != ""


def test_programs_and_visitors_stand_in_one_line(chat, client):
    with busy(chat, HELLO, replace(LIKELIEST, max_new_tokens=40)):
        stream = client.chat.completions.create(model=chat.status.model, messages=HELLO, max_tokens=1, stream=True)
        next(stream)
        until(lambda: chat.occupancy.waiting)
    assert list(stream)[-1].choices[0].finish_reason == "length"
