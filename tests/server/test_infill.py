"""What stands between two texts, asked as editors ask: /infill, a suffix, and the marks written down."""

import json
import socket
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama2_chat.server.infill import CutReply
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.listen import server_config
from llama2_chat.server.metrics import Metrics
from llama2_chat.server.openai_api import api_router
from model import ChatModel
from tests.support.code_llama import code_llama_tokenizer, one_word_model
from tests.support.programs import error, freed
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import listening

# The fields that llama.vscode and Continue send, as their sources in November 2026 have them.
LLAMA_VSCODE = {
    "id_slot": 0,
    "input_prefix": "the cat\n",
    "input_suffix": "\nsat",
    "input_extra": [{"text": "the cat sat", "time": 1764244800000, "filename": "/home/me/cat.py"}],
    "prompt": "the",
    "n_predict": 128,
    "n_cmpl": 1,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
}
LLAMA_VSCODE_BEFOREHAND = {
    "id_slot": 0,
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": LLAMA_VSCODE["input_extra"],
    "prompt": "",
    "n_predict": 0,
    "samplers": [],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1,
}
CONTINUE = {
    "model": "scripted",
    "max_tokens": 128,
    "temperature": 0.01,
    "stream": True,
    "stop": ["<PRE>", "<SUF>", "<MID>", "<EOT>", "\n\n", "\r\n\r\n", "/src/", "#- coding: utf-8", "```"],
    "prompt": "<PRE> # Path: cat.py\nthe cat <SUF>\nsat <MID>",
}


def app_of(chat, settings, metrics=None):
    app = FastAPI()
    limiter = ConcurrencyLimiter(settings.client_limit)
    app.include_router(api_router(chat, settings, limiter, metrics or Metrics(chat)))
    return app


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return code_llama_tokenizer(tmp_path_factory.mktemp("code-llama"))


@pytest.fixture(scope="module")
def code_llama(settings, tokenizer):
    chat = ChatModel(settings).serve(tokenizer, one_word_model(tokenizer))
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def http(code_llama, settings):
    with TestClient(app_of(code_llama, settings), base_url="http://localhost") as http:
        yield http


def events(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_llama_vscode_gets_what_stands_between(http):
    answer = http.post("/infill", json=LLAMA_VSCODE).json()
    assert (answer["content"], answer["stop"], answer["stop_type"]) == (" x", True, "eos")
    assert answer["tokens_predicted"] == answer["timings"]["predicted_n"] == 1
    assert answer["generation_settings"]["n_ctx"] == 512


def test_llama_vscode_may_ask_for_several(http):
    answers = http.post("/infill", json=LLAMA_VSCODE | {"n_cmpl": 3}).json()
    assert [answer["content"] for answer in answers] == [" x"] * 3


def test_llama_vscode_has_its_snippets_read_beforehand_without_a_text(http):
    answer = http.post("/infill", json=LLAMA_VSCODE_BEFOREHAND).json()
    assert (answer["content"], answer["tokens_predicted"]) == ("", 0)
    streamed = events(http.post("/infill", json=LLAMA_VSCODE_BEFOREHAND | {"stream": True}))
    assert [(each["content"], each["stop"]) for each in streamed] == [("", True)]


def test_an_infill_streams_in_llama_cpps_events(http):
    pieces = events(http.post("/infill", json={**LLAMA_VSCODE, "stream": True}))
    assert "".join(piece["content"] for piece in pieces) == " x"
    assert [piece["stop"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_continue_gets_what_stands_between_the_marks_that_it_writes(http):
    answer = http.post("/v1/completions", json=CONTINUE | {"model": ""})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(answer)) == " x"
    assert events(answer)[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_suffix_asks_for_what_stands_before_it(http):
    answer = http.post("/v1/completions", json={"prompt": "the cat", "suffix": " sat"}).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (" x", "stop")
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("prompt", ["", ["", "the"]])
def test_before_a_suffix_there_may_be_nothing(http, prompt):
    choices = http.post("/v1/completions", json={"prompt": prompt, "suffix": " sat"}).json()["choices"]
    assert {choice["text"] for choice in choices} == {" x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": [1, 2]}, "prompt"), ({"prompt": [[1], "a"]}, "prompt"), ({"prompt": "a", "echo": True}, "echo")],
)
def test_what_does_not_go_with_a_suffix_is_named(http, fields, param):
    answer = http.post("/v1/completions", json={"suffix": "b", **fields})
    assert (answer.status_code, error(answer)["param"]) == (400, param)


def test_no_suffix_is_the_text_alone(http):
    answer = http.post("/v1/completions", json={"prompt": "the", "suffix": "", "max_tokens": 3}).json()
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("fields", [{}, {"n_predict": 2}, {"n_predict": -1}, {"n_predict": 10**6}])
def test_more_code_than_fits_is_shortened_and_not_refused(http, fields):
    long = {"input_prefix": "the cat\n" * 1_000, "input_suffix": "\nsat" * 1_000, **fields}
    answer = http.post("/infill", json=long)
    assert answer.json()["content"] == " x"
    assert 200 < answer.json()["tokens_evaluated"] <= 512


