"""In company: everybody gets the ids they get alone, whoever comes and goes and however little memory there is."""

import threading
import time
from dataclasses import replace

import pytest

from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.engine.model_runner import CPU_CHUNK
from llama2_chat.engine.scheduler import Scheduler
from llama2_chat.errors import Busy, ChatError
from llama2_chat.types import SamplingParams
from tests.support.engines import GREEDY, LONG, Ids, Slow, answer, letters, running, start


def test_greedy_ids_are_the_same_alone_and_with_neighbours_that_come_and_go(tiny_llama):
    texts = ["The three largest cities of Japan are", "Once upon a time", "def add(a, b):", "1, 2, 3,"]
    params = replace(GREEDY, max_new_tokens=8)
    with running(tiny_llama, tokens=2000, max_batch=4) as engine:
        alone = [answer(engine, letters(text), params)[0] for text in texts]
    with running(tiny_llama, tokens=2000, max_batch=4) as engine:
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


def test_what_does_not_fit_in_memory_waits_and_then_says_what_it_says_alone(tiny_llama):
    long, short = letters("word " * 90), letters("The three largest cities of Japan are")
    with running(tiny_llama) as engine:
        expected = answer(engine, short)[0]
    with running(tiny_llama, tokens=8 * BLOCK_SIZE) as engine:
        reading = Slow()
        first = engine.submit(long, replace(GREEDY, max_new_tokens=60), reading)
        reading.next()
        second, waiting = start(engine, short)
        assert engine.position(second) == 1
        assert waiting.rest() == expected
        assert first.finish_reason == "length"


def test_when_memory_runs_out_the_youngest_waits_and_loses_no_text(tiny_llama):
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=2 * BLOCK_SIZE)
    prompts = [[n, n + 1, n + 2] * 20 for n in range(4)]
    with running(tiny_llama) as engine:
        expected = [answer(engine, prompt, params)[0] for prompt in prompts]
    with running(tiny_llama, tokens=8 * BLOCK_SIZE) as engine:  # two and a bit of them
        started = [start(engine, prompt, params) for prompt in prompts]
        assert [streamer.rest() for _, streamer in started] == expected
        assert {request.finish_reason for request, _ in started} == {"length"}


def test_an_answer_that_outgrows_all_memory_ends_there(tiny_llama):
    with running(tiny_llama, tokens=8 * BLOCK_SIZE) as engine:
        found, request = answer(engine, [1] * 400, SamplingParams(temperature=0, max_new_tokens=4000))
        assert request.finish_reason == "length"
        assert len(found) == 8 * BLOCK_SIZE - 400
        with pytest.raises(ChatError, match="512 tokens"):
            engine.submit([1] * 8 * BLOCK_SIZE, GREEDY, Ids())


def test_nobody_gets_more_than_the_context_however_much_memory_there_is(tiny_llama):
    # A prompt beyond it was let in and failed without a reason; an answer went on where the model knows nothing.
    with running(tiny_llama, tokens=4000, context_length=200) as engine:
        found, request = answer(engine, [1] * 150, SamplingParams(temperature=0, max_new_tokens=4000))
        assert (len(found), request.finish_reason, engine.context_length) == (50, "length", 200)
        with pytest.raises(ChatError, match="200 tokens"):
            engine.submit([1] * 200, GREEDY, Ids())


def test_closing_reaches_a_request_that_is_just_going_back_to_the_line(tiny_llama, monkeypatch):
    # Its reader waited for ever.
    params = SamplingParams(max_new_tokens=7 * BLOCK_SIZE)
    grow, closed = Scheduler.grow, threading.Event()

    def close_first(scheduler, request):
        has_room = grow(scheduler, request)
        if not has_room and not closing.is_alive():
            closing.start()
            assert closed.wait(60)  # by now close() has cancelled all who waited
        return has_room

    with running(tiny_llama, tokens=8 * BLOCK_SIZE) as engine:
        closing = threading.Thread(target=engine.close)
        engine.runner.close = closed.set
        monkeypatch.setattr(Scheduler, "grow", close_first)
        started = [start(engine, [n] * 10, params) for n in range(2)]
        for request, streamer in started:
            streamer.rest()
            assert request.finish_reason == "cancelled"
        closing.join()


@pytest.mark.slow
def test_when_the_one_without_room_leaves_the_line_the_next_comes_in(tiny_llama):
    # The next waited for the end of somebody's long answer beside memory that nobody used.
    with running(tiny_llama, tokens=20 * BLOCK_SIZE) as engine:
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


def test_beside_one_client_with_eighty_long_answers_another_is_answered_at_once(tiny_llama):
    # The second waited until a whole answer of the first had ended, and was refused once the line was full of them.
    hog, other = replace(LONG, client="hog"), replace(GREEDY, client="other")
    with running(tiny_llama, tokens=40_000, max_batch=4) as engine:
        alone, _ = answer(engine, letters("Hello."), other)
    with running(tiny_llama, tokens=40_000, max_batch=4, queue_limit=80) as engine:
        hogs = [start(engine, letters(f"{n}. Tell me a long story."), hog) for n in range(80)]
        hogs[0][1].next()
        assert answer(engine, letters("Hello."), other)[0] == alone
        assert not any(request.finish_reason for request, _ in hogs)


def test_an_answer_that_made_room_goes_on_as_if_nothing_had_been(tiny_llama):
    hog, other = replace(LONG, client="hog", max_new_tokens=60), replace(GREEDY, client="other")
    with running(tiny_llama, max_batch=2) as engine:
        alone, _ = answer(engine, letters("Second story."), hog)
    with running(tiny_llama, max_batch=2) as engine:
        streamer = Slow()
        engine.submit(letters("First story."), hog, Slow())
        engine.submit(letters("Second story."), hog, streamer)
        begun = [streamer.next()]
        answer(engine, letters("Hello."), other)
        assert engine.occupancy.preemptions == 1
        assert begun + streamer.rest() == alone


def test_whoever_fills_the_line_is_told_so_when_others_come(tiny_llama):
    hog, other = replace(LONG, client="hog"), replace(GREEDY, client="other")
    with running(tiny_llama, max_batch=2, queue_limit=2) as engine:
        for _ in range(2):
            start(engine, letters("Once upon a time"), hog)[1].next()
        _, (last, ended) = [start(engine, letters("Another story."), hog) for _ in range(2)]
        answer(engine, letters("Hello."), other)
        assert ended.rest() == []
        assert isinstance(last.error, Busy)
