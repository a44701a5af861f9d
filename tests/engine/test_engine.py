"""What the engine promises: the ids that generate gives, alone and in company, and everyone's troubles their own."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.engine.model_runner import CPU_CHUNK
from llama2_chat.engine.scheduler import Scheduler
from llama2_chat.errors import Busy, ChatError, ModelUnavailable
from llama2_chat.loading.load import load
from llama2_chat.types import SamplingParams
from tests.support.engines import GREEDY, LONG, SEEDED, Ids, Slow, answer, running, start
from tests.support.serving import ignore


@pytest.fixture
def engine(tiny):
    """Answers end with the id 2 at the latest when generate's do."""
    with running(tiny, tokens=4000, stop_ids={2}) as engine:
        yield engine


@pytest.fixture
def endless(tiny):
    """Answers end at their limit only."""
    with running(tiny) as engine:
        yield engine


@pytest.fixture
def single(tiny):
    """One answer at a time, three may wait."""
    with running(tiny, max_batch=1, queue_limit=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return tiny_llama


def letters(text):
    """Ids for the tiny model."""
    return [ord(letter) % 97 for letter in text]


def generated(model, input_ids, **options):
    """What generate() answers, without the end token."""
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([input_ids]), do_sample=False, max_new_tokens=GREEDY.max_new_tokens, **options
        )
    return [token for token in whole[0, len(input_ids) :].tolist() if token != 2]


@pytest.fixture(scope="module")
def embedded_engine(embedded):
    """An engine of the embedded model in float32, where ids can be compared one for one, and the model."""
    model = load(replace(embedded, quantization="float32"), ignore).model
    with running(model, tokens=1000, stop_ids={2}) as engine:
        yield engine, model


@pytest.fixture
def ids(embedded_tokenizer):
    return lambda text: embedded_tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["The three largest cities of Japan are", "Answer: <|im_end|", "1"])
def test_greedy_ids_of_the_embedded_model_are_the_ones_generate_gives(embedded_engine, ids, text):
    engine, model = embedded_engine
    found, request = answer(engine, ids(text))
    assert found == generated(model, ids(text))
    assert request.finish_reason == ("length" if len(found) == GREEDY.max_new_tokens else "stop")


def test_a_prompt_of_several_chunks_gives_what_generate_gives(tiny):
    prompt = letters("A llama walked through the garden. " * 4)
    assert len(prompt) > 2 * 50
    with running(tiny, tokens=1000, stop_ids={2}, longest_chunk=50) as engine:
        assert answer(engine, prompt)[0] == generated(tiny, prompt)


def test_the_repetition_penalty_counts_the_prompt_as_generate_does(engine, tiny):
    prompt = letters("one two three one two three one two")
    params = replace(GREEDY, repetition_penalty=1.3)
    assert answer(engine, prompt, params)[0] == generated(tiny, prompt, repetition_penalty=1.3)


def test_the_next_turn_finds_its_keys_and_values_and_says_the_same_as_without_them(engine, tiny):
    prompt = letters("The three largest cities of Japan are")
    first, _ = answer(engine, prompt)
    longer = [*prompt, *first, *letters(" And the smallest?")]
    second, request = answer(engine, longer)
    assert request.cached_tokens >= len(prompt) + len(first) - 1
    assert second == generated(tiny, longer)


def test_the_same_question_again_is_computed_from_its_last_token(endless):
    prompt = letters("Name a colour, any colour that you like.")
    first, _ = answer(endless, prompt)
    again, request = answer(endless, prompt)
    assert (again, request.cached_tokens) == (first, len(prompt) - 1)


def test_two_conversations_that_begin_alike_both_keep_their_keys_and_values(engine, tiny):
    system = letters("You are a llama who answers briefly.")
    one, two = [*system, *letters(" Where do you live? " * 8)], [*system, *letters(" What do you eat?")]
    answer(engine, one)
    text, request = answer(engine, two)
    assert request.cached_tokens >= len(system)
    assert text == generated(tiny, two)
    _, request = answer(engine, [*one, *letters("Go on.")])
    assert request.cached_tokens >= len(one)


