"""Models that are no Llama: each answers as generate() does, past its window and in company, or is refused.

The models have random weights, two layers or four, and windows of 24 tokens.
"""

import copy
from unittest.mock import Mock

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from llama2_chat.context import context_window
from llama2_chat.engine.architecture import check_architecture, translate_architecture_errors
from llama2_chat.engine.cpu_attention import CpuStep
from llama2_chat.engine.engine import Engine
from llama2_chat.engine.model_runner import build_runner
from llama2_chat.engine.paged_attention import Scoring
from llama2_chat.errors import ModelUnavailable
from llama2_chat.types import SamplingParams
from tests.support.engines import CPU, Ids, answer

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=64)
SHAPE = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.5},
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
WINDOW = {"sliding_window": 24}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 4, **WINDOW}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def rope(rope_type, **parameters):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


LONGROPE = {
    **rope("longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4),
    "original_max_position_embeddings": 160,
}
SERVED = {
    "Llama": ("Llama", {}),
    "Llama, linear RoPE": ("Llama", rope("linear", factor=4.0)),
    "Llama, dynamic NTK": ("Llama", rope("dynamic", factor=4.0)),
    "Llama, YaRN": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "Llama, Llama 3's RoPE": (
        "Llama",
        rope("llama3", factor=4.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "Mistral": ("Mistral", WINDOW),
    "Mixtral": ("Mixtral", {**WINDOW, "num_local_experts": 2}),
    "Phi-3": ("Phi3", WINDOW),
    "Phi-3, LongRoPE": ("Phi3", LONGROPE),
    "Qwen 2": ("Qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "Qwen 3": ("Qwen3", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 8}),
    "Gemma": ("Gemma", {"head_dim": 8}),
    "Gemma 2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "Gemma 3, text": ("Gemma3Text", {**GEMMA, "layer_types": ALTERNATING}),
    "Cohere 2": ("Cohere2", {**WINDOW, "num_hidden_layers": 4, "layer_types": ALTERNATING}),
    "OLMo 2": ("Olmo2", {}),
    "SmolLM 3": ("SmolLM3", {"num_hidden_layers": 4}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "GPT-2": ("GPT2", {"n_positions": 256}),
    "OPT": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}
WINDOWED = ["Mistral", "Qwen 2", "Gemma 2", "Gemma 3, text"]
REFUSED = {
    "Falcon": ("Falcon", {}, "has an attention of its own"),
    "Falcon, ALiBi": ("Falcon", {"alibi": True}, "has an attention of its own"),
    "Bloom": ("Bloom", {}, "has an attention of its own"),
    "MPT": ("Mpt", {"n_heads": 4, "n_layers": 2, "d_model": 32}, "has an attention of its own"),
    "StableLM": ("StableLm", {}, "keeps from its layers where the tokens of a step belong"),
    "GPT-OSS": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}, "with attention sinks"),
}


def random_model(name, config):
    torch.manual_seed(1)  # Mixtral's two likeliest ids tie with 0
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **config})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)


def serve(model, as_on_a_gpu=False, **runner):
    context, _ = context_window(model.config)
    runner = build_runner(model, lambda: {CPU: 2**25}, context, **runner)
    if as_on_a_gpu:  # there attention is in plain PyTorch, which computes anywhere
        runner._eager._on_cpu = False
    return Engine(runner, stop_ids=set())


def prompt(length):
    return [(5 * i * i + 3 * i + 11) % 97 for i in range(length)]


