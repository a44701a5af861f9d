"""POST /v1/embeddings: what programs send, what they get, and who is let in."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama2_chat.errors import ChatError
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.metrics import Metrics
from llama2_chat.server.openai_api import api_router
from llama2_chat.server.security import add_security_middleware
from tests.support.encoders import WordMeanings
from tests.support.programs import error
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving

TEXTS = ["The lighthouse keeper", "Möwen", "insurance"]
ALL = [[0.5**0.5, 0.5**0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.fixture
def embedder():
    return WordMeanings()


def visitor(settings, embedder, limit=0, **headers):
    app, chat = FastAPI(), ScriptedChat()
    add_security_middleware(app, settings)
    limiter = ConcurrencyLimiter(limit)
    app.include_router(api_router(chat, settings, limiter, Metrics(chat), embedder=embedder))
    return TestClient(app, "http://localhost", headers=headers)


def ask(client, input=TEXTS, **more):
    return client.post("/v1/embeddings", json={"input": input, **more})


def test_a_list_of_texts_gives_a_list_of_vectors_in_openais_form(settings, embedder):
    answer = ask(visitor(settings, embedder), model="word-meanings", user="anna", dimensions=4).json()
    assert [each["embedding"] for each in answer["data"]] == pytest.approx(np.array(ALL), abs=1e-7)
    assert [(each["object"], each["index"]) for each in answer["data"]] == [("embedding", n) for n in range(3)]
    assert (answer["object"], answer["model"]) == ("list", "word-meanings")
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


def test_many_texts_are_computed_some_at_a_time_and_come_in_their_order(settings, embedder):
    answer = ask(visitor(settings, embedder), TEXTS * 10).json()
    assert [each["embedding"] for each in answer["data"]] == pytest.approx(np.array(ALL * 10), abs=1e-7)
    assert answer["usage"]["prompt_tokens"] == 50
    assert {purpose for purpose, _ in embedder.asked} == {"request"}  # without the prefixes of questions and documents
    assert max(len(texts) for _, texts in embedder.asked) <= 8


def test_one_text_by_itself_and_base64_are_taken(settings, embedder):
    (item,) = ask(visitor(settings, embedder), TEXTS[0], encoding_format="base64").json()["data"]
    assert np.frombuffer(base64.b64decode(item["embedding"]), "<f4") == pytest.approx(ALL[0])


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": [1, 2, 3]}, "input", "token ids of another tokenizer"),
        ({"input": [[1, 2], [3]]}, "input", "check_embedding_ctx_length=False"),
        ({"input": ""}, "input", "nothing empty"),
        ({"input": []}, "input", "nothing empty"),
        ({"input": ["a", None]}, "input", "a text or a list of texts"),
        ({"input": {"a": 1}}, "input", "a text or a list of texts"),
        ({"input": ["a"] * 2049}, "input", "2,048 texts"),
        ({}, "input", "input is missing"),
        ({"input": "a", "model": "gpt-4"}, "model", "There is no encoder 'gpt-4' here; this server has word-meanings"),
        ({"input": "a", "dimensions": 2}, "dimensions", "gives 4 dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "input_type": "query"}, "input_type", "Leave it out"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused_in_a_sentence(settings, embedder, body, param, said):
    refused = error(visitor(settings, embedder).post("/v1/embeddings", json=body))
    assert refused["param"] == param
    assert said in refused["message"]
    assert not embedder.asked


def test_a_text_that_is_too_long_is_the_programs_fault(settings, embedder, monkeypatch):
    def refuse(*_):
        raise ChatError("A text has 731 tokens, and this encoder reads 512. Send it in parts.")

    monkeypatch.setattr(embedder, "embed", refuse)
    answer = ask(visitor(settings, embedder))
    assert (answer.status_code, error(answer)["param"]) == (400, "input")


def test_without_an_encoder_programs_are_told_what_is_missing(settings, embedder):
    assert "EMBEDDINGS" in error(ask(visitor(settings, None)))["message"]
    embedder.state = "loading"
    answer = ask(visitor(settings, embedder))
    assert (answer.status_code, error(answer)["code"]) == (503, "model_loading")
    embedder.fail("The encoder's server cannot be reached.")
    answer = ask(visitor(settings, embedder))
    assert (answer.status_code, error(answer)["message"]) == (503, "The encoder's server cannot be reached.")


def test_the_guards_of_other_routes_hold_here(settings, embedder):
    keyed = replace(settings, api_keys=("sesame",), body_limit_mb=0.001)
    assert ask(visitor(keyed, embedder)).status_code == 401
    with_key = visitor(keyed, embedder, authorization="Bearer sesame")
    assert ask(with_key).status_code == 200
    assert ask(with_key, "a" * 2000).status_code == 413
    with_login = replace(settings, auth_file="users.txt")  # /v1 would be a way around it
    assert ask(visitor(with_login, embedder)).status_code == 401


def test_a_request_counts_as_one_answer_of_its_client(settings, embedder, monkeypatch):
    begun, goes_on, embed = threading.Event(), threading.Event(), embedder.embed
    monkeypatch.setattr(embedder, "embed", lambda *args: (begun.set(), goes_on.wait(60), embed(*args))[2])
    with visitor(settings, embedder, limit=1) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client)
        begun.wait(60)
        second = ask(client)
        goes_on.set()
        assert (first.result().status_code, second.status_code) == (200, 429)


@pytest.mark.slow
def test_the_openai_library_gets_vectors(settings, scripted, embedder, monkeypatch):
    monkeypatch.setattr("app._make_embedder", lambda _: embedder)
    with serving(scripted, settings) as address, openai.OpenAI(base_url=f"{address}v1", api_key="none") as client:
        answer = client.embeddings.create(model="word-meanings", input=TEXTS)  # as base64, unless told otherwise
    assert [each.embedding for each in answer.data] == pytest.approx(np.array(ALL), abs=1e-7)
