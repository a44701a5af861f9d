"""Our own page and API in front of servers: another of our own, and odd_server.py."""

from dataclasses import replace

import httpx
import openai
import pytest

from llama2_chat.remote import RemoteModel, faults
from llama2_chat.remote.remote_model import NO_TOKENS
from llama2_chat.server.metrics import Metrics
from llama2_chat.types import SamplingParams
from tests.support.odd_server import HEAD, event, reset, silence, status
from tests.support.remote import HELLO, behind
from tests.support.serving import serving
from tests.support.waiting import until

# Gradio 6.31 uses what pandas 3 is about to drop.


@pytest.fixture(scope="module")
def own(chat, settings):
    """Our own server, as the remote of another of ours."""
    with serving(chat, settings) as address, behind(settings, address) as model:
        assert model.state == "ready", model.status.error
        yield model


@pytest.fixture(scope="module")
def own_address(own, settings):
    with serving(own, settings) as address:
        yield address


@pytest.mark.slow
def test_our_own_server_behind_our_own_gives_the_same_answer(own_address, chat):
    params = SamplingParams(temperature=0, max_new_tokens=12)
    with chat.stream_reply(HELLO, params) as reply:
        text = "".join(reply)
    with openai.OpenAI(base_url=f"{own_address}v1", api_key="none", max_retries=0) as client:
        (model_object,) = client.models.list().data
        assert (model_object.id, model_object.max_model_len) == (chat.status.model, chat.context_length)
        fields = {"model": model_object.id, "messages": HELLO, "temperature": 0, "max_tokens": 12}
        answer = client.chat.completions.create(**fields)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "length")
        assert answer.usage.prompt_tokens == len(chat.encode(HELLO))
        chunks = client.chat.completions.create(**fields, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_the_page_in_front_counts_as_the_server_behind_does(own, chat):
    old = [{"role": "user", "content": "word " * 9000}, {"role": "assistant", "content": "Yes."}]
    params = SamplingParams(max_new_tokens=2)
    assert own.fit(HELLO, params) == chat.fit(HELLO, params)
    assert own.fit([*old, *HELLO], params) == chat.fit([*old, *HELLO], params)


def test_a_reader_who_leaves_our_page_frees_the_model_behind_it(own, chat):
    with own.stream_reply(HELLO, SamplingParams(max_new_tokens=3000)) as reply:
        next(reply)
        assert chat.occupancy.running == 1
    until(lambda: not chat.occupancy.running)


def test_what_is_too_long_for_the_server_behind_is_refused_or_trimmed_as_a_program_asks(own_address):
    old = [{"role": "user", "content": "word " * 9000}, {"role": "assistant", "content": "Yes."}]
    body = {"messages": [*old, *HELLO], "max_tokens": 2}
    with httpx.Client(base_url=own_address, timeout=60) as http:
        for stream in (False, True):
            refused = http.post("/v1/chat/completions", json={**body, "stream": stream})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert "8,192" in refused.json()["error"]["message"]
        usage = http.post("/v1/chat/completions", json={**body, "trim": True}).json()["usage"]
    assert usage["dropped_messages"] == 2
    assert usage["prompt_tokens"] < 100


def test_health_and_metrics_tell_of_the_servers_behind(own, own_address):
    with httpx.Client(base_url=own_address) as http:
        health = http.get("/healthz").json()
        assert (health["status"], health["model"], health["device"]) == ("ready", own.status.model, "a server")
        numbers = http.get("/metrics").text
    assert f'chat_server_healthy{{server="{own.servers[0].name}"}} 1.0' in numbers
    assert f'chat_server_requests_running{{server="{own.servers[0].name}"}} 0.0' in numbers


def test_servers_that_differ_in_their_paths_alone_are_told_apart(settings):
    """Prometheus takes no sample that is there twice."""
    urls = "http://gpus:8000/one/v1,http://gpus:8000/two/,http://gpus:8000/two/v1/chat/completions"
    numbers = Metrics(RemoteModel(replace(settings, inference_url=urls))).text().decode()
    samples = [line for line in numbers.splitlines() if line.startswith("chat_server_healthy")]
    assert samples == [f'chat_server_healthy{{server="gpus:8000/{path}"}} 0.0' for path in ("one", "two")]


def test_what_only_the_model_itself_could_do_is_refused(settings, odd):
    del odd.models[0]["max_model_len"]
    with behind(settings, odd) as model, serving(model, settings) as address, httpx.Client(base_url=address) as http:
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/completions", {"prompt": [5]}),
                           ("/tokenize", {"messages": HELLO}), ("/tokenize", {"prompt": "a"})):  # fmt: skip
            answer = http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, NO_TOKENS)


def ask(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def test_programs_get_the_status_that_tells_them_what_to_do(settings, odd):
    with behind(settings, odd) as model, serving(model, settings) as address, httpx.Client(base_url=address) as http:
        assert ask(http).json()["choices"][0]["message"]["content"] == "Hello!"
        assert "max_tokens" not in odd.requests[-1]
        odd.answer = status(429, {"error": {"message": "full"}})
        assert (ask(http).status_code, "Retry-After" in ask(http).headers) == (429, True)
        odd.answer = status(400, {"error": {"message": "No."}})
        assert (ask(http).status_code, ask(http, stream=True).status_code) == (400, 400)
        odd.answer = [HEAD, event("a"), reset]
        assert ask(http).json()["error"]["code"] == "generation_failed"
        assert faults.CUT in ask(http, stream=True).text.splitlines()[-2]
        odd.answer = odd.probe = status(401, {})
        assert ask(http, stream=True).status_code == 503
        until(lambda: model.state == "failed")
        assert http.get("/healthz").json() == {"status": "failed", "error": faults.WRONG_KEY}
        assert ask(http).json()["error"]["message"] == faults.WRONG_KEY


def test_a_program_that_leaves_before_the_server_accepts_is_not_waited_for(settings, odd):
    odd.answer = [lambda connection: (silence(connection), odd.left.set())]
    with behind(settings, odd) as model, serving(model, settings) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}v1/chat/completions", json={"messages": HELLO}, timeout=0.2)
        assert odd.left.wait(20)
