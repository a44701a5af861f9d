"""Several adapters over one model at once: each request gets what its own says alone, whoever shares the step."""

import copy
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llama2_chat.engine.adapters import add_adapters
from llama2_chat.engine.cpu_llama import CpuLlamaLayer
from llama2_chat.engine.engine import Engine
from llama2_chat.engine.model_runner import build_runner
from llama2_chat.engine.prefix_cache import PrefixCache
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.lora import LoraWeights
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.load import load
from llama2_chat.loading.quantize import nf4_config
from llama2_chat.types import SamplingParams
from tests.support.adapters import FOUR, in_settings, save_four
from tests.support.engines import CPU, Ids
from tests.support.loading import asking_for
from tests.support.serving import ignore
from tests.support.small_model import save_model

PARAMS = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=64)
EVERYONE = [0, 1, 2, 3, 4, 0, 2, 1]  # whom eight requests of one batch ask: 0 is the model itself
PROMPT = [5, 9, 2, 60, 33, 7, 7, 1, 48, 20]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), initializer_range=0.2, num_key_value_heads=2)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    return save_four(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def loaded(base, folders):
    """What a start has in memory, by precision."""

    def get(precision):
        checkpoint = fetch(choose(asking_for(base, adapters=in_settings(folders))), ignore)
        return load(replace(checkpoint, quantization=precision), ignore)

    return get


@contextmanager
def serving(loaded):
    runner = build_runner(loaded.model, lambda: {CPU: 2**40}, context_length=512, adapters=loaded.adapters)
    engine = Engine(runner, set())
    try:
        yield engine
    finally:
        engine.close()


def start(engine, adapter, ids=PROMPT, params=PARAMS):
    streamer = Ids()
    return engine.submit(ids, params, streamer, adapter=adapter), streamer


def answer(engine, adapter, ids=PROMPT):
    return start(engine, adapter, ids)[1].rest()


def expected(base, folders, adapter, answer):
    """What PEFT, unmerged, finds likeliest after the prompt, and after each token of this answer but the last."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, folders[[*FOUR][adapter - 1]])
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([PROMPT + answer[:-1]])).logits[0]
    return logits[len(PROMPT) - 1 :].argmax(-1).tolist()


def test_four_adapters_and_their_base_say_in_one_batch_what_each_says_alone_and_in_peft(base, folders, loaded):
    with serving(loaded("float32")) as engine:
        alone = [answer(engine, adapter) for adapter in range(5)]
        with engine.paused():
            started = [start(engine, adapter) for adapter in EVERYONE]
        together = [streamer.rest() for _, streamer in started]
    assert together == [alone[adapter] for adapter in EVERYONE]
    assert len(set(map(tuple, alone))) == 5
    assert alone == [expected(base, folders, adapter, ids) for adapter, ids in enumerate(alone)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_logits_of_an_adapter_are_the_same_bit_for_bit_in_any_company_and_any_chunks(loaded, precision):
    model = loaded(precision)

    def heard(engine, company):
        """Logits of four tokens of each adapter."""
        found, sample = defaultdict(list), engine.runner.sample

        def listen(step, masks):
            for request, logits in zip(step.requests, step.logits, strict=True):
                found[request].append(logits.clone())
            return sample(step, masks)

        engine.runner.sample = listen
        with engine.paused():
            others = [start(engine, adapter, [adapter, *range(length)]) for adapter, length in company]
            asked = [start(engine, adapter, [3] * 70, replace(PARAMS, max_new_tokens=4)) for adapter in (1, 2)]
        for _, streamer in [*asked, *others]:
            streamer.rest()
        engine.runner.sample = sample
        return [torch.stack(found[request]) for request, _ in asked]

    with serving(model) as engine:
        alone = heard(engine, [])
        cached = heard(engine, [(3, 40), (0, 7), (1, 64), (4, 1)])
    with serving(loaded(precision)) as engine:
        cold = heard(engine, [(0, 30), (2, 9), (2, 10)])
    assert (type(model.model.model.layers[0]) is CpuLlamaLayer) == (precision == "int8")
    for expected, *others in zip(alone, cached, cold, strict=True):
        assert all(torch.equal(other, expected) for other in others)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_an_adapter_beside_quantised_weights_changes_what_they_say_as_peft_does(base, folders, loaded, precision):
    def told(adapter):
        """Logprobs of the 20 likeliest next tokens."""
        request, streamer = start(engine, adapter, params=replace(PARAMS, max_new_tokens=1, logprobs=20))
        streamer.rest()
        return dict(request.logprobs[0].top)

    def error(told):
        return (torch.tensor([*told.values()]) - expected[[*told]]).norm()

    options = {"quantization_config": nf4_config(torch.bfloat16), "device_map": {"": "cpu"}}
    plain = AutoModelForCausalLM.from_pretrained(base, **(options if precision == "nf4" else {"dtype": torch.float32}))
    adapted = peft.PeftModel.from_pretrained(plain, folders["all"]).eval()
    with torch.inference_mode():
        expected = adapted(torch.tensor([PROMPT])).logits[0, -1].float().log_softmax(-1)
    with serving(loaded(precision)) as engine:
        assert error(told(2)) < 0.1 * error(told(0))


def test_keys_and_values_that_one_adapter_computed_are_found_by_no_other(loaded):
    prompt, params = PROMPT * 13, replace(PARAMS, max_new_tokens=8)  # two blocks
    with serving(loaded("float32")) as engine:
        text = start(engine, 1, prompt, params)[1].rest()
        for adapter, cached in ((2, 0), (0, 0), (1, 128)):
            again, streamer = start(engine, adapter, prompt, params)
            assert (streamer.rest() == text) == (adapter == 1)
            assert again.cached_tokens == cached


def test_each_adapter_has_a_tree_of_its_own_in_the_prefix_cache():
    cache = PrefixCache(num_blocks=4, block_size=2)
    table = cache.match([1, 2, 3], adapter=1).table
    table.own.append(cache.allocate())
    cache.release(table, [1, 2])
    assert [len(cache.match([1, 2, 3], adapter=adapter).table) for adapter in (0, 1, 2)] == [0, 1, 0]
    assert cache.match([1, 4], adapter=2).nearest is None  # nor is a part of a block copied
    assert cache.available == 2


class EverySecond(torch.nn.Module):
    """An expert of a mixture, who sees some tokens only."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        y = torch.zeros_like(x)
        y[:, ::2] = self.mlp(x[:, ::2])
        return y


def test_an_adapter_of_a_layer_that_sees_only_some_tokens_is_refused(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    model.model.layers[1].mlp = EverySecond(model.model.layers[1].mlp)
    adapter = LoraWeights("poems", {"model.layers.1.mlp.mlp.up_proj": (torch.randn(2, 32), torch.randn(64, 2))})
    with pytest.raises(ModelUnavailable, match="as experts of a mixture do"):
        add_adapters(model, [adapter])
