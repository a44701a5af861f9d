"""How many tokens a model holds, as people publish it."""

import pytest
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, Phi3Config

from llama2_chat.context import context_window


def linear(given, factor, **config):
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 10_000.0}
    return LlamaConfig(max_position_embeddings=given, rope_parameters=rope, **config)


def longrope(given, trained):
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    return Phi3Config(max_position_embeddings=given, original_max_position_embeddings=trained, rope_parameters=rope)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768, "rope_theta": 1e6}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8_192, "rope_theta": 5e5}
LLAMA_3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA_3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WHOLE = {
    "Llama 2": (LlamaConfig(max_position_embeddings=4_096), 4_096),
    "Vicuna-16k, which used a quarter of its window": (linear(4_096, 4.0), 16_384),
    "Vicuna-13b-v1.5-16k, which says so": (linear(4_096, 4.0, max_sequence_length=16_384), 16_384),
    "LLaMA-2-7B-32K, whose length counts its factor": (linear(32_768, 8.0), 32_768),
    "deepseek-coder, whose length counts its factor": (linear(16_384, 4.0), 16_384),
    "Qwen 2.5 with YaRN": (LlamaConfig(max_position_embeddings=32_768, rope_parameters=YARN), 131_072),
    "Llama 3.1": (LlamaConfig(max_position_embeddings=131_072, rope_parameters=LLAMA_3), 131_072),
    "Gemma 3": (Gemma3TextConfig(max_position_embeddings=131_072, rope_parameters=GEMMA_3), 131_072),
    "Phi-3-mini-4k": (Phi3Config(max_position_embeddings=4_096), 4_096),
    "Bloom, which does not say": (AutoConfig.for_model("bloom"), 4_096),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_holds_what_its_positions_were_stretched_to(name):
    config, tokens = WHOLE[name]
    assert context_window(config) == (tokens, "")


def test_longrope_ends_where_its_factors_would_change_with_the_longest_chat():
    tokens, why = context_window(longrope(131_072, 4_096))
    assert tokens == 4_096
    assert "4,096 of 131,072 tokens" in why


def test_dynamic_ntk_ends_where_its_factors_would_change_with_the_longest_chat():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    tokens, why = context_window(LlamaConfig(max_position_embeddings=2_048, rope_parameters=rope))
    assert tokens == 2_048
    assert "2,048 of 8,192 tokens" in why


def test_llama_4_ends_with_its_first_chunk_of_attention():
    config = AutoConfig.for_model("llama4_text", attention_chunk_size=8_192, max_position_embeddings=262_144)
    assert context_window(config)[0] == 8_192
