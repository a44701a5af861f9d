"""Fields as programs send them: most ask for nothing, some have other names, and what cannot be done is refused."""

import pydantic
import pytest

from llama2_chat.prompt import check_messages
from llama2_chat.server.errors import ApiError
from llama2_chat.server.neutral_fields import IGNORED, NEUTRAL
from llama2_chat.server.openai_types import ChatRequest, CompletionRequest, TokenizeRequest
from llama2_chat.types import SamplingParams
from tests.support.programs import HELLO, TALK

REFUSAL = {"type": "refusal", "refusal": "I would rather not."}

# ---- What asks for nothing ----

VLLM = {
    "frequency_penalty": 0, "logit_bias": None, "logprobs": False, "top_logprobs": 0, "max_tokens": None, "n": 1,
    "presence_penalty": 0.0, "response_format": None, "seed": None, "stop": [], "stream": False, "stream_options": None,
    "tools": None, "tool_choice": "none", "reasoning_effort": "none", "thinking_token_budget": -1,
    "include_reasoning": True, "parallel_tool_calls": True, "user": None, "use_beam_search": False, "top_k": -1,
    "min_p": 0.0, "repetition_penalty": 1.0, "watermarking": False, "length_penalty": 1.0, "stop_token_ids": [],
    "include_stop_str_in_output": False, "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "truncate_prompt_tokens": None, "prompt_logprobs": None,
    "allowed_token_ids": None, "bad_words": [], "echo": False, "add_generation_prompt": True,
    "continue_final_message": False, "add_special_tokens": False, "documents": None, "chat_template": None,
    "chat_template_kwargs": {}, "mm_processor_kwargs": None, "structured_outputs": None, "priority": 0,
    "request_id": "42", "session_id": "7", "return_tokens_as_token_ids": None, "return_token_ids": False,
    "routed_experts_prompt_start": 0, "return_mm_kwargs": True, "cache_salt": None, "kv_transfer_params": None,
    "vllm_xargs": {}, "repetition_detection": None, "stream_interval": 1, "guided_json": None, "guided_choice": None,
}  # fmt: skip
LLAMA_CPP = {
    "n_predict": -1, "seed": -1, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_p": 0.95, "min_p": 0,
    "xtc_probability": 0.0, "xtc_threshold": 0.1, "typical_p": 1.0, "repeat_last_n": 64, "repeat_penalty": 1.0,
    "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": 64,
    "dry_sequence_breakers": ["\n", ":", '"', "*"], "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "stop": [],
    "max_tokens": -1, "n_keep": 0, "n_discard": 0, "ignore_eos": False, "stream": True, "n_probs": 0, "min_keep": 0,
    "grammar": "", "top_n_sigma": -1.0, "speculative.n_max": 16, "timings_per_token": True, "return_progress": True,
    "id_slot": -1, "cache_prompt": True, "return_tokens": False, "t_max_predict_ms": 0, "n_indent": 0, "lora": [],
    "logit_bias": [], "reasoning_format": "auto", "response_fields": [], "post_sampling_probs": False, "n_cmpl": 1,
    "adaptive_target": -1.0, "backend_sampling": False, "parse_tool_calls": False,
}  # fmt: skip
OPENAI = {
    "audio": None, "function_call": "none", "functions": [], "logprobs": None, "max_completion_tokens": None,
    "metadata": {"a": "b"}, "modalities": ["text"], "moderation": None, "n": None, "parallel_tool_calls": None,
    "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "reasoning_effort": None, "safety_identifier": "s", "service_tier": "auto", "store": False, "stop": None,
    "stream_options": {"include_usage": None, "include_obfuscation": False}, "tool_choice": "auto",
    "top_logprobs": None, "user": "me", "verbosity": "medium", "web_search_options": None,
    "response_format": {"type": "text"},
}  # fmt: skip
CLIENTS = {
    "vLLM": VLLM,
    "llama.cpp": LLAMA_CPP,
    "OpenAI": OPENAI,
    "Ollama": {
        "keep_alive": "5m", "format": "", "options": {}, "think": False, "num_ctx": 4096, "num_predict": -1,
        "tfs_z": 1, "num_gpu": 1, "images": None,
    },
    "OpenRouter": {
        "provider": {"order": ["x"]}, "route": "fallback", "transforms": [], "plugins": [], "usage": {"include": True},
        "include_reasoning": False, "reasoning": {"effort": "none", "max_tokens": None}, "top_a": 0,
    },
    "SGLang": {
        "separate_reasoning": True, "stream_reasoning": True, "regex": None, "ebnf": None, "no_stop_trim": False,
        "lora_path": None, "return_hidden_states": False, "rid": None, "session_params": None, "stop_regex": None,
    },
    "SillyTavern": {
        "max_tokens": 250, "max_new_tokens": 250, "n_predict": 250, "num_predict": 250, "typical": 1, "min_length": 0,
        "repetition_penalty": 1, "rep_pen": 1, "repeat_penalty": 1, "rep_pen_range": 0, "repeat_last_n": 0, "tfs": 1,
        "skew": 0, "add_bos_token": True, "smoothing_factor": 0, "smoothing_curve": 1, "max_tokens_second": 0,
        "stop": ["\nYou:"], "stopping_strings": ["\nYou:"], "truncation_length": 4096, "ban_eos_token": False,
        "skip_special_tokens": True, "top_a": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "mirostat_mode": 0,
        "custom_token_bans": "", "banned_strings": [], "nsigma": 0, "no_repeat_ngram_size": 0, "penalty_alpha": 0,
        "guidance_scale": 1, "negative_prompt": "", "do_sample": True, "num_beams": 1, "length_penalty": 1,
        "encoder_repetition_penalty": 1, "early_stopping": False, "temperature_last": False, "seed": -1,
        "sampler_seed": None, "rep_pen_slope": 1, "grammar_string": "", "trim_stop": True,
    },
    "Anthropic's and DeepSeek's": {"thinking": {"type": "disabled"}, "thinking_budget": None, "enable_thinking": False},
}  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_what_clients_send_by_default_is_accepted(client):
    ChatRequest(messages=HELLO, **CLIENTS[client]).reject_unsupported()
    CompletionRequest(prompt="Hi", **CLIENTS[client] | {"add_special_tokens": True}).reject_unsupported()


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest, TokenizeRequest])
def test_whatever_is_optional_may_be_null(request_type):
    question = {"prompt": "Hi"} if request_type is CompletionRequest else {"messages": HELLO}
    request_type(**question, **dict.fromkeys(request_type.model_fields.keys() - question.keys()))


