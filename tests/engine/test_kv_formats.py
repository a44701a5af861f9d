"""Keys and values in 8 bits on a CPU: twice as many, and still the same text every time."""

import copy
from functools import partial

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from llama2_chat.engine.kv_pool import BLOCK_SIZE, CpuPool, EightBitPool, make_pool
from llama2_chat.engine.paged_attention import DecodeStep, Scoring
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.kv_codes import CODES, decode, encode
from tests.support.engines import CPU, GREEDY, answer, running, start

FORMATS = pytest.mark.parametrize("kv_cache", CODES)
PROMPTS = [[n, n + 1, n + 2] * 50 for n in range(4)]


def pool_of(model, kv_cache, tokens=10 * BLOCK_SIZE):
    return make_pool(kv_cache, model, lambda: {CPU: 0}, context_length=tokens, max_batch=1)


def test_a_cpu_keeps_keys_and_values_as_they_are_computed_unless_it_is_told_otherwise(tiny_llama):
    assert [pool_of(tiny_llama, kv_cache).format for kv_cache in ("auto", "none", "int8", "fp8")] == [
        *("none", "none", "int8", "fp8")
    ]


@FORMATS
def test_four_times_the_tokens_of_float32_fit_less_their_scales(tiny_llama, kv_cache):
    def tokens(kv_cache):
        return make_pool(kv_cache, tiny_llama, lambda: {CPU: 2**21}, context_length=64, max_batch=10**6).tokens

    head_dim = tiny_llama.config.head_dim
    assert tokens(kv_cache) / tokens("none") == pytest.approx(4 * head_dim / (head_dim + 2), rel=0.03)


@FORMATS
def test_a_pool_gives_back_what_was_written_copies_it_and_forgets_it(tiny_llama, kv_cache):
    pool = pool_of(tiny_llama, kv_cache)
    kv_heads, head_dim = pool.layers[1][0].shape[2:]
    key, value = torch.randn(2, 1, kv_heads, 100, head_dim)
    blocks = torch.tensor([7, 3])
    kv_index = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:100]
    pool.write(1, key, value, kv_index)

    def written(blocks):
        found = *pool.read(1, blocks, 100), *(states[:, :, :100] for states in pool.read_batch(1, blocks[None]))
        return [torch.equal(each, right) for each, right in zip(found, 2 * expected, strict=True)]

    expected = [decode(*encode(states, CODES[kv_cache]), torch.float32) for states in (key, value)]
    assert all(written(blocks))
    pool.copy(3, 5)
    pool.zero([3])
    assert all(written(torch.tensor([7, 5])))
    assert not any(written(blocks))
    assert pool.read(1, torch.tensor([3]), 64)[0].eq(0).all()


@pytest.mark.parametrize("kv_cache", ["none", *CODES])
def test_a_kernel_that_attends_is_given_what_a_layer_keeps_and_nothing_else(tiny_llama, kv_cache):
    """No 16-bit model started on a GPU: its kernel got scales that were None, and took those of 8 bits for missing."""
    given = []
    step = DecodeStep(
        pool_of(tiny_llama, kv_cache), [0], torch.tensor([[1]]), lambda *arguments: given.extend(arguments)
    )
    step.attend(1, *torch.randn(3, 1, 4, 1, 16), Scoring(scale=1))
    assert [id(each) for each in given[10:]] == [id(kept) for kept in step.pool.layers[1]]


