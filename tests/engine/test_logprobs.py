"""How likely the model found each token, of its own distribution, whatever settings make of it."""

from dataclasses import replace

import pytest
import torch

from llama2_chat.types import SamplingParams
from tests.support.engines import GREEDY, SEEDED, Stairs, answer, running, start

PROMPT = [5, 9, 2, 7, 7, 30, 41]
CHANGED = {
    "seed": replace(SEEDED, max_new_tokens=12),
    "penalties": SamplingParams(temperature=0, repetition_penalty=2, frequency_penalty=1, max_new_tokens=12),
    "biases": replace(GREEDY, logit_bias={3: -100, 8: 4}),
    "wide": SamplingParams(seed=3, top_k=0, temperature=2, max_new_tokens=12),
}


@pytest.fixture
def engine(tiny_llama):
    with running(tiny_llama, tokens=4000) as engine:
        yield engine


def expected(model, ids):
    """Log probabilities [T, V] of each token of an answer, computed by the model alone."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
    return logits.float().log_softmax(-1)


def check(model, request, ids, count):
    assert len(request.logprobs) == len(ids)
    for (logprob, top), id, wanted in zip(request.logprobs, ids, expected(model, ids), strict=True):
        assert logprob == pytest.approx(wanted[id].item(), abs=1e-4)
        assert [id for id, _ in top] == wanted.topk(count).indices.tolist()
        assert [value for _, value in top] == pytest.approx(wanted.topk(count).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("params", CHANGED.values(), ids=CHANGED)
def test_they_are_the_models_own_whatever_changes_what_is_chosen_and_change_nothing(engine, tiny_llama, params):
    ids, request = answer(engine, PROMPT, replace(params, logprobs=5))
    check(tiny_llama, request, ids, 5)
    assert ids == answer(engine, PROMPT, params)[0]


def test_a_grammar_does_not_change_them(engine, tiny_llama):
    request, streamer = start(engine, PROMPT, replace(GREEDY, logprobs=2), Stairs(50))
    check(tiny_llama, request, streamer.rest(), 2)


def test_each_in_a_batch_gets_as_many_as_asked_and_who_does_not_ask_none(engine, tiny_llama):
    counts = [0, None, 20, 3]
    with engine.paused():
        started = [start(engine, PROMPT, replace(SEEDED, seed=n, logprobs=n_top)) for n, n_top in enumerate(counts)]
    for (request, streamer), count in zip(started, counts, strict=True):
        ids = streamer.rest()
        if count is None:
            assert request.logprobs == []
        else:
            check(tiny_llama, request, ids, count)


def test_who_waits_for_memory_in_between_has_one_for_each_token_all_the_same(tiny_llama):
    asked = SamplingParams(temperature=0, logprobs=1, max_new_tokens=60)
    with running(tiny_llama, tokens=160, context_length=96) as engine:
        with engine.paused():
            started = [start(engine, PROMPT, replace(asked, cache_prompt=False)) for _ in range(3)]
        for request, streamer in started:
            ids = streamer.rest()
            check(tiny_llama, request, ids, 1)
        assert engine.occupancy.preemptions