@pytest.mark.parametrize("stop", ["", [""], [], None])
def test_an_empty_stop_string_ends_nothing(stop):
    assert ChatRequest(messages=HELLO, stop=stop).params(SamplingParams()).stop == ()
    assert ChatRequest(messages=HELLO, stop=["", "x"]).params(SamplingParams()).stop == ("x",)


def test_minus_one_is_no_seed_and_no_limit():
    request = ChatRequest(messages=HELLO, seed=-1, max_tokens=-1, max_completion_tokens=-1)
    assert (request.params(SamplingParams()), request.requested_tokens) == (SamplingParams(), None)


def test_what_is_empty_names_no_model_and_no_format():
    request = ChatRequest(messages=HELLO, model="", response_format={})
    assert (request.model, request.response_format) == (None, None)


def test_a_field_may_have_the_name_that_another_server_gives_it():
    request = ChatRequest(messages=HELLO, n_predict=7, repeat_penalty=1.3, stopping_strings=["x"])
    params = request.params(SamplingParams())
    assert (params.max_new_tokens, params.repetition_penalty, params.stop) == (7, 1.3, ("x",))
    request.reject_unsupported()


def test_of_two_names_one_may_ask_for_nothing():
    for tokens, same in ((5, -1), (-1, 5), (None, 5), (5, 5)):
        request = ChatRequest(messages=HELLO, max_tokens=tokens, n_predict=same)
        request.reject_unsupported()
        assert request.requested_tokens == 5


# ---- What is refused ----


def refused(**fields):
    with pytest.raises(ApiError) as caught:
        ChatRequest(messages=HELLO, **fields).reject_unsupported()
    return caught.value.body["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", 0.9),
        ("skip_special_tokens", False),
        ("do_sample", False),
        ("add_special_tokens", True),
        ("web_search_options", {}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("repeat_last_n", 64),
        ("mirostat", 2),
        ("return_token_ids", True),
        ("prompt_logprobs", 0),
        ("cache_salt", "x"),
        ("nobody_knows", 0),
    ],
)
def test_a_field_that_asks_for_another_answer_is_refused_by_name(name, value):
    assert refused(**{name: value})["param"] == name


def test_of_several_the_one_that_changes_most_is_named_wherever_it_stands():
    fields = {"nobody_knows": 1, "n_probs": 5, "typical_p": 0.9, "chat_template": "x"}
    for name in ("chat_template", "typical_p", "n_probs", "nobody_knows"):
        assert refused(**fields)["param"] == name
        del fields[name]


def test_two_names_of_a_field_may_not_differ():
    assert "another name for max_tokens" in refused(max_tokens=5, n_predict=6)["message"]


def test_no_field_that_is_looked_at_is_also_said_to_have_no_effect():
    declared = ChatRequest.model_fields.keys() & CompletionRequest.model_fields.keys()
    assert not declared & {*NEUTRAL, *IGNORED}


# ---- Messages ----


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "I would rather not.", "tool_calls": None}, "I would rather not."),
        ({"content": [REFUSAL]}, "I would rather not."),
        ({"content": [{"type": "text", "text": "Well."}, REFUSAL]}, "Well.\nI would rather not."),
        ({"content": [{"type": "text", "text": ""}, {"type": "output_text", "text": "Well."}, "Yes."]}, "Well.\nYes."),
        ({"content": []}, ""),
        ({"content": ""}, ""),
    ],
    ids=["null", "nothing", "refusal", "refusal part", "both", "other parts", "no part", "empty"],
)
def test_an_assistants_message_may_say_nothing_or_refuse(message, text):
    answered = {"role": "assistant", **message}
    request = ChatRequest(messages=[HELLO[0], answered, TALK[-1]])
    assert request.conversation()[1] == {"role": "assistant", "content": text}


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "system", "content": None}])
def test_only_an_assistant_may_say_nothing(message):
    with pytest.raises(pydantic.ValidationError, match="it must be text"):
        ChatRequest(messages=[message, *HELLO])


def test_an_empty_answer_at_the_end_is_no_answer_to_go_on_with():
    request = ChatRequest(messages=[*HELLO, {"role": "assistant", "content": ""}])
    assert check_messages(request.conversation()) == check_messages(HELLO)