def test_a_field_that_nobody_knows_is_still_refused(http):
    answer = http.post("/infill", json={"input_prefix": "a", "lora": [{"id": 0, "scale": 0.5}]})
    assert (answer.status_code, error(answer)["param"]) == (400, "lora")


def test_a_base_model_tells_a_chat_what_to_do_instead(http):
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}]})
    assert answer.status_code == 400
    assert "/v1/completions" in error(answer)["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "input_suffix"),
    ],
)
def test_a_model_of_too_few_rows_refuses_with_a_sentence(settings, tokenizer, path, fields, param):
    model = one_word_model(tokenizer, rows=tokenizer.convert_tokens_to_ids("▁<EOT>"))
    chat = ChatModel(settings).serve(tokenizer, model)
    answer = TestClient(app_of(chat, settings), base_url="http://localhost").post(path, json=fields)
    assert (answer.status_code, error(answer)["param"]) == (400, param)
    assert "CodeLlama-7b" in error(answer)["message"]
    chat.close()


class Asked(ScriptedChat):
    def stream_completion(self, input_ids, params, *, to_the_end=False):
        self.asked.append(params)
        return Scripted("x")

    def encode_text(self, text):
        return [1]

    def encode_infilling(self, prefix, suffix, *, extra=(), room=None):
        self.asked.append((prefix, suffix, extra))
        return [1]


def test_a_text_is_not_penalised_for_repeating_itself_unless_asked(settings):
    # Code repeats itself: at 1.1, brackets and indents became unlikely.
    chat = Asked()
    http = TestClient(app_of(chat, settings), base_url="http://localhost")
    http.post("/v1/completions", json={"prompt": "a"})
    http.post("/v1/completions", json={"prompt": "a", "repetition_penalty": 1.3})
    http.post("/infill", json={"input_prefix": "a"})
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    penalties = [each.repetition_penalty for each in chat.asked if hasattr(each, "repetition_penalty")]
    assert penalties == [1.0, 1.3, 1.0]
    assert chat.asked[-1][1].repetition_penalty == settings.sampling.repetition_penalty > 1


def test_the_prompt_of_an_infill_stands_behind_its_prefix(settings):
    chat = Asked()
    TestClient(app_of(chat, settings), base_url="http://localhost").post("/infill", json=LLAMA_VSCODE)
    assert chat.asked[0] == ("the cat\nthe", "\nsat", ["the cat sat"])


@pytest.mark.parametrize(
    ("indent", "pieces", "text"),
    [
        (4, ["a\n", "    b\n", "  ", "c\n"], "a\n    b\n  "),
        (4, ["a\n    b", "\nc"], "a\n    b\n"),
        (1, ["a\n\tb\n\tc"], "a\n\tb\n\tc"),
        (0, ["a\nb\nc"], "a\nb\nc"),
        (4, ["a ", "b"], "a b"),
    ],
)
def test_an_answer_ends_where_a_line_is_indented_less_than_asked(indent, pieces, text):
    whole = Scripted(*pieces)
    reply = CutReply(whole, indent, 0)
    assert "".join(reply) == text
    assert reply.finish_reason == ("length" if text != "".join(pieces) else "stop")
    assert (whole.finish_reason == "cancelled") == (text != "".join(pieces))


def test_an_answer_that_takes_too_long_ends_once_it_has_a_line(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("llama2_chat.server.infill.time", SimpleNamespace(monotonic=lambda: next(now)))
    reply = CutReply(Scripted("a", "b", "c", "\n", "d", "e"), 0, 1.5)
    assert "".join(reply) == "abc\n"
    assert reply.finish_reason == "length"


KEYS = 40


@pytest.mark.slow
def test_an_abort_at_each_key_frees_the_slot(settings, tokenizer):
    chat = ChatModel(settings).serve(tokenizer, one_word_model(tokenizer, ends=False))
    metrics = Metrics(chat)
    app = app_of(chat, settings, metrics)
    endless = {"n_predict": 400, "t_max_predict_ms": None}
    with listening(lambda: server_config(app, settings, port=0)) as port:
        for typed in range(KEYS):
            leave(port, "/infill", {**LLAMA_VSCODE, **endless, "prompt": "x" * typed, "n_cmpl": 3})
            written = f"<PRE> {'x' * typed} <SUF>\nsat <MID>"
            leave(port, "/v1/completions", {**CONTINUE, "model": "", "max_tokens": 400, "prompt": written})
        freed(chat)
    ended = [line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if "chat_requests_total{" in line]
    assert sum(float(count) for name, count in ended if "length" not in name) >= KEYS  # most left in mid-answer
    chat.close()


def leave(port, path, fields):
    """Ask, and go as soon as there is an answer to one that is streamed."""
    body = json.dumps(fields)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        if fields["stream"]:
            connection.recv(1)
