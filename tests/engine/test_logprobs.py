"""How likely the model found each token, of its own distribution, whatever settings make of it."""

from dataclasses import replace

import pytest
import torch

from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.errors import ChatError
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


def expected(model, prompt, ids):
    """Log probabilities [T, V] of each token after a prompt, computed by the model alone."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def check(model, request, ids, count):
    compare(request.logprobs, ids, expected(model, PROMPT, ids), count)


def compare(likelihoods, ids, logprobs, count):
    assert len(likelihoods) == len(ids)
    for (logprob, top), id, wanted in zip(likelihoods, ids, logprobs, strict=True):
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


def test_who_waits_for_memory_in_between_is_told_of_each_token_once_and_of_the_prompt(tiny_llama):
    asked = SamplingParams(temperature=1, seed=5, logprobs=3, prompt_logprobs=True, max_new_tokens=BLOCK_SIZE + 8)
    prompts = [[n, n + 1, n + 2] * 20 for n in range(3)]
    with running(tiny_llama, tokens=8 * BLOCK_SIZE) as engine:  # two and a bit of them
        with engine.paused():
            started = [start(engine, prompt, asked) for prompt in prompts]
        answers = [streamer.rest() for _, streamer in started]
        assert engine.occupancy.preemptions
    for (request, _), prompt, ids in zip(started, prompts, answers, strict=True):
        compare(request.logprobs, ids, expected(tiny_llama, prompt, ids), 3)
        check_prompt(tiny_llama, request)


# ---- Of a prompt ----

LONG_PROMPT = [(7 * n * n + 3) % 97 for n in range(130)]
TOLD = replace(GREEDY, logprobs=3, prompt_logprobs=True, max_new_tokens=3)


def check_prompt(model, request):
    prompt = request.ids[: request.prompt_tokens]
    compare(request.prompt_logprobs, prompt[1:], expected(model, prompt[:1], prompt[1:]), 3)


def test_a_prompt_is_told_whatever_of_it_is_cached_and_in_any_chunks(tiny_llama):
    with running(tiny_llama, tokens=4000, longest_chunk=50) as engine:
        plain = replace(GREEDY, max_new_tokens=3)
        alone = answer(engine, LONG_PROMPT, plain)[0]
        with engine.paused():
            prompts = [LONG_PROMPT, [5, 7, 9], LONG_PROMPT[:70], LONG_PROMPT]
            started = [
                start(engine, prompt, params) for prompt, params in zip(prompts, [TOLD, plain, TOLD, TOLD], strict=True)
            ]
        answers = [streamer.rest() for _, streamer in started]
        requests = [request for request, _ in started]
        assert answers[0] == answers[3] == alone
        assert [request.cached_tokens for request in requests[2:]] == [0, 0]
        assert requests[1].prompt_logprobs == []
        for request in (requests[0], *requests[2:]):
            check_prompt(tiny_llama, request)
            assert len(request.logprobs) == 3


def test_a_prompt_of_one_token_has_nothing_before_it(engine):
    assert answer(engine, [5], TOLD)[1].prompt_logprobs == []


def test_where_steps_are_recorded_to_be_the_same_every_time_a_prompt_cannot_be_told(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "piece_size", 64)
    with pytest.raises(ChatError, match="DETERMINISTIC=1"):
        engine.submit(PROMPT, TOLD, None)
