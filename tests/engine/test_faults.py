"""Faults: each ends its own request only, and what ran before runs after."""

import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llama2_chat.engine.kv_pool import BLOCK_SIZE, make_pool
from llama2_chat.engine.model_runner import CPU_CHUNK
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.kernels.kv_codes import CODES
from llama2_chat.types import SamplingParams
from tests.support.engines import GREEDY, LONG, Ids, answer, letters, running, start


def test_an_error_reaches_its_own_request_and_the_next_one_works(endless, tiny_llama, caplog):
    prompt = letters("The three largest cities of Japan are")
    expected, _ = answer(endless, prompt)

    def fail(*_):
        raise RuntimeError("a secret detail")

    hook = tiny_llama.model.layers[1].register_forward_pre_hook(fail)
    try:
        found, request = answer(endless, letters("Hello there"))
    finally:
        hook.remove()
    assert (found, request.finish_reason) == ([], "error")
    assert isinstance(request.error, ChatError)
    assert "secret" not in str(request.error)
    assert "a secret detail" in caplog.text  # the log has it all
    assert answer(endless, prompt)[0] == expected  # a half written cache must not be found again


@contextmanager
def poisoned(model, poison):
    """While this lasts, computing the token at position 55 of anybody goes wrong."""

    def hook(layer, args, kwargs):
        bad = kwargs["position_ids"] == 55
        return ((poison(args[0], bad), *args[1:]), kwargs) if bad.any() else None

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def explode(hidden, bad):
    raise RuntimeError("a secret detail")


def not_a_number(hidden, bad):
    return torch.where(bad[..., None], torch.nan, hidden)


@pytest.mark.parametrize("poison", [explode, not_a_number])
@pytest.mark.parametrize("prompt_tokens", [100, 50], ids=["in its prompt", "in its answer"])
def test_a_request_that_fails_spares_its_neighbours_and_those_after_it(tiny_llama, poison, prompt_tokens, caplog):
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=40)
    prompts = [[n, n + 1, n + 2] for n in range(4)]
    bad = [7] * prompt_tokens
    with running(tiny_llama) as engine:
        expected = [answer(engine, prompt, params)[0] for prompt in prompts]
        healthy = answer(engine, bad, params)[0]
    with running(tiny_llama, tokens=16 * BLOCK_SIZE) as engine:  # so few that pages are used again
        with poisoned(tiny_llama, poison):
            started = [start(engine, prompt, params) for prompt in prompts[:2]]
            failed, failing = start(engine, bad, params)
            started += [start(engine, prompt, params) for prompt in prompts[2:]]
            assert [streamer.rest() for _, streamer in started] == expected
            assert failing.rest() == healthy[: max(0, 56 - prompt_tokens)]
        assert failed.finish_reason == "error"
        assert "secret" not in str(failed.error)
        for prompt, found in zip([*prompts, bad], [*expected, healthy], strict=True):
            assert answer(engine, prompt, params)[0] == found
        assert engine.occupancy.kv_tokens == 0


def test_who_leaves_before_the_first_token_leaves_nothing_behind_that_is_not_a_number(tiny_llama):
    # Others who got the page later ended with an error: 0 * NaN is NaN.
    with running(tiny_llama) as engine:

        def leave(*args):
            engine.cancel(request)
            return not_a_number(*args)

        with poisoned(tiny_llama, leave):
            with engine.paused():
                request, streamer = start(engine, [7] * (2 * CPU_CHUNK))
            assert streamer.rest() == []
        assert request.finish_reason == "cancelled"
        assert engine.runner.are_finite([*range(engine.runner.num_blocks)])


def test_out_of_memory_makes_the_batch_smaller_and_ends_nobody(tiny_llama, caplog):
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=30)
    prompts = [[n, n + 1, n + 2] for n in range(5)]
    with running(tiny_llama) as engine:
        expected = [answer(engine, prompt, params)[0] for prompt in prompts]

    def scarce(layer, args, kwargs):
        if args[0].shape[1] > 2 and kwargs["position_ids"].unique().numel() == 1:  # a decode step of more than two
            raise torch.OutOfMemoryError("no more")

    handle = tiny_llama.model.layers[0].register_forward_pre_hook(scarce, with_kwargs=True)
    try:
        with running(tiny_llama) as engine:
            started = [start(engine, prompt, params) for prompt in prompts]
            assert [streamer.rest() for _, streamer in started] == expected
    finally:
        handle.remove()
    assert "Out of memory" in caplog.text


def test_out_of_memory_alone_ends_with_a_sentence(tiny_llama, caplog):
    def scarce(*_):
        raise torch.OutOfMemoryError("no more")

    with running(tiny_llama) as engine:
        handle = tiny_llama.model.layers[0].register_forward_pre_hook(scarce)
        try:
            _, request = answer(engine, [1, 2, 3])
        finally:
            handle.remove()
        assert request.finish_reason == "error"
        assert "memory" in str(request.error)
        assert answer(engine, [1, 2, 3])[1].finish_reason == "length"


