"""That API, health and metrics know ChatBackend alone: here they serve one of a few lines, with no model at all."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama2_chat.errors import BadGrammar, Busy, ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.server.health import health_router
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.metrics import Metrics
from llama2_chat.server.openai_api import api_router
from llama2_chat.types import Capabilities, Occupancy, ServerStatus, Status, Timing, Usage
from tests.support.programs import HELLO, ask, error


class Echo:
    """A reply that repeats what was asked."""

    queue_position, finish_reason, timing, relaxed = 0, None, Timing(0.1, 20.0), ()

    def __init__(self, words):
        self.words, self.usage = iter(words), Usage(len(words), len(words))

    def __aiter__(self):
        return self

    async def __anext__(self):
        for word in self.words:
            return word
        self.finish_reason = "stop"
        raise StopAsyncIteration

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        self.close()

    def close(self):
        self.finish_reason = self.finish_reason or "cancelled"


class EchoChat:
    """A ChatBackend that repeats the question. `asked` is what came with the last one, `error` what it raises."""

    capabilities = Capabilities(supports_token_ids=True, knows_queue=True, can_fail_over=True, counts_tokens=True)
    state, status, mode, context_length = "ready", Status("ready", model="echo", device="paper"), "", 100
    occupancy, gpu_memory = Occupancy(1, 2, 30, 400, preemptions=5, drafted=7, accepted=6), [(3, 4)]
    servers = [ServerStatus("a:80", True, 1), ServerStatus("b:80", False, 0)]  # noqa: RUF012
    error = None

    def stream_reply(self, messages, params, *, trim=True, to_the_end=False, tools=None):
        self.asked = (messages, params.max_new_tokens, trim, to_the_end)
        if self.error:
            raise self.error
        return Echo(messages[-1]["content"].split())

    def stream_completion(self, input_ids, params, *, to_the_end=False):
        self.asked = (input_ids, params.max_new_tokens, to_the_end)
        return Echo([f"{id} " for id in input_ids])

    def encode(self, messages, tools=None):
        raise AssertionError("a chat request is encoded by stream_reply alone")

    def encode_text(self, text):
        return [1, *map(ord, text)]


@pytest.fixture
def chat():
    return EchoChat()


@pytest.fixture
def http(chat, settings):
    app = FastAPI()
    app.include_router(health_router(chat))
    app.include_router(api_router(chat, settings, ConcurrencyLimiter(0), Metrics(chat)))
    return TestClient(app, base_url="http://localhost")


def complete(http, **fields):
    return http.post("/v1/completions", json={"prompt": "ab", **fields})


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_any_backend_answers_programs(http, stream):
    answer = ask(http, stream=stream)
    assert answer.status_code == 200
    if stream:
        assert answer.text.count('"content":"Say"') == answer.text.count('"content":"hello."') == 1
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"][0]["message"]["content"] == "Sayhello."
        assert answer.json()["usage"]["total_tokens"] == 4


def test_a_chat_request_is_one_call_that_says_how_long_and_whether_to_trim(http, chat, settings):
    default = settings.sampling.max_new_tokens
    ask(http, max_tokens=7)
    assert chat.asked == (HELLO, 7, False, False)
    ask(http, max_tokens=None, trim=True)
    assert chat.asked == (HELLO, default, True, True)


def test_a_text_is_one_call_too_with_its_ids(http, chat, settings):
    assert complete(http, max_tokens=7).json()["choices"][0]["text"] == "1 97 98 "
    assert chat.asked == ([1, 97, 98], 7, False)
    complete(http, prompt=[5, 6])
    assert chat.asked == ([5, 6], settings.sampling.max_new_tokens, True)


@pytest.mark.parametrize(
    ("raised", "status", "code", "param"),
    [
        (PromptTooLong(90, 100, 20), 400, "context_length_exceeded", "messages"),
        (BadGrammar("Not this schema."), 400, "invalid_value", "response_format"),
        (ChatError("Not this order."), 400, "invalid_value", "messages"),
        (Busy("Full."), 429, "rate_limit_exceeded", None),
        (ModelUnavailable("Gone."), 503, "model_unavailable", None),
        (RuntimeError("/secret/path"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_a_backend_raises_has_a_status_and_keeps_its_sentence(http, chat, raised, status, code, param):
    chat.error = raised
    answer = ask(http)
    assert (answer.status_code, error(answer)["code"], error(answer)["param"]) == (status, code, param)
    assert (error(answer)["message"] == str(raised)) is isinstance(raised, ChatError)
    assert f'chat_errors_total{{code="{code}"}} 1.0' in http.get("/metrics").text


def test_metrics_show_whatever_a_backend_knows_of_its_queue_memory_and_servers(http):
    ask(http)
    numbers = set(http.get("/metrics").text.splitlines())
    assert numbers >= {
        "chat_ready 1.0",
        "chat_requests_running 1.0",
        "chat_requests_waiting 2.0",
        "chat_kv_cache_used_tokens 30.0",
        "chat_kv_cache_capacity_tokens 400.0",
        "chat_preemptions_total 5.0",
        "chat_drafted_tokens_total 7.0",
        "chat_accepted_tokens_total 6.0",
        'chat_server_healthy{server="a:80"} 1.0',
        'chat_server_healthy{server="b:80"} 0.0',
        'chat_server_requests_running{server="a:80"} 1.0',
        'chat_gpu_memory_used_bytes{gpu="0"} 3.0',
        'chat_gpu_memory_capacity_bytes{gpu="0"} 4.0',
        'chat_requests_total{outcome="stop",route="/v1/chat/completions"} 1.0',
        "chat_prompt_tokens_total 2.0",
    }


def test_metrics_are_silent_about_what_a_backend_does_not_know(http, chat):
    chat.occupancy, chat.servers, chat.gpu_memory = None, (), []
    numbers = http.get("/metrics").text
    assert "chat_ready 1.0" in numbers
    assert "chat_requests_running" not in numbers
    assert "chat_server" not in numbers