@FORMATS
def test_numbers_that_are_none_are_noticed_in_their_block(tiny_llama, kv_cache):
    pool = pool_of(tiny_llama, kv_cache)
    kv_heads, head_dim = pool.layers[1][0].shape[2:]
    broken = torch.full((1, kv_heads, 1, head_dim), torch.nan)
    pool.write(1, broken, broken, torch.tensor([2 * BLOCK_SIZE]))
    assert (pool.are_finite([1, 3]), pool.are_finite([1, 2])) == (True, False)
    pool.zero([2])
    assert pool.are_finite([1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_the_largest_number_is_one_and_an_infinite_one_is_none(tiny_llama, dtype):
    pool = pool_of(copy.deepcopy(tiny_llama).to(dtype), "none")
    assert type(pool) is CpuPool
    kv_heads, head_dim = pool.layers[1][1].shape[1], pool.layers[1][1].shape[3]
    for number, is_finite in (
        (torch.finfo(dtype).max, True),
        (torch.inf, False),
        (-torch.inf, False),
        (torch.nan, False),
    ):
        states = torch.zeros(1, kv_heads, 1, head_dim, dtype=dtype)
        states[0, -1, 0, 3] = number
        pool.write(1, states, -states, torch.tensor([2 * BLOCK_SIZE + 5]))
        assert (pool.are_finite([1, 2]), pool.are_finite([1]), pool.are_finite([])) == (is_finite, True, True)


def sharp_llama():
    """Attends to few tokens at a time, so that a little more or less of a score makes much of a difference."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 97, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15},
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def test_products_that_are_rounded_otherwise_in_company_are_no_fault_of_attention():
    """A GPU's are, and in 8 bits other codes came of it: a model that attends as Llama 2 does was refused."""
    model = sharp_llama()
    for layer in model.model.modules():
        if type(layer) is torch.nn.Linear:
            layer.register_forward_hook(lambda _, __, y: (y * (1 + (torch.rand(y.shape) - 0.5) / 128)).to(y.dtype))
    with running(model, make_pool=partial(make_pool, "fp8")) as engine:
        assert len(answer(engine, [1, 2, 3])[0]) == GREEDY.max_new_tokens


@FORMATS
def test_keys_of_the_token_before_are_a_fault_in_8_bits_too(monkeypatch, kv_cache):
    write = EightBitPool.write
    monkeypatch.setattr(
        EightBitPool, "write", lambda self, layer, key, *rest: write(self, layer, key.roll(1, 2), *rest)
    )
    with (
        pytest.raises(ModelUnavailable, match="does not attend to its past"),
        running(sharp_llama(), make_pool=partial(make_pool, kv_cache)),
    ):
        pass


@FORMATS
def test_one_text_for_each_prompt_cold_cached_in_company_and_in_other_chunks(tiny_llama, kv_cache):
    found = [set() for _ in PROMPTS]
    for longest_chunk in (64, 256):
        options = {"make_pool": partial(make_pool, kv_cache), "longest_chunk": longest_chunk}
        with running(tiny_llama, **options) as engine:
            assert engine.runner.kv_format == kv_cache
            for texts, prompt in zip(found, PROMPTS, strict=True):
                texts.add(tuple(answer(engine, prompt)[0]))
            again, request = answer(engine, PROMPTS[0])
            found[0].add(tuple(again))
            assert request.cached_tokens == len(PROMPTS[0]) // BLOCK_SIZE * BLOCK_SIZE
            with engine.paused():
                started = [start(engine, prompt) for prompt in PROMPTS]
            for texts, (_, streamer) in zip(found, started, strict=True):
                texts.add(tuple(streamer.rest()))
    assert [len(texts) for texts in found] == [1] * len(PROMPTS)


@FORMATS
def test_a_model_with_windows_and_soft_caps_answers_as_with_exact_keys(kv_cache):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 24, "max_position_embeddings": 1024}
    model = Gemma2ForCausalLM(Gemma2Config(**shape, **heads)).eval().requires_grad_(False)
    # It starts: the engine compares what it computes over the pool with the model alone.
    with running(model, make_pool=partial(make_pool, kv_cache)) as engine:
        assert len(answer(engine, PROMPTS[0])[0]) == GREEDY.max_new_tokens


def test_the_two_kinds_of_pool_are_told_apart(tiny_llama):
    kinds = [pool_of(tiny_llama, kv_cache) for kv_cache in ("none", "int8")]
    assert [type(pool) for pool in kinds] == [CpuPool, EightBitPool]
    assert [pool.is_exact for pool in kinds] == [True, False]