def generate(model, ids):
    alone = copy.deepcopy(model).generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=64, min_new_tokens=64, pad_token_id=0
    )
    return alone[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("name", "as_on_a_gpu"), [*((name, False) for name in SERVED), *((name, True) for name in WINDOWED)]
)
def test_past_its_window_and_beside_a_longer_neighbour_a_model_answers_as_generate_does(name, as_on_a_gpu):
    model = random_model(*SERVED[name])
    prompts = [prompt(40), prompt(90)]
    expected = [generate(model, ids) for ids in prompts]
    engine = serve(model, as_on_a_gpu, longest_chunk=32)
    try:
        assert answer(engine, prompts[0], GREEDY)[0] == expected[0]
        readers = [Ids(), Ids()]
        with engine.paused():
            for ids, reader in zip(prompts, readers, strict=True):
                engine.submit(ids, GREEDY, reader)
        assert [reader.rest() for reader in readers] == expected
    finally:
        engine.close()


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_computed_over_blocks_is_refused_with_the_reason(name):
    architecture, config, reason = REFUSED[name]
    model = random_model(architecture, config)
    with pytest.raises(ModelUnavailable, match=reason) as loaded:
        serve(model)
    with pytest.raises(ModelUnavailable) as announced:
        check_architecture(model.config)
    assert str(announced.value) == str(loaded.value)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("JetMoe", {"kv_channels": 8, "num_key_value_heads": 2}, "is built in a way that visitors cannot share here"),
        ("Whisper", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, "scores other tokens than"),
        ("Moshi", {"vocab_size": 96, "max_position_embeddings": 64, "ffn_dim": 64}, "scores other tokens than"),
    ],
)
def test_a_model_that_fails_in_its_first_step_is_refused_by_name(name, config, reason):
    # "The model could not be loaded because of an unexpected error."
    with (
        pytest.raises(ModelUnavailable, match=f"^{name}ForCausalLM {reason}"),
        translate_architecture_errors(f"{name}ForCausalLM"),
    ):
        serve(random_model(name, config))


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (AssertionError("heads"), ModelUnavailable),
        (RuntimeError("size mismatch"), ModelUnavailable),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError),
        (torch.AcceleratorError("CUDA error"), torch.AcceleratorError),
        (ModelUnavailable("no"), ModelUnavailable),
    ],
    ids=["an assertion", "shapes", "memory", "a broken GPU", "a refusal"],
)
def test_what_the_code_of_a_model_raises_is_the_models_and_memory_and_gpu_are_not(error, raised, monkeypatch):
    model = random_model("Llama", {})
    monkeypatch.setattr(model.model.norm, "forward", Mock(side_effect=error))
    with pytest.raises(raised), translate_architecture_errors("Llama"):
        model(torch.zeros(1, 1, dtype=torch.long))


def test_what_another_program_raises_is_no_fault_of_a_model():
    with pytest.raises(RuntimeError), translate_architecture_errors("Llama"):
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("name", SERVED)
def test_a_configuration_tells_that_a_model_can_be_served(name):
    architecture, config = SERVED[name]
    check_architecture(getattr(transformers, f"{architecture}Config")(**{**SHAPE, **config}))


def test_what_only_a_loaded_model_can_tell_refuses_nothing_before():
    check_architecture(transformers.JetMoeConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))


@pytest.mark.parametrize("name", WINDOWED)
def test_the_check_at_the_start_sees_a_window_that_is_ignored(name, monkeypatch):
    """A visitor of Mistral v0.1 got another model's answers past 4,096 tokens."""
    whole = CpuStep.attend

    def ignore_the_window(self, layer, query, key, value, scoring):
        return whole(self, layer, query, key, value, Scoring(scoring.scale, softcap=scoring.softcap))

    monkeypatch.setattr(CpuStep, "attend", ignore_the_window)
    with pytest.raises(ModelUnavailable, match="does not attend to its past"):
        serve(random_model(*SERVED[name]))


def test_a_deep_model_whose_logits_hang_on_last_bits_is_served():
    """Two computations of a 70B in 4 bits on GPUs are as far apart, and it was refused."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**SHAPE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 80, "initializer_range": 0.2}
    )
    serve(transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()).close()


def test_the_check_at_the_start_sees_positions_that_depend_on_the_neighbour():
    """LongRoPE over its whole length: one visitor's long chat changed another's answer."""
    model = random_model("Phi3", LONGROPE)
    assert context_window(model.config)[0] == 160
    with pytest.raises(ModelUnavailable, match="does not attend to its past"):
        Engine(build_runner(model, lambda: {CPU: 2**25}, context_length=256), stop_ids=set())
