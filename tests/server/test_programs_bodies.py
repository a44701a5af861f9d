"""Requests as known programs put them together, whole: what they send around the question must not get in its way."""

import httpx
import openai
import pytest

from llama2_chat.server.openai_types import ChatRequest, CompletionRequest

READ_FILE = {
    "name": "read_file",
    "description": "Reads a file.",
    "parameters": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"path": {"type": "string"}, "start_line": {"type": ["integer", "null"], "format": "uint32"}},
        "required": ["path"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": READ_FILE}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a.py"}'}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "print(1)"}
SYSTEM = {"role": "system", "content": "You are an expert coder."}
USER = {"role": "user", "content": "What does a.py print?"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "<task>Read it</task>"}, {"type": "text", "text": "Go."}]}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}

CHATS = {
    "Open WebUI, a chat": {
        "messages": [SYSTEM, USER], "temperature": 0.8, "top_p": 0.9, "max_tokens": 128, "seed": 0, "stop": ["\n\n"],
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": {}, **WITH_USAGE,
    },
    "Open WebUI, a title": {"messages": [USER], "stream": False, "max_completion_tokens": 1000},
    "LibreChat": {
        "messages": [SYSTEM, USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT | {"name": "x"}],
        "user": "67a0", "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "tools": TOOLS,
        "parallel_tool_calls": True, **WITH_USAGE,
    },
    "Continue": {
        "messages": [SYSTEM, USER, {"role": "assistant", "content": " ", "tool_calls": [CALL]}, RESULT],
        "max_tokens": 4096, "stream": True, "stream_options": {"include_usage": True}, "tools": TOOLS,
        "parallel_tool_calls": False,
    },
    "Zed": {
        "messages": [
            SYSTEM, USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
            RESULT | {"content": [{"type": "text", "text": "print(1)"}]},
        ],
        "max_completion_tokens": 4096, "temperature": 1.0, "tool_choice": "auto", "parallel_tool_calls": False,
        "tools": TOOLS, "prompt_cache_key": "thread-1", **WITH_USAGE,
    },
    "Cline": {
        "messages": [SYSTEM, PARTS, {"role": "assistant", "content": "I read.", "tool_calls": [CALL]}, RESULT, PARTS],
        "temperature": 0, "tools": TOOLS, **WITH_USAGE,
    },
    "aider": {
        "messages": [SYSTEM, USER, {"role": "assistant", "content": "Ok."}, USER, SYSTEM],
        "temperature": 0, "stream": True,
    },
    "llama.vscode, an edit": {
        "messages": [SYSTEM, USER], "stream": False, "cache_prompt": True, "samplers": "edkypmxt", "temperature": 0.8,
        "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "typical_p": 1,
        "xtc_probability": 0, "xtc_threshold": 0.1, "repeat_last_n": 64, "repeat_penalty": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2,
        "dry_penalty_last_n": -1, "max_tokens": -1, "timings_per_token": False,
    },
    "llama.cpp's own page": {
        "messages": [USER], "stream": True, "return_progress": True, "sse_ping_interval": 1, "reasoning_control": True,
        "reasoning_format": "auto", "backend_sampling": False, "timings_per_token": True, "max_tokens": -1,
        "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
    },
}  # fmt: skip
# The marks of the models that fill in, line ends, and what no completion goes on with.
CONTINUES_STOPS = [
    "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<|im_start|>", "<|im_end|>", "\n\n", "\r\n\r\n", "/src/", "#- coding: utf-8", "```",
]  # fmt: skip
TEXTS = {
    "Continue": {"prompt": "def f(", "max_tokens": 4096, "temperature": 0.01, "stop": CONTINUES_STOPS, "stream": True},
    "llama.vscode": {"prompt": "def f(", "max_tokens": 128, "temperature": 0.1, "top_p": 0.99, "stream": False},
}  # fmt: skip


@pytest.mark.parametrize("program", CHATS)
def test_a_chat_as_a_program_sends_it_is_accepted(program):
    request = ChatRequest(model="m", **CHATS[program])
    request.reject_unsupported()
    assert request.conversation()[0]["role"] in ("system", "user")


@pytest.mark.parametrize("program", TEXTS)
def test_a_text_to_go_on_with_is_accepted_as_a_program_sends_it(program):
    CompletionRequest(model="m", **TEXTS[program]).reject_unsupported()


def test_an_agents_conversation_is_answered(http):
    answer = http.post("/v1/chat/completions", json=CHATS["Zed"] | {"max_completion_tokens": 3, "stream": False})
    assert answer.status_code == 200, answer.text


# ---- Addresses ----


@pytest.mark.parametrize("base", ["v1", "v1/"])
def test_the_address_may_end_with_a_slash(small_address, base):
    with openai.OpenAI(base_url=small_address + base, api_key="none", max_retries=0) as client:
        (model,) = client.models.list()
        assert client.models.retrieve(model.id).id == model.id
        assert client.chat.completions.create(model=model.id, messages=[USER], max_tokens=1).usage.completion_tokens


@pytest.mark.parametrize("base", ["", "v1/v1", "openai"])
def test_a_wrong_address_is_answered_with_the_right_one(small_address, base):
    with (
        openai.OpenAI(base_url=small_address + base, api_key="none", max_retries=0) as client,
        pytest.raises(openai.NotFoundError, match="their base URL ends with /v1"),
    ):
        client.chat.completions.create(model="m", messages=[USER])


def test_models_are_listed_and_shown_for_any_way_to_ask(http):
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    for name in ("someone/other", "a%2Fb", "../etc", "ä", "small%20", "%F0%9F%A6%99"):
        answer = http.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) in ((404, "model_not_found"), (404, "unknown_url"))


def test_a_page_of_another_site_may_not_ask_and_is_told_so_before(small_address):
    """vLLM lets every site ask, which on one's own machine lets any page that one opens use it."""
    preflight = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{small_address}v1/chat/completions", headers=preflight)
    assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (400, None)
