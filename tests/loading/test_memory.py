"""In which precision a model fits, and where."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from llama2_chat.engine.model_runner import GPU_CHUNK
from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading import load
from llama2_chat.loading.choose import LLAMA_2_MODEL_ID, choose, fetch
from llama2_chat.loading.memory import (
    STEP_TOKENS,
    Gpu,
    Size,
    check_memory,
    choose_device_map,
    choose_precision,
    free_host_bytes,
    translate_out_of_memory,
)
from tests.support.loading import asking_for, refusal
from tests.support.serving import ignore

LLAMA_13B = LlamaConfig(
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    max_position_embeddings=4096,
)
GIB = 2**30


def test_int4_without_a_gpu_is_refused_with_what_is_fast_there():
    sentence = refusal(choose_precision, "int4", Size.of(LLAMA_13B), [])
    assert sentence == "QUANTIZATION=int4 needs a CUDA GPU. Unset it: int8 is fastest on a CPU."


@pytest.mark.parametrize(
    ("asked", "own", "gpus", "precision"),
    [
        ("auto", None, [], "int8"),
        ("none", None, [], "bfloat16"),
        ("nf4", None, [], "nf4"),
        ("auto", None, [Gpu(40 * GIB)], "bfloat16"),
        ("auto", None, [Gpu(40 * GIB, (7, 5))], "float16"),
        ("auto", None, [Gpu(22 * GIB)], "nf4"),
        ("auto", None, [Gpu(22 * GIB), Gpu(22 * GIB)], "bfloat16"),
        ("none", None, [Gpu(22 * GIB, (7, 0))], "float16"),
        ("int8", None, [Gpu(22 * GIB)], "int8"),
        ("auto", "gptq", [Gpu(22 * GIB)], "nf4"),
    ],
)
def test_the_precision_follows_the_setting_the_memory_and_the_checkpoint(asked, own, gpus, precision):
    size = replace(Size.of(LLAMA_13B), comes_in=own)
    assert choose_precision(asked, size, gpus)[0] == precision


def test_too_little_gpu_memory_is_refused_with_both_numbers_with_what_would_help():
    size = Size.of(LLAMA_13B)
    sentence = refusal(check_memory, LLAMA_2_MODEL_ID, "bfloat16", size, [Gpu(22 * 10**9)])
    assert "30.0 GB" in sentence  # 26.0 of weights, 0.8 of KV cache, 3.1 to work in
    assert "22.0 GB" in sentence
    assert "QUANTIZATION=nf4" in sentence
    sentence = refusal(check_memory, LLAMA_2_MODEL_ID, "nf4", size, [Gpu(8 * 10**9)])
    assert "11.1 GB" in sentence
    assert "larger GPU" in sentence
    assert "nf4" not in sentence.partition("free.")[2]


# What starts were left with, in GB, and how many tokens their KV caches then held: docs/measured.md.
STARTS = [
    *[("bfloat16", "none", 40, 13_632), ("bfloat16", "none", 78, 59_776), ("int8", "auto", 22, 13_312)],
    *[("int4", "auto", 22, 25_728), ("int4", "auto", 16, 11_392), ("nf4", "none", 24, 16_576)],
    ("nf4", "none", 16, 6_848),
]


@pytest.mark.parametrize(("precision", "kv_cache", "limit_gb", "tokens"), STARTS)
def test_what_a_model_needs_is_what_starts_took(precision, kv_cache, limit_gb, tokens):
    # It said 1.8 to 2.5 GB less than that.
    needed = replace(Size.of(LLAMA_13B), context=10**6, kv_cache=kv_cache).needed_bytes(precision, tokens)
    assert needed / 1e9 == pytest.approx(limit_gb, abs=0.5)


@pytest.mark.parametrize(
    ("kv_cache", "on_a_gpu", "on_a_cpu"), [("none", 2, 2), ("auto", 1, 2), ("fp8", 1, 1), ("int8", 1, 1)]
)
def test_keys_and_values_count_in_as_many_bytes_as_they_would_take(kv_cache, on_a_gpu, on_a_cpu):
    size = replace(Size.of(LLAMA_13B), kv_cache=kv_cache)
    for measure, number_bytes in ((size.needed_bytes, on_a_gpu), (size.host_bytes, on_a_cpu)):
        tokens = measure("bfloat16", 4096) - measure("bfloat16", 0)
        assert tokens / 4096 == pytest.approx(2 * 40 * 5120 * number_bytes, rel=0.02)


def test_memory_that_is_left_alone_is_counted_on_each_gpu():
    size = Size.of(LLAMA_13B)
    more = replace(size, headroom_bytes=size.headroom_bytes + 10**9)
    assert more.needed_bytes("nf4", 4096, gpus=2) == size.needed_bytes("nf4", 4096, gpus=2) + 2 * 10**9


def test_kv_headroom_gb_is_part_of_what_a_model_needs(tmp_path):
    LLAMA_13B.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    asked = [measure(fetch(choose(asking_for(tmp_path, kv_headroom_gb=gb)), ignore)) for gb in (1.5, 3)]
    assert asked[1] - asked[0] == 1_500_000_000


def measure(checkpoint):
    return load.measure(checkpoint.base, checkpoint.headroom_gb).needed_bytes("nf4", 4096)


def test_the_longest_step_is_the_engines():
    assert STEP_TOKENS == GPU_CHUNK


def test_one_gpu_is_used_if_it_is_enough_and_all_if_not():
    size = Size.of(LLAMA_13B)
    assert choose_device_map("bfloat16", size, [Gpu(24 * GIB), Gpu(80 * GIB)]) == ({"": 1}, None)
    assert choose_device_map("bfloat16", size, [Gpu(24 * GIB), Gpu(24 * GIB)])[0] == "auto"
    assert choose_device_map("nf4", size, [Gpu(24 * GIB), Gpu(23 * GIB)]) == ({"": 0}, None)
    assert choose_device_map("int8", size, []) == ({"": "cpu"}, None)


def test_memory_that_runs_out_while_loading_is_said_with_what_was_needed_and_left():
    sentence = refusal(run_out, "someone/model", "int8", 17_700_000_000)
    assert "In int8 it needs about 17.7 GB" in sentence
    assert "0.0 GB were left" in sentence
    assert "QUANTIZATION=nf4" in sentence


def run_out(*what):
    with translate_out_of_memory(*what):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out_in_four_bits_is_not_told_to_take_four_bits():
    with pytest.raises(ModelUnavailable) as refused, translate_out_of_memory("m", "nf4", 10**10):
        raise torch.OutOfMemoryError("out of memory")
    assert "QUANTIZATION" not in str(refused.value)
    assert "Choose a smaller model" in str(refused.value)


def test_memory_of_a_container_is_what_its_limit_leaves(tmp_path):
    everything = free_host_bytes(tmp_path)
    files = {"memory.max": "3000\n", "memory.current": "1000\n", "memory.stat": "anon 600\ninactive_file 400\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert (free_host_bytes(tmp_path), everything > 2400) == (2400, True)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes(tmp_path) > 2400