def test_a_seed_gives_the_same_ids_whoever_else_is_talking(endless):
    prompt = letters("Once upon a time")
    alone, _ = answer(endless, prompt, SEEDED)
    neighbours = [Ids(), Ids()]
    endless.submit(letters("Count to ten."), GREEDY, neighbours[0])
    endless.submit(letters("Once upon a midnight"), SamplingParams(temperature=1, max_new_tokens=9), neighbours[1])
    assert answer(endless, prompt, SEEDED)[0] == alone
    assert all(neighbour.rest() for neighbour in neighbours)


def test_without_a_seed_two_answers_differ(endless):
    params = SamplingParams(temperature=1, top_k=0, top_p=1, max_new_tokens=24)
    assert (
        answer(endless, letters("Once upon a time"), params)[0]
        != answer(endless, letters("Once upon a time"), params)[0]
    )


def test_requests_are_answered_in_order_of_arrival_and_know_their_place(single):
    order, streamers = [], [Ids() for _ in range(3)]
    requests = []
    for place, streamer in enumerate(streamers):
        streamer.end = lambda place=place, end=streamer.end: (order.append(place), end())
        requests.append(single.submit(letters("Hello" * (place + 1)), (GREEDY if place else LONG), streamer))
        if place == 0:
            streamer.next()  # it runs; the others wait
    assert [single.position(request) for request in requests] == [0, 1, 2]
    single.cancel(requests[0])
    for streamer in streamers:
        streamer.rest()
    assert order == [0, 1, 2]
    assert [single.position(request) for request in requests] == [0, 0, 0]


def test_a_full_line_says_so_at_once_and_loses_nobody(single):
    streamers = [Ids() for _ in range(4)]
    requests = [single.submit(letters("Hello"), LONG, streamers[0])]
    streamers[0].next()
    requests += [single.submit(letters("Hello"), GREEDY, streamer) for streamer in streamers[1:]]
    with pytest.raises(Busy, match="3 waiting"):
        single.submit(letters("Hello"), GREEDY, Ids())
    single.cancel(requests[0])
    for streamer in streamers[1:]:
        assert streamer.rest()


def test_a_cancelled_request_leaves_the_line_without_touching_the_others(single):
    running, waiting = Slow(), Ids()
    first = single.submit(letters("Tell me a story."), replace(LONG, max_new_tokens=100), running)
    running.next()
    second = single.submit(letters("Hello"), GREEDY, waiting)
    single.cancel(second)
    single.cancel(second)
    assert waiting.rest() == []
    assert second.finish_reason == "cancelled"
    running.rest()
    assert first.finish_reason == "length"
    single.cancel(first)  # after the end: nothing happens
    assert first.finish_reason == "length"


def test_cancelling_stops_within_one_step(endless):
    streamer = Ids()
    request = endless.submit(letters("Count."), LONG, streamer)
    streamer.next()
    endless.cancel(request)
    computed_before = streamer.queue.qsize()
    assert len(streamer.rest()) <= computed_before + 1
    assert request.finish_reason == "cancelled"


def test_cancelling_acts_between_the_chunks_of_a_prefill(endless, tiny):
    chunks = []

    def leave(*_):
        chunks.append(1)
        endless.cancel(request)

    hook = tiny.register_forward_pre_hook(leave)
    try:
        with endless.paused():
            request, streamer = start(endless, letters("word " * 800))
        found = streamer.rest()
    finally:
        hook.remove()
    assert (found, request.finish_reason, len(chunks)) == ([], "cancelled", 1)


def test_an_error_reaches_its_own_request_and_the_next_one_works(endless, tiny, caplog):
    prompt = letters("The three largest cities of Japan are")
    expected, _ = answer(endless, prompt)

    def fail(*_):
        raise RuntimeError("a secret detail")

    hook = tiny.model.layers[1].register_forward_pre_hook(fail)
    try:
        found, request = answer(endless, letters("Hello there"))
    finally:
        hook.remove()
    assert (found, request.finish_reason) == ([], "error")
    assert isinstance(request.error, ChatError)
    assert "secret" not in str(request.error)
    assert "a secret detail" in caplog.text  # the log has it all
    assert answer(endless, prompt)[0] == expected  # a half written cache must not be found again


