"""What one request may ask of its own sampling: biases, and what ends its answer. Its neighbours notice nothing."""

from dataclasses import replace

import pytest
import torch

from llama2_chat.errors import UnknownToken
from llama2_chat.types import SamplingParams
from tests.support.engines import GREEDY, SEEDED, Stairs, answer, running, start

PROMPT = [5, 9, 2, 7, 7, 30, 41]


@pytest.fixture
def engine(tiny_llama):
    with running(tiny_llama, tokens=4000) as engine:
        yield engine


@pytest.fixture(scope="module")
def freely(tiny_llama):
    """The ids of a greedy answer to PROMPT which nothing ends but its limit."""
    with running(tiny_llama, tokens=4000) as engine:
        return answer(engine, PROMPT)[0]


def generated(model, **options):
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([PROMPT]), do_sample=False, max_new_tokens=GREEDY.max_new_tokens, pad_token_id=0, **options
        )
    return whole[0, len(PROMPT) :].tolist()


def test_a_bias_changes_the_answer_as_generates_does(engine, tiny_llama, freely):
    bias = {freely[0]: -100, freely[1]: -0.5, 11: 0.75}
    expected = generated(tiny_llama, sequence_bias=[[[id], float(value)] for id, value in bias.items()])
    found = answer(engine, PROMPT, replace(GREEDY, logit_bias=bias))[0]
    assert found == expected != freely
    assert freely[0] not in found


def test_a_bias_of_100_takes_one_token_alone(engine):
    assert answer(engine, PROMPT, replace(SEEDED, max_new_tokens=5, logit_bias={13: 100}))[0] == [13] * 5


def test_who_shares_a_step_with_a_bias_gets_what_he_gets_alone(engine):
    alone = answer(engine, PROMPT, SEEDED)[0]
    odd = replace(SEEDED, logit_bias={3: 5}, min_tokens=3, stop_token_ids=(8,))
    with engine.paused():
        streamers = [start(engine, PROMPT, params)[1] for params in (odd, SEEDED, odd)]
    answers = [streamer.rest() for streamer in streamers]
    assert answers[1] == alone
    assert answers[0] == answers[2] == answer(engine, PROMPT, odd)[0]


def test_an_answer_ends_before_the_tokens_it_was_told_and_not_the_next_one(engine, freely):
    found, request = answer(engine, PROMPT, replace(GREEDY, stop_token_ids=[freely[4]]))
    assert (found, request.finish_reason) == (freely[: freely.index(freely[4])], "stop")
    assert answer(engine, PROMPT)[0] == freely


def test_who_ignores_the_models_end_goes_on_to_the_limit(tiny_llama, freely):
    with running(tiny_llama, tokens=4000, stop_ids={freely[3]}) as engine:
        assert len(answer(engine, PROMPT)[0]) <= 3
        assert answer(engine, PROMPT, replace(GREEDY, ignore_eos=True))[0] == freely
        told = replace(GREEDY, ignore_eos=True, stop_token_ids=(freely[5],))
        assert answer(engine, PROMPT, told)[0] == freely[: freely.index(freely[5])]


@pytest.mark.parametrize("least", [1, 4])
def test_nothing_ends_an_answer_before_min_tokens(tiny_llama, freely, least):
    end = freely[0]
    with running(tiny_llama, tokens=4000, stop_ids={end}) as engine:
        assert answer(engine, PROMPT)[0] == []
        found = answer(engine, PROMPT, replace(GREEDY, min_tokens=least))[0]
    expected = generated(tiny_llama, min_new_tokens=least, eos_token_id=end)
    assert found == (expected[: expected.index(end)] if end in expected else expected)
    assert end not in found[:least]
    assert len(found) >= least


class OnlyTheEnd(Stairs):
    """Allows one id, which ends the answer."""

    def allow(self, mask):
        mask[0] = 1 << 6


def test_a_grammar_ends_an_answer_whatever_min_tokens_says(tiny_llama):
    many = replace(GREEDY, min_tokens=10)
    with running(tiny_llama, tokens=4000, stop_ids={6}) as engine:
        request, streamer = start(engine, PROMPT, many, Stairs(50, steps=3))
        assert (len(streamer.rest()), request.finish_reason) == (3, "stop")
        request, streamer = start(engine, PROMPT, many, OnlyTheEnd(50))
        assert (streamer.rest(), request.finish_reason) == ([], "stop")


@pytest.mark.parametrize("named", [{"stop_token_ids": (97,)}, {"logit_bias": {500: 1}}], ids=["end", "bias"])
def test_a_token_that_the_model_does_not_have_is_refused_by_the_settings_name(engine, named):
    (name,) = named
    with pytest.raises(UnknownToken, match=f"{name} may name tokens from 0 to 96") as caught:
        engine.submit(PROMPT, SamplingParams(**named), None)
    assert caught.value.setting == name
