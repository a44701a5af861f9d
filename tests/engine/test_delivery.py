"""What reaches the readers of the engine: tokens, only those that a constraint allows, and an end."""

import itertools
from dataclasses import replace

import pytest

from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.types import SamplingParams
from tests.support.engines import GREEDY, SEEDED, Stairs, answer, running, start


def test_logits_that_are_not_numbers_are_an_error_not_a_token(endless, tiny_llama, caplog):
    hook = tiny_llama.lm_head.register_forward_hook(lambda *args: args[-1] * float("nan"))
    try:
        found, request = answer(endless, [1, 2, 3], SEEDED)
    finally:
        hook.remove()
    assert (found, request.finish_reason) == ([], "error")
    assert "not finite" in caplog.text


def test_a_reader_that_fails_does_not_stop_the_engine(endless, caplog):
    class Broken:
        def put(self, value):
            raise ValueError("no more room")

        end = put

    request = endless.submit([1, 2, 3], GREEDY, Broken())
    assert answer(endless, [1, 2, 3])[0]
    assert request.finish_reason == "error"
    assert "no more room" in caplog.text


# ---- Constraints ----


def start_on_stairs(engine, first, params, **options):
    return start(engine, [first, first + 1, first], params, Stairs(first, **options))


@pytest.mark.parametrize("top_k", [0, 50, 1000])
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_takes_only_what_its_grammar_allows(endless, temperature, top_k):
    params = SamplingParams(seed=3, temperature=temperature, top_k=top_k, top_p=1, max_new_tokens=150)
    request, streamer = start_on_stairs(endless, 5, params)
    ids = [5, *streamer.rest()]
    steps = {(after - before) % 97 for before, after in itertools.pairwise(ids)}
    assert steps <= {1, 2}
    assert (len(ids), request.finish_reason) == (151, "length")


@pytest.mark.parametrize("limit", [7, 8])
def test_an_answer_ends_with_its_grammar_even_at_its_last_token(endless, limit):
    request, streamer = start_on_stairs(endless, 5, replace(GREEDY, max_new_tokens=limit), steps=7)
    assert (len(streamer.rest()), request.finish_reason) == (7, "stop")


def test_with_a_grammar_and_without_all_say_in_company_what_they_say_alone(tiny_llama):
    params = [SamplingParams(seed=n, temperature=n % 2, top_k=(0, 50)[n % 3 == 0], max_new_tokens=40) for n in range(8)]

    def begin(engine, n):
        return start_on_stairs(engine, n, params[n]) if n % 2 else start(engine, [n, n + 1], params[n])

    with running(tiny_llama) as engine:
        alone = [begin(engine, n)[1].rest() for n in range(8)]
        with engine.paused():  # all are here before the first begins
            started = [begin(engine, n) for n in range(8)]
        assert [streamer.rest() for _, streamer in started] == alone


def test_whoever_goes_back_to_the_line_finds_the_place_in_its_grammar(tiny_llama):
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=3 * BLOCK_SIZE + 30)
    with running(tiny_llama) as engine:
        expected = [start_on_stairs(engine, n, params)[1].rest() for n in range(4)]
    with running(tiny_llama, tokens=8 * BLOCK_SIZE) as engine:  # three of them
        with engine.paused():
            started = [start_on_stairs(engine, n, params) for n in range(4)]
        assert [streamer.rest() for _, streamer in started] == expected
        assert engine.occupancy.preemptions


@pytest.mark.parametrize("step", [1, 9], ids=["in the prompts", "in the answers"])
def test_a_step_that_is_done_again_finds_the_place_in_the_grammar(tiny_llama, step, caplog):
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=30)
    with running(tiny_llama) as engine:
        expected = [start_on_stairs(engine, n, params)[1].rest() for n in range(3)]
        sample, calls = engine.runner.sample, []

        def fail(*args):
            calls.append(args)
            tokens = sample(*args)
            if len(calls) == step:
                raise RuntimeError("odd")
            return tokens

        engine.runner.sample = fail
        with engine.paused():
            started = [start_on_stairs(engine, n, params) for n in range(3)]
        assert [streamer.rest() for _, streamer in started] == expected


def test_a_grammar_that_gives_up_ends_its_own_answer_with_its_sentence(endless):
    params = replace(GREEDY, max_new_tokens=40)
    expected, _ = answer(endless, [1, 2, 3], params)
    with endless.paused():
        _, neighbour = start(endless, [1, 2, 3], params)
        failed, failing = start_on_stairs(endless, 5, replace(params, top_k=0), breaks_at=7)
    assert neighbour.rest() == expected
    assert set(failing.rest()) <= {6, 7}
    assert (failed.finish_reason, str(failed.error)) == ("error", "Too many stairs.")


def test_answers_without_a_grammar_pay_nothing_for_it(endless, monkeypatch):
    monkeypatch.setattr("llama2_chat.engine.model_runner.restrict", None)
    assert answer(endless, [1, 2, 3])[1].finish_reason == "length"
