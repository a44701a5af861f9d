"""Fields that nothing here looks at: with which values they ask for nothing, and how those that ask are refused.

Programs send every field that they have a setting for, most of them with the value that turns it off. The names and
their neutral values are those of OpenAI, vLLM, SGLang, llama.cpp, Ollama, OpenRouter, KoboldCpp and text-generation-
webui in November 2026. A field that openai_types.py declares has no line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Whatever they say, the answer is the same.
IGNORED = {
    # Whose request it is, and who may keep it.
    "user", "metadata", "store", "safety_identifier", "service_tier", "priority", "request_id", "rid", "session_id",
    "chat_id", "trace",
    # Where and with what it is computed.
    "provider", "route", "models", "allow_fallbacks", "quantizations", "keep_alive", "id_slot", "timeout", "usage",
    "prediction", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "n_cache_reuse", "extra_key",
    "backend_sampling", "guided_decoding_backend", "speculative.n_max", "speculative.n_min", "speculative.p_min",
    "speculative.type", "speculative.ngram_size_n", "speculative.ngram_size_m", "speculative.ngram_m_hits",
    "speculative_ngram", "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock",
    "low_vram", "numa", "f16_kv",
    # What is left of a prompt that outgrows the window, which is refused here.
    "n_keep", "n_discard", "num_keep", "truncation_length",
    # How the stream is cut, and what it tells of its progress.
    "stream_interval", "sse_ping_interval", "timings_per_token", "return_progress", "verbose",
    # Where reasoning is put: here it stays in the text.
    "include_reasoning", "separate_reasoning", "stream_reasoning", "reasoning_control",
    # What has an effect only with another field, which is refused.
    "parallel_tool_calls", "max_tool_calls", "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length",
    "dry_penalty_last_n", "dry_range", "dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "dynatemp_low",
    "dynatemp_high", "dynatemp_min", "dynatemp_max", "smoothing_curve", "adaptive_decay", "length_penalty",
    "early_stopping", "negative_prompt", "post_sampling_probs", "truncation_side", "spaces_between_special_tokens",
    "routed_experts_prompt_start", "routed_experts_start_len", "return_token_offsets", "return_mm_kwargs",
    "mm_processor_kwargs", "media_io_kwargs", "images_config", "use_audio_in_video",
}  # fmt: skip
# Over which tokens a repetition is penalised: here over all, -1. Without a penalty they are ignored as well.
PENALTY_WINDOWS = {"repeat_last_n", "rep_pen_range", "repetition_penalty_range", "repetition_range"}
UNSET: tuple[Any, ...] = (False, "", [], {})
# llama.cpp's, which its programs send whole; adaptive_p is the latest. Here the order is fixed.
SAMPLERS = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
OFF = (*UNSET, 0)
ONE = (*UNSET, 1)
# Name -> the values that ask for nothing, beside null. Of several fields that ask for something, the first here is
# named: first what makes it another question, then another kind of answer, its text, its words, what comes beside it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "messages": UNSET,
    "prompt": UNSET,
    "input": UNSET,
    "previous_response_id": UNSET,
    "conversation": UNSET,
    "instructions": UNSET,
    "background": UNSET,
    "context_management": UNSET,
    "input_ids": UNSET,
    "prompt_embeds": UNSET,
    "tools": UNSET,
    "functions": UNSET,
    "tool_choice": (*UNSET, "none", "auto"),
    "function_call": (*UNSET, "none", "auto"),
    "web_search_options": (),  # {} searches
    "plugins": UNSET,
    "modalities": (*UNSET, ["text"]),
    "audio": UNSET,
    "images": UNSET,
    "suffix": UNSET,
    "lora": UNSET,
    "lora_path": UNSET,
    "guided_whitespace_pattern": UNSET,
    "grammar_string": UNSET,
    "regex": UNSET,
    "ebnf": UNSET,
    "format": UNSET,
    "n_predict": (-1,),
    "num_predict": (-1,),
    "sampler_seed": (-1,),
    "num_beams": ONE,
    "use_beam_search": UNSET,
    "system": UNSET,
    "template": UNSET,
    "chat_template": UNSET,
    "chat_template_kwargs": UNSET,
    "options": UNSET,
    "reasoning_effort": (*UNSET, "none", "default"),
    "reasoning": (*UNSET, {"effort": "none"}, {"enabled": False}),
    "reasoning_format": (*UNSET, "none", "auto"),
    "reasoning_budget_tokens": (*UNSET, -1),
    "thinking": (*UNSET, {"type": "disabled"}),
    "thinking_token_budget": (*UNSET, -1),
    "verbosity": (*UNSET, "medium"),
    "moderation": UNSET,
    "transforms": UNSET,
    "truncation": (*UNSET, "disabled"),
    "truncate_prompt_tokens": UNSET,
    "add_generation_prompt": (*UNSET, True),
    "add_bos_token": (True,),
    "trim_stop": (True,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": UNSET,
    "no_stop_trim": UNSET,
    "minimum_message_content_tokens": OFF,
    "stop_regex": UNSET,
    "t_max_predict_ms": OFF,
    "max_tokens_second": OFF,
    "repetition_detection": UNSET,
    "ban_eos_token": UNSET,
    "bad_words": UNSET,
    "banned_strings": UNSET,
    "banned_tokens": UNSET,
    "custom_token_bans": UNSET,
    "allowed_token_ids": UNSET,
    "do_sample": (True,),
    "typical_p": ONE,
    "typical": ONE,
    "top_a": OFF,
    "top_n_sigma": (*OFF, -1),
    "nsigma": (*OFF, -1),
    "tfs": ONE,
    "tfs_z": ONE,
    "epsilon_cutoff": OFF,
    "eta_cutoff": OFF,
    "xtc_probability": OFF,
    "dry_multiplier": OFF,
    "mirostat": OFF,
    "mirostat_mode": OFF,
    "dynamic_temperature": UNSET,
    "dynatemp_mode": OFF,
    "dynatemp_range": OFF,
    "smoothing_factor": OFF,
    "skew": OFF,
    "adaptive_target": (*UNSET, -1),
    "repetition_decay": OFF,
    "rep_pen_slope": (*OFF, 1),
    "encoder_repetition_penalty": ONE,
    "no_repeat_ngram_size": OFF,
    "penalty_alpha": OFF,
    "guidance_scale": ONE,
    "min_keep": OFF,
    "samplers": (*UNSET, SAMPLERS, [*SAMPLERS, "adaptive_p"], "edkypmxt", "edskypmxt"),
    "n_indent": OFF,
    **dict.fromkeys(sorted(PENALTY_WINDOWS), (-1,)),
    "echo": UNSET,
    "top_logprobs": OFF,
    "prompt_logprobs": UNSET,
    "n_probs": OFF,
    "logprob_token_ids": UNSET,
    "cache_salt": UNSET,
}
NOTHING_STORED = "Nothing is stored here: send the whole conversation"
WHY_REFUSED = {
    "messages": "messages are for /v1/chat/completions; /v1/completions takes a prompt, /v1/responses an input.",
    "prompt": "A prompt is for /v1/completions; /v1/chat/completions takes messages, /v1/responses an input.",
    "input": "An input is for /v1/responses; /v1/chat/completions takes messages, /v1/completions a prompt.",
    "instructions": "instructions are for /v1/responses; /v1/chat/completions takes a system message.",
    "tools": "Tools are for /v1/chat/completions and /v1/responses. Leave them out.",
    "functions": "Functions are for /v1/chat/completions. Leave them out.",
    "modalities": "The answer can only be text: leave modalities out.",
    "audio": "The answer can only be text: leave audio out.",
    "suffix": "A suffix is for /v1/completions. Leave it out.",
    "reasoning_effort": "How much a model reasons cannot be set. Leave reasoning_effort out, or set it to none.",
    "verbosity": "How long answers are cannot be set: ask for it in a message, and leave verbosity out.",
    "options": "Ollama's options are fields of the request itself, such as temperature and max_tokens.",
    "previous_response_id": f"{NOTHING_STORED}, and leave previous_response_id out.",
    "conversation": f"{NOTHING_STORED}, and leave conversation out.",
    "background": "An answer ends with its request: leave background out, and stream the answer if it is long.",
    "cache_salt": "cache_salt is not available: all requests share one cache. Leave it out.",
}
# What other servers call a field that is ours.
OTHER_NAMES = {
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",  # of a chat it is a field of its own
    "max_output_tokens": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "rep_pen": "repetition_penalty",
    "sampler_seed": "seed",
    "stopping_strings": "stop",
    "min_length": "min_tokens",
    "n_cmpl": "n",
}


def asks_for_nothing(name: str, value: Any, also_neutral: Iterable[Any] = ()) -> bool:
    """Whether the answer is the same without this field. also_neutral: values for which a route says so."""
    if isinstance(value, dict):
        value = {key: each for key, each in value.items() if each is not None}
    if value is None or name in IGNORED:
        return True
    return any(_equal(value, neutral) for neutral in (*NEUTRAL.get(name, UNSET), *also_neutral))


def by_weight(names: Iterable[str]) -> list[str]:
    """The names, beginning with what changes an answer most; those that nobody knows come last, as they were."""
    weights = {name: weight for weight, name in enumerate(NEUTRAL)}
    return sorted(names, key=lambda name: weights.get(name, len(weights)))


def why_refused(name: str) -> str:
    """A sentence for the program's author."""
    if name in OTHER_NAMES:
        return f"{name} is another name for {OTHER_NAMES[name]}, and the two differ. Send one of them."
    known = "not available" if name in NEUTRAL else "not known"
    return WHY_REFUSED.get(name, f"{name!r:.60} with this value is {known} here. Leave it out.")


def in_our_names(body: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """The body with other servers' names of `fields` replaced. Both names may be there, if they say the same."""
    ours = dict(body)
    for theirs, name in OTHER_NAMES.items():
        if theirs in fields or ours.get(theirs) is None:
            continue
        if ours.get(name) in (None, -1) or _equal(ours[name], ours[theirs]):
            ours[name] = ours.pop(theirs)
    return ours


def _equal(one: Any, other: Any) -> bool:
    # To Python, true is 1 and false is 0.
    return one == other and isinstance(one, bool) == isinstance(other, bool)