@pytest.mark.parametrize("input_ids", [[], [-1], [97], [2**40]], ids=["none", "negative", "too high", "far too high"])
def test_ids_the_model_does_not_know_are_refused_at_the_door(endless, input_ids):
    with pytest.raises(ChatError, match="0 to 96"):
        endless.submit(input_ids, GREEDY, Ids())


def test_closing_ends_everyone_and_refuses_newcomers(single):
    running, waiting = Ids(), Ids()
    requests = [single.submit(letters("Hello"), LONG, running)]
    running.next()
    requests.append(single.submit(letters("Hello"), LONG, waiting))
    single.close()
    assert waiting.rest() == []
    running.rest()
    assert [request.finish_reason for request in requests] == ["cancelled", "cancelled"]
    with pytest.raises(ModelUnavailable, match="stopped"):
        single.submit(letters("Hello"), LONG, Ids())


# ---- In company ----


def test_greedy_ids_are_the_same_alone_and_with_neighbours_that_come_and_go(tiny):
    texts = ["The three largest cities of Japan are", "Once upon a time", "def add(a, b):", "1, 2, 3,"]
    params = replace(GREEDY, max_new_tokens=8)
    with running(tiny, tokens=2000, max_batch=4) as engine:
        alone = [answer(engine, letters(text), params)[0] for text in texts]
    with running(tiny, tokens=2000, max_batch=4) as engine:
        started = [start(engine, letters(text), params) for text in texts[:2]]
        started[0][1].next()
        leaving, _ = start(engine, letters("Tell me a long story."), LONG)
        started += [start(engine, letters(text), params) for text in texts[2:]]
        started[1][1].next()
        engine.cancel(leaving)
        start(engine, letters("Short."), SamplingParams(seed=1, max_new_tokens=2, top_k=0))
        together = [streamer.rest() for _, streamer in started]
    assert together[0] == alone[0][1:]
    assert together[1] == alone[1][1:]
    assert together[2:] == alone[2:]


@pytest.mark.parametrize("top_k", [0, 50])
def test_a_seed_gives_the_same_ids_in_a_full_batch(endless, top_k):
    params = SamplingParams(seed=7, temperature=1, top_k=top_k, max_new_tokens=24)
    alone, _ = answer(endless, letters("Once upon a time"), params)
    neighbours = [
        start(endless, letters(f"The number {n} is"), SamplingParams(seed=n, top_k=(0, 5)[n % 2], max_new_tokens=30))
        for n in range(6)
    ]
    assert answer(endless, letters("Once upon a time"), params)[0] == alone
    assert all(len(streamer.rest()) == 30 for _, streamer in neighbours)


def test_what_does_not_fit_in_memory_waits_and_then_says_what_it_says_alone(tiny):
    long, short = letters("word " * 90), letters("The three largest cities of Japan are")
    with running(tiny) as engine:
        expected = answer(engine, short)[0]
    with running(tiny, tokens=8 * BLOCK_SIZE) as engine:
        reading = Slow()
        first = engine.submit(long, replace(GREEDY, max_new_tokens=60), reading)
        reading.next()
        second, waiting = start(engine, short)
        assert engine.position(second) == 1
        assert waiting.rest() == expected
        assert first.finish_reason == "length"


def test_when_memory_runs_out_the_youngest_waits_and_loses_no_text(tiny):
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=2 * BLOCK_SIZE)
    prompts = [[n, n + 1, n + 2] * 20 for n in range(4)]
    with running(tiny) as engine:
        expected = [answer(engine, prompt, params)[0] for prompt in prompts]
    with running(tiny, tokens=8 * BLOCK_SIZE) as engine:  # two and a bit of them
        started = [start(engine, prompt, params) for prompt in prompts]
        assert [streamer.rest() for _, streamer in started] == expected
        assert {request.finish_reason for request, _ in started} == {"length"}


