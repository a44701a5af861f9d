"""On a CPU an answer depends on its prompt, its settings and its seed alone: not on chunks, the KV cache or company."""

import random
from collections import defaultdict
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

from llama2_chat.engine.cpu_llama import (
    CpuLlamaLayer,
    CpuLlamaModel,
    CpuRotaryEmbedding,
    speed_up_head,
    speed_up_llama,
)
from llama2_chat.engine.engine import Engine
from llama2_chat.engine.kv_pool import make_pool
from llama2_chat.engine.model_runner import build_runner
from llama2_chat.engine.paged_attention import attention_windows
from llama2_chat.kernels import compiled, fixed_rows
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.kernels.fixed_rows import block_rows
from llama2_chat.kernels.int8 import PANEL, Int8Linear
from llama2_chat.loading.quantize import quantize_int8
from llama2_chat.types import SamplingParams
from tests.support.engines import CPU, GREEDY, answer, start

VOCABULARY = 97
FEW = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=3)


def random_llama(vocabulary=VOCABULARY):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def in_int8(vocabulary=VOCABULARY):
    model = random_llama(vocabulary).bfloat16()
    quantize_int8(model)
    assert isinstance(model.model.layers[0].mlp.down_proj, Int8Linear)
    return model


def random_gpt2():
    """Convolutions for linear layers, GELU, LayerNorm."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=2048, n_embd=96, n_layer=2, n_head=3, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


MODELS = {
    "float32": random_llama,
    "bfloat16": lambda: random_llama().bfloat16(),
    "int8": in_int8,
    "gpt2": random_gpt2,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@contextmanager
def running(model, **options):
    """With memory for as many tokens as eight prompts of 1,600 have."""
    options = {"make_pool": partial(make_pool, "none"), "context_length": 1600} | options
    engine = Engine(build_runner(model, lambda: {CPU: 2**40}, **options), set())
    try:
        yield engine
    finally:
        engine.close()


class Listening:
    """The logits of each token of each request, as the sampler gets them."""

    def __init__(self, engine):
        self.heard, self._sample = defaultdict(list), engine.runner.sample
        engine.runner.sample = self

    def __call__(self, step, masks):
        for request, logits in zip(step.requests, step.logits, strict=True):
            self.heard[request].append(logits.clone())
        return self._sample(step, masks)


def prompt_of(length, seed):
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def heard(engine, ids, company=()):
    """Logits [3, V] of three tokens after ids, while others are answered that came before and after."""
    listening = Listening(engine)
    before, after = company[::2], company[1::2]
    with engine.paused():
        others = [start(engine, other, GREEDY) for other in before]
        request, streamer = start(engine, ids, FEW)
        others += [start(engine, other, GREEDY) for other in after]
    for each in [streamer, *(streamer for _, streamer in others)]:
        each.rest()
    engine.runner.sample = listening._sample
    return torch.stack(listening.heard[request])


@pytest.fixture(scope="module")
def alone(model):
    """Logits after a prompt that is read whole, by an engine which nobody else asks."""

    def logits(ids):
        with running(model) as engine:
            return heard(engine, ids)

    return logits


@examples(max_examples=6)
@given(data=st.data())
def test_logits_are_the_same_bit_for_bit_in_any_chunks_with_any_part_cached_and_in_any_company(model, alone, data):
    ids = prompt_of(data.draw(st.sampled_from([1, 2, 9, 63, 64, 65, 130, 383, 384, 385, 512, 513, 769])), seed=1)
    expected = alone(ids)
    lengths = data.draw(st.lists(st.integers(1, 600), max_size=7))
    company = [prompt_of(length, seed) for seed, length in enumerate(lengths, 2)]
    cached = ids[: data.draw(st.integers(0, len(ids)))]
    with running(model, longest_chunk=data.draw(st.sampled_from([7, 64, 100, 256]))) as engine:
        if cached:
            answer(engine, cached)
        for found in (heard(engine, ids, company), heard(engine, ids)):
            assert torch.equal(found, expected)


def test_what_was_answered_is_read_again_with_the_same_logits(model, alone):
    # The next turn finds keys that were computed a token at a time, in company; a fresh server reads them in one go.
    ids = prompt_of(50, seed=1)
    with running(model) as engine:
        others = [start(engine, prompt_of(40, seed), GREEDY)[1] for seed in (2, 3)]
        found, _ = answer(engine, ids, SamplingParams(temperature=0, max_new_tokens=100))
        for other in others:
            other.rest()
        turn = [*ids, *found, *prompt_of(20, seed=4)]
        logits = heard(engine, turn)
    assert torch.equal(logits, alone(turn))


def test_a_layer_computes_each_row_as_alone_on_any_number_of_threads(model):
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Int8Linear))]
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for layer in layers[:7]:
                x = torch.randn(300, layer.in_features).to(model.dtype)
                assert torch.equal(torch.cat([layer(row[None]) for row in x[250:]]), layer(x)[250:])
    finally:
        torch.set_num_threads(threads)


def test_a_llama_in_8_bits_computes_what_the_layers_of_transformers_compute():
    model, ids = in_int8(), torch.tensor([prompt_of(30, seed=1)])
    with torch.inference_mode():
        expected = model(ids).logits.float()
        attention_windows(model)
        speed_up_llama(model)
        assert {type(layer) for layer in model.model.layers} == {CpuLlamaLayer}
        found = model(ids).logits.float()
        half = model(ids[:, :15])
        assert (found[:, :15] - half.logits).norm() < 0.01 * found.norm()
        rest = model(ids[:, 15:], past_key_values=half.past_key_values).logits
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert (found[:, 15:] - rest).norm() < 0.03 * found.norm()


@pytest.mark.skipif(not compiled.panels_are_fast(), reason="not on this processor")
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 128], ids=["without its output head", "with it"])
def test_a_model_in_one_call_gives_the_same_bits_as_one_layer_after_another_and_tells_who_listens(
    monkeypatch, vocabulary
):
    ids, told = prompt_of(150, seed=1), defaultdict(list)

    def logits(model):
        def listen(_module, _arguments, output):
            states = output if isinstance(output, torch.Tensor) else output.last_hidden_state
            told[type(model.model)].append(states.clone())

        with running(model, longest_chunk=100) as engine:
            hooks = [each.register_forward_hook(listen) for each in (model.model.layers[0], model.model)]
            listened_to = heard(engine, ids, [prompt_of(40, seed=2), prompt_of(3, seed=3)])
            for hook in hooks:
                hook.remove()
        with running(model, longest_chunk=100) as engine:
            assert torch.equal(heard(engine, ids), listened_to)
        return listened_to

    model = in_int8(vocabulary)
    in_one = logits(model)
    assert model.model.whole.has_output == (vocabulary % PANEL == 0)
    monkeypatch.setattr(compiled, "panels_are_fast", lambda: False)
    assert torch.equal(logits(in_int8(vocabulary)), in_one)
    assert set(told) == {CpuLlamaModel, LlamaModel}
    assert all(map(torch.equal, told[CpuLlamaModel], told[LlamaModel]))


@pytest.mark.parametrize("alike", [True, False])
def test_a_processor_that_rounds_blocks_of_other_sizes_otherwise_gets_blocks_of_one_size(monkeypatch, alike):
    monkeypatch.setattr(fixed_rows, "rows_are_alike", lambda *_: alike)
    sizes = [block_rows(queries, 64, 32, softcap=None) for queries in (1, 3, 8, 9, 300)]
    assert sizes == ([1, 3, 8, 32, 32] if alike else [8] * 5)


SUBJECTS = ("llamas", "the sea", "bread", "Japan", "winter", "a bridge", "chess", "the moon", "rivers", "a violin")
ASKED = [f"{ask} {subject}." for subject in SUBJECTS for ask in ("Tell me about", "Write one long sentence about")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("setting", [{"temperature": 0}, {"seed": 11}], ids=["greedy", "seed"])
def test_each_question_has_one_answer_cold_cached_and_in_a_batch_that_comes_and_goes(chat, setting):
    """A visitor who asked again got another text for 7 of 8 questions with a seed, and for 3 of 8 at temperature 0."""
    tokenizer, runner = chat.serving.tokenizer, chat.serving.engine.runner
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in ASKED
    ]
    lengths = [4 + 2 * (index % 4) for index in range(len(prompts))]  # so that they leave one after another
    params = [SamplingParams(**setting, max_new_tokens=length) for length in lengths]
    answers = defaultdict(set)
    for _ in range(3):
        with running(runner._model) as engine:
            for _ in ("cold", "cached"):
                for index, ids in enumerate(prompts):
                    answers[index].add(tuple(answer(engine, ids, params[index])[0]))
        with running(runner._model) as engine:
            streamers = [start(engine, ids, each)[1] for ids, each in zip(prompts, params, strict=True)]
            for index, streamer in enumerate(streamers):
                answers[index].add(tuple(streamer.rest()))
    assert [len(found) for found in answers.values()] == [1] * len(prompts)


# ---- What is computed between a Llama's products ----


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_positions_are_turned_by_the_same_bits_whichever_were_asked_for_before(rope):
    kinds = {"default": {}, "dynamic": {"factor": 2.0}}
    parameters = {"rope_type": rope, "rope_theta": 10_000.0} | kinds[rope]
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    plain, fast = LlamaRotaryEmbedding(config), LlamaRotaryEmbedding(config)
    fast.__class__ = CpuRotaryEmbedding
    for places in ([5], [0, 1, 2], [700, 3], [*range(90, 200)], [2047]):
        at = torch.tensor([places])
        for found, wanted in zip(fast(torch.empty(1), at), plain(torch.empty(1), at), strict=True):
            assert found.tolist() == wanted[0].tolist()


def test_a_heads_norms_on_a_cpu_are_those_of_other_devices():
    torch.manual_seed(0)
    model = random_llama()
    config = LlamaConfig.from_dict(model.config.to_dict() | {"output_norm": True, "feature_layers": [1]})
    head = EagleHead(config, input_norm=True).eval().requires_grad_(False)
    head.norm.weight.copy_(torch.rand(192))
    states, features = torch.randn(2, 1, 5, 192)
    wanted = head.norm(states), head.fused([states], features)
    speed_up_head(head)
    found = head.norm(states), head.fused([states], features)
    assert type(head) is not EagleHead
    torch.testing.assert_close(found, wanted)