def test_long_prompts_are_read_in_long_chunks_again_once_there_is_memory(tiny_llama, caplog):
    chunks, most = [], CPU_CHUNK // 2

    def scarce(layer, args):
        chunks.append(args[0].shape[1])
        if args[0].shape[1] > most:
            raise torch.OutOfMemoryError("no more")

    handle = tiny_llama.model.layers[0].register_forward_pre_hook(scarce)
    try:
        with running(tiny_llama, speculate=False) as engine:
            assert answer(engine, [7] * (CPU_CHUNK + 1))[1].finish_reason == "length"
            most = CPU_CHUNK
            answer(engine, [8] * (CPU_CHUNK + 1))
            assert chunks[-1] == 1
            assert CPU_CHUNK in chunks[chunks.index(most // 2) :]
    finally:
        handle.remove()


def test_a_loop_that_dies_starts_again_and_its_requests_hear_of_it(tiny_llama, caplog):
    class Deadly(Ids):
        def put(self, value):
            raise SystemExit

    with running(tiny_llama) as engine:
        neighbour, streamer = start(engine, [1, 2, 3], LONG)
        streamer.next()
        engine.submit([4, 5, 6], GREEDY, Deadly())
        streamer.rest()
        assert neighbour.finish_reason == "error"
        assert isinstance(neighbour.error, ChatError)
        assert answer(engine, [1, 2, 3])[1].finish_reason == "length"
    assert "starts again" in caplog.text


def test_a_gpu_that_fails_for_good_is_told_to_everyone_and_to_the_owner(tiny_llama, caplog):
    lost = threading.Event()
    with running(tiny_llama, max_batch=1, on_lost=lost.set) as engine, poisoned(tiny_llama, explode):
        engine.runner.is_alive = lambda: False  # there is none here to break
        first, answering = start(engine, [7] * 50, LONG)
        second, waiting = start(engine, [1, 2, 3])
        answering.rest()
        waiting.rest()
        assert lost.wait(10)
        assert {first.finish_reason, second.finish_reason} == {"error"}
        assert "must be restarted" in str(second.error)
        with pytest.raises(ModelUnavailable):
            engine.submit([1], GREEDY, Ids())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no more"), RuntimeError("odd")], ids=["memory", "other"])
@pytest.mark.parametrize("step", [1, 9], ids=["in the prompts", "in the answers"])
def test_a_step_that_fails_half_way_is_done_again_and_nobody_notices(tiny_llama, error, step, caplog):
    # Visitors whose prompts had just been read were told that something went wrong, if memory ran out then; later, a
    # GPU went on from the wrong position, with another text.
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=30)
    prompts = [[n, n + 1, n + 2] for n in range(3)]
    with running(tiny_llama) as engine:
        expected = [answer(engine, prompt, params)[0] for prompt in prompts]
        decode, sample = engine.runner.decode, engine.runner.sample
        calls, misplaced = [], []

        def fail(*args):
            calls.append(args)
            tokens = sample(*args)
            if len(calls) == step:
                raise error
            return tokens

        def compare(requests):
            positions = engine.runner.sampler.positions[[request.slot for request in requests]]
            if positions.tolist() != [request.computed for request in requests]:
                misplaced.append(requests)
            return decode(requests)

        engine.runner.sample, engine.runner.decode = fail, compare
        with engine.paused():  # all are here before the first begins
            started = [start(engine, prompt, params) for prompt in prompts]
        assert [streamer.rest() for _, streamer in started] == expected
    assert len(calls) > step
    assert not misplaced


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", ["none", *CODES])
@examples(max_examples=10)
@given(
    visitors=st.lists(
        st.tuples(
            st.sampled_from(["leaves", "stays", "stays", "fails", "breaks"]),
            st.integers(1, 200),  # tokens of the prompt
            st.integers(1, 80),  # of the answer
            st.integers(0, 3),  # how it begins
        ),
        min_size=50,
        max_size=50,
    )
)
def test_500_that_join_leave_and_fail_leave_nothing_behind(tiny_llama, kv_cache, visitors):
    class Breaking(Ids):
        def put(self, value):
            raise ValueError("no more room")

    before = set(threading.enumerate())
    # The least that a CPU takes: room for one whole conversation, in any format.
    room = {"tokens": BLOCK_SIZE, "context_length": 20 * BLOCK_SIZE, "make_pool": partial(make_pool, kv_cache)}
    with running(tiny_llama, **room, queue_limit=50) as engine, poisoned(tiny_llama, explode):
        assert (engine.runner.kv_format, engine.runner.num_blocks) == (kv_cache, 21)
        started = []
        for kind, prompt_tokens, answer_tokens, beginning in visitors:
            if kind != "fails":  # they do at position 55
                prompt_tokens, answer_tokens = min(prompt_tokens, 40), min(answer_tokens, 10)
            streamer = Breaking() if kind == "breaks" else Ids()
            params = SamplingParams(seed=1, max_new_tokens=answer_tokens)
            request = engine.submit([beginning] * prompt_tokens, params, streamer)
            if kind == "leaves":
                engine.cancel(request)
            started.append((kind, request, streamer))
        for kind, request, streamer in started:
            streamer.rest()
            allowed = {"leaves": ["cancelled", "length"], "stays": ["length"], "breaks": ["error"]}
            assert request.finish_reason in allowed.get(kind, ["error", "length"])
        assert (engine.occupancy.running, engine.occupancy.waiting, engine.occupancy.kv_tokens) == (0, 0, 0)
        with engine.paused():  # every slot is free again
            started = [start(engine, [1], GREEDY) for _ in range(engine.runner.max_batch)]
        assert all(len(streamer.rest()) == GREEDY.max_new_tokens for _, streamer in started)
    assert not set(threading.enumerate()) - before
