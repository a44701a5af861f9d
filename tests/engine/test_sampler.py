"""What the sampler promises: tokens with the probabilities that generate uses, whoever else is in the batch."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama2_chat.engine.sampler import NARROW, NEUTRAL, SamplerState, draws, is_narrow
from llama2_chat.kernels.cpu_sampling import sample_narrow
from llama2_chat.types import RANGES, SamplingParams

CPU = torch.device("cpu")


def state_of(logits, params, prompt=(), kernel=None):
    """A slot for each of logits [N, V], all with the same settings."""
    state = SamplerState(len(logits), logits.shape[1], 4096, CPU, kernel)
    for slot in range(len(logits)):
        state.join(slot, [*prompt], 0, params, draws(params, params.max_new_tokens))
    return state


def sampled(logits, params, prompt=(), times=4000, kernel=None):
    """How often each token is drawn as the first of an answer, as a share."""
    params = SamplingParams(**params, seed=1, max_new_tokens=times)
    state = SamplerState(times, len(logits), 1, CPU, kernel)
    numbers = draws(params, params.max_new_tokens)
    for slot in range(times):
        state.join(slot, [*prompt], 0, params, numbers[slot : slot + 1])
    kept = NARROW if is_narrow(params) else len(logits)
    tokens = state.sample(logits.expand(times, -1), torch.arange(times), kept)
    return tokens.bincount(minlength=len(logits)) / times


@pytest.mark.parametrize("kernel", [None, sample_narrow], ids=["PyTorch", "compiled"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1},
        {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 2, "top_k": 0, "top_p": 0.7, "repetition_penalty": 0.7},
        {"temperature": 0.8, "top_k": 1000, "top_p": 0.95, "repetition_penalty": 2},
        {"temperature": 1.2, "top_k": 64, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_that_generate_uses(params, kernel):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    prompt = [1, 5, 7]
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(params["repetition_penalty"]))])
    warpers.append(TemperatureLogitsWarper(float(params["temperature"])))
    if params["top_k"]:
        warpers.append(TopKLogitsWarper(params["top_k"]))
    warpers.append(TopPLogitsWarper(params["top_p"]))
    warpers.append(MinPLogitsWarper(params.get("min_p", 0)))
    expected = warpers(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)
    found = sampled(logits, params, prompt, kernel=kernel)
    assert not found[expected == 0].any()
    assert torch.allclose(found, expected, atol=0.03)


@pytest.mark.parametrize("kernel", [None, sample_narrow], ids=["PyTorch", "compiled"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1e-6},
        {"temperature": 5e-324},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_p": 5e-324},
        {"min_p": 1},
    ],
    ids=str,
)
def test_the_likeliest_token_is_taken_when_nothing_else_is_left(params, kernel):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3)) * 9
    assert sampled(logits, params, times=50, kernel=kernel)[logits.argmax()] == 1


def test_no_setting_is_forgotten():
    assert NEUTRAL.keys() | {"max_new_tokens", "min_tokens", "seed", "logprobs"} == RANGES.keys()


def test_presence_and_frequency_penalties_count_the_answer_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1, temperature=0, top_k=0)
    logits = torch.tensor([[1.0, 0.6, 0.0, 0.8]])
    state = state_of(logits, params, prompt=[3, 3])
    assert [state.sample(logits, torch.tensor([0]), 4).item() for _ in range(4)] == [0, 3, 1, 0]


def test_slots_with_other_settings_draw_what_they_draw_alone():
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(3)) * 3
    settings = [
        SamplingParams(seed=1, temperature=1, top_k=0, top_p=0.9),
        SamplingParams(temperature=0, frequency_penalty=1),
        SamplingParams(seed=2, temperature=2, top_k=100, presence_penalty=2),
    ]
    together = SamplerState(4, 200, 4096, CPU)
    alone = [state_of(logits[:1], params, prompt=[5]) for params in settings]
    for slot, params in enumerate(settings):
        together.join(slot, [5], 0, params, draws(params, params.max_new_tokens))
    for _ in range(50):
        expected = [one.sample(logits[slot][None], torch.tensor([0]), 200).item() for slot, one in enumerate(alone)]
        assert together.sample(logits, torch.tensor([0, 1, 2]), 200).tolist() == expected


SETTINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1, frequency_penalty=1),
    SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
    SamplingParams(temperature=2, top_k=NARROW, top_p=1, repetition_penalty=0.7, presence_penalty=1.5),
    SamplingParams(temperature=1, top_k=3, top_p=1, min_p=0.2, repetition_penalty=1),
]


@pytest.mark.parametrize("vocabulary", [5, 97, 32000])
def test_what_is_compiled_chooses_and_remembers_what_pytorch_does(vocabulary):
    plain, compiled = (SamplerState(len(SETTINGS), vocabulary, 64, CPU, kernel) for kernel in (None, sample_narrow))
    for slot, params in enumerate(SETTINGS):
        params = replace(params, seed=slot, max_new_tokens=64)
        for state in (plain, compiled):
            state.join(slot, [1, 2, 3], 1, params, draws(params, 64))
    slots = torch.tensor([3, 0, 4, 1, 2])
    for step in range(40):
        logits = torch.randn(len(slots), vocabulary + step % 2, generator=torch.Generator().manual_seed(step)) * 4
        logits[:, 4:2000] = -torch.inf  # as a grammar leaves few
        assert compiled.sample(logits, slots, NARROW).tolist() == plain.sample(logits, slots, NARROW).tolist()
    assert all(mine.equal(other) for mine, other in zip(compiled.tensors, plain.tensors, strict=True))


@pytest.mark.parametrize("params", SETTINGS, ids=range(len(SETTINGS)))
def test_what_is_compiled_says_where_logits_are_not_finite_and_takes_nothing_that_is_ruled_out(params):
    none = torch.full((300,), -torch.inf)
    one, nan, infinite = none.clone(), torch.zeros(300), torch.zeros(300)
    one[299], nan[7], infinite[8] = -3e38, -torch.nan, torch.inf
    logits = torch.stack([none, one, nan, infinite, torch.zeros(300)])
    chosen = state_of(logits, params, kernel=sample_narrow).sample(logits, torch.arange(5), NARROW).tolist()
    assert chosen[:4] == [-1, 299, -1, -1]
    assert 0 <= chosen[4] < NARROW  # of equal ones those with the lower ids


def test_logits_of_fewer_tokens_than_the_vocabulary_has_are_refused():
    state = state_of(torch.zeros(1, 300), SETTINGS[0], kernel=sample_narrow)
    with pytest.raises(ValueError, match="300 tokens"):
        state.sample(torch.zeros(1, 299), torch.tensor([0]), NARROW)