def test_an_answer_that_outgrows_all_memory_ends_there(tiny):
    with running(tiny, tokens=8 * BLOCK_SIZE) as engine:
        found, request = answer(engine, [1] * 400, SamplingParams(temperature=0, max_new_tokens=4000))
        assert request.finish_reason == "length"
        assert len(found) == 8 * BLOCK_SIZE - 400
        with pytest.raises(ChatError, match="512 tokens"):
            engine.submit([1] * 8 * BLOCK_SIZE, GREEDY, Ids())


def test_nobody_gets_more_than_the_context_however_much_memory_there_is(tiny):
    # A prompt beyond it was let in and failed without a reason; an answer went on where the model knows nothing.
    with running(tiny, tokens=4000, context_length=200) as engine:
        found, request = answer(engine, [1] * 150, SamplingParams(temperature=0, max_new_tokens=4000))
        assert (len(found), request.finish_reason, engine.context_length) == (50, "length", 200)
        with pytest.raises(ChatError, match="200 tokens"):
            engine.submit([1] * 200, GREEDY, Ids())


def test_closing_reaches_a_request_that_is_just_going_back_to_the_line(tiny, monkeypatch):
    # Its reader waited for ever.
    params = SamplingParams(max_new_tokens=7 * BLOCK_SIZE)
    grow, closed = Scheduler.grow, threading.Event()

    def close_first(scheduler, request):
        has_room = grow(scheduler, request)
        if not has_room and not closing.is_alive():
            closing.start()
            assert closed.wait(60)  # by now close() has cancelled all who waited
        return has_room

    with running(tiny, tokens=8 * BLOCK_SIZE) as engine:
        closing = threading.Thread(target=engine.close)
        engine.runner.close = closed.set
        monkeypatch.setattr(Scheduler, "grow", close_first)
        started = [start(engine, [n] * 10, params) for n in range(2)]
        for request, streamer in started:
            streamer.rest()
            assert request.finish_reason == "cancelled"
        closing.join()


def test_when_the_one_without_room_leaves_the_line_the_next_comes_in(tiny):
    # The next waited for the end of somebody's long answer beside memory that nobody used.
    with running(tiny, tokens=20 * BLOCK_SIZE) as engine:
        long = engine.submit([1] * 320, LONG, Slow())
        young, _ = start(engine, [2] * 600, LONG)
        while not engine.occupancy.preemptions:
            time.sleep(0.001)
        last, waiting = start(engine, [3, 4, 5])
        assert engine.position(last) == 2
        engine.cancel(young)
        assert len(waiting.rest()) == GREEDY.max_new_tokens
        assert long.finish_reason is None


def test_a_stream_goes_on_while_a_long_prompt_is_read(endless):
    _, streaming = start(endless, letters("Tell me a story."), LONG)
    streaming.next()
    before = streaming.queue.qsize()
    long, reading = start(endless, letters("word " * 300), SamplingParams(max_new_tokens=1))
    reading.rest()
    assert streaming.queue.qsize() - before >= 1500 // CPU_CHUNK
    assert long.finish_reason == "length"


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
def test_a_request_that_fails_spares_its_neighbours_and_those_after_it(tiny, poison, prompt_tokens, caplog):
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=40)
    prompts = [[n, n + 1, n + 2] for n in range(4)]
    bad = [7] * prompt_tokens
    with running(tiny) as engine:
        expected = [answer(engine, prompt, params)[0] for prompt in prompts]
        healthy = answer(engine, bad, params)[0]
    with running(tiny, tokens=16 * BLOCK_SIZE) as engine:  # so few that pages are used again
        with poisoned(tiny, poison):
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


def test_who_leaves_before_the_first_token_leaves_nothing_behind_that_is_not_a_number(tiny):
    # Others who got the page later ended with an error: 0 * NaN is NaN.
    with running(tiny) as engine:

        def leave(*args):
            engine.cancel(request)
            return not_a_number(*args)

        with poisoned(tiny, leave):
            with engine.paused():
                request, streamer = start(engine, [7] * (2 * CPU_CHUNK))
            assert streamer.rest() == []
        assert request.finish_reason == "cancelled"
        assert engine.runner.are_finite([*range(engine.runner.num_blocks)])


def test_out_of_memory_makes_the_batch_smaller_and_ends_nobody(tiny, caplog):
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=30)
    prompts = [[n, n + 1, n + 2] for n in range(5)]
    with running(tiny) as engine:
        expected = [answer(engine, prompt, params)[0] for prompt in prompts]

    def scarce(layer, args, kwargs):
        if args[0].shape[1] > 2 and kwargs["position_ids"].unique().numel() == 1:  # a decode step of more than two
            raise torch.OutOfMemoryError("no more")

    handle = tiny.model.layers[0].register_forward_pre_hook(scarce, with_kwargs=True)
    try:
        with running(tiny) as engine:
            started = [start(engine, prompt, params) for prompt in prompts]
            assert [streamer.rest() for _, streamer in started] == expected
    finally:
        handle.remove()
    assert "Out of GPU memory" in caplog.text


def test_out_of_memory_alone_ends_with_a_sentence(tiny, caplog):
    def scarce(*_):
        raise torch.OutOfMemoryError("no more")

    with running(tiny) as engine:
        handle = tiny.model.layers[0].register_forward_pre_hook(scarce)
        try:
            _, request = answer(engine, [1, 2, 3])
        finally:
            handle.remove()
        assert request.finish_reason == "error"
        assert "memory" in str(request.error)
        assert answer(engine, [1, 2, 3])[1].finish_reason == "length"


def test_long_prompts_are_read_in_long_chunks_again_once_there_is_memory(tiny, caplog):
    chunks, most = [], CPU_CHUNK // 2

    def scarce(layer, args):
        chunks.append(args[0].shape[1])
        if args[0].shape[1] > most:
            raise torch.OutOfMemoryError("no more")

    handle = tiny.model.layers[0].register_forward_pre_hook(scarce)
    try:
        with running(tiny) as engine:
            assert answer(engine, [7] * (CPU_CHUNK + 1))[1].finish_reason == "length"
            most = CPU_CHUNK
            answer(engine, [8] * (CPU_CHUNK + 1))
            assert chunks[-1] == 1
            assert CPU_CHUNK in chunks[chunks.index(most // 2) :]
    finally:
        handle.remove()


def test_a_loop_that_dies_starts_again_and_its_requests_hear_of_it(tiny, caplog):
    class Deadly(Ids):
        def put(self, value):
            raise SystemExit

    with running(tiny) as engine:
        neighbour, streamer = start(engine, [1, 2, 3], LONG)
        streamer.next()
        engine.submit([4, 5, 6], GREEDY, Deadly())
        streamer.rest()
        assert neighbour.finish_reason == "error"
        assert isinstance(neighbour.error, ChatError)
        assert answer(engine, [1, 2, 3])[1].finish_reason == "length"
    assert "starts again" in caplog.text


def test_a_gpu_that_fails_for_good_is_told_to_everyone_and_to_the_owner(tiny, caplog):
    lost = threading.Event()
    with running(tiny, max_batch=1, on_lost=lost.set) as engine, poisoned(tiny, explode):
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


@pytest.mark.slow
@examples(max_examples=10)
@given(
    st.lists(
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
def test_500_that_join_leave_and_fail_leave_nothing_behind(tiny, visitors):
    class Breaking(Ids):
        def put(self, value):
            raise ValueError("no more room")

    threads = threading.active_count()
    with running(tiny, tokens=20 * BLOCK_SIZE, queue_limit=50) as engine, poisoned(tiny, explode):
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
    assert threading.active_count() == threads


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no more"), RuntimeError("odd")], ids=["memory", "other"])
@pytest.mark.parametrize("step", [1, 9], ids=["in the prompts", "in the answers"])
def test_a_step_that_fails_half_way_is_done_again_and_nobody_notices(tiny, error, step, caplog):
    # Visitors whose prompts had just been read were told that something went wrong, if memory ran out then; later, a
    # GPU went on from the wrong position, with another text.
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=30)
    prompts = [[n, n + 1, n + 2] for n in range(3)]
    with running(tiny) as engine:
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
