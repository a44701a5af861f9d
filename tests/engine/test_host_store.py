"""Conversations that made room in the KV pool: they come back by copy, and say what they would have said."""

import random
from dataclasses import replace

import pytest
import torch

from llama2_chat.engine.host_store import HostStore
from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.types import SamplingParams
from tests.engine.test_seams import SplitPool
from tests.support.engines import GREEDY, LONG, SEEDED, Slow, answer, running, start

SMALL = 8 * BLOCK_SIZE  # tokens that the pool has room for
MUCH = 2**24  # bytes
FIRST = [n % 89 for n in range(200)]
OTHERS = [[n] * 300 for n in (90, 91, 92)]


def test_blocks_of_any_format_come_back_as_they_were():
    tensors = [torch.randn(6, 64, 2, 8), torch.randint(-128, 128, (6, 64, 2), dtype=torch.int8)]
    before = [tensor.clone() for tensor in tensors]
    store = HostStore(tensors, most_bytes=3 * (64 * 2 * 8 * 4 + 64 * 2) + 100)
    assert store.num_pages == 3
    store.save(4, 2)
    for tensor in tensors:
        tensor[4] = 0
    store.restore(2, 1)
    assert all(tensor[1].equal(old[4]) and tensor[5].equal(old[5]) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("pool", [{}, {"make_pool": SplitPool}], ids=["plain", "split"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_conversation_that_left_comes_back_by_copy_and_goes_on_as_before(tiny_llama, params, pool):
    with running(tiny_llama, **pool) as engine:
        begun = answer(engine, FIRST, params)[0]
        expected = answer(engine, [*FIRST, *begun, 1, 2, 3], params)[0]
    with running(tiny_llama, tokens=SMALL, host_bytes=MUCH, **pool) as engine:
        assert answer(engine, FIRST, params)[0] == begun
        for other in OTHERS:
            answer(engine, other)
        held = engine.occupancy
        assert (held.host_tokens >= 192, held.recalled_tokens) == (True, 0)
        found, request = answer(engine, [*FIRST, *begun, 1, 2, 3], params)
        assert (found, request.cached_tokens) == (expected, 192)
        assert engine.occupancy.recalled_tokens == 192


def test_who_asks_for_a_whole_computation_gets_no_copy(tiny_llama):
    with running(tiny_llama, tokens=SMALL, host_bytes=MUCH) as engine:
        expected = answer(engine, FIRST)[0]
        for other in OTHERS:
            answer(engine, other)
        found, request = answer(engine, FIRST, replace(GREEDY, cache_prompt=False))
        assert (found, request.cached_tokens, engine.occupancy.recalled_tokens) == (expected, 0, 0)


def test_an_answer_that_made_room_for_another_comes_back_by_copy(tiny_llama):
    hog, other = replace(LONG, client="hog", max_new_tokens=60), replace(GREEDY, client="other")
    with running(tiny_llama) as engine:
        alone, _ = answer(engine, FIRST, hog)
    with running(tiny_llama, tokens=SMALL, max_batch=2, host_bytes=MUCH) as engine:
        streamer = Slow()
        engine.submit([3, 4, 5], hog, Slow())
        engine.submit(FIRST, hog, streamer)
        begun = [streamer.next()]
        answer(engine, [7] * 300, other)
        assert engine.occupancy.preemptions == 1
        assert begun + streamer.rest() == alone
        assert engine.occupancy.recalled_tokens


def test_answers_go_on_while_a_block_is_on_its_way(tiny_llama):
    """The store says that what it copies takes a while."""
    with running(tiny_llama, tokens=20 * BLOCK_SIZE, host_bytes=MUCH) as engine:
        answer(engine, FIRST)
        for other in [[n] * 600 for n in (90, 91, 92)]:
            answer(engine, other)
        arriving = engine.runner.are_arriving = Arriving(engine.runner.are_arriving)
        streaming = Slow()
        engine.submit([5, 6, 7], replace(LONG, max_new_tokens=200), streaming)
        streaming.next()
        back, reading = start(engine, [*FIRST, 1])
        while arriving.asked < 5:  # by now it runs, and no step reads it
            assert streaming.next() is not None
        assert (back.sampled, back.computed, engine.occupancy.recalled_tokens) == (0, 192, 192)
        arriving.done = True
        assert len(reading.rest()) == GREEDY.max_new_tokens


class Arriving:
    def __init__(self, really):
        self.really, self.asked, self.done = really, 0, False

    def __call__(self, blocks):
        here = self.done or len(blocks) < 3
        self.asked += not here
        return not here


def test_a_pool_without_room_in_memory_of_the_host_forgets_as_before(tiny_llama):
    with running(tiny_llama, tokens=SMALL, host_bytes=100) as engine:
        assert engine.occupancy.host_capacity_tokens == 0
        expected = answer(engine, FIRST)[0]
        for other in OTHERS:
            answer(engine, other)
        found, request = answer(engine, FIRST)
        assert (found, request.cached_tokens) == (expected, 0)


@pytest.mark.slow
def test_five_hundred_who_come_and_go_say_what_they_say_without_a_host(tiny_llama):
    """Many begin alike, some leave early, and all share blocks for three of them."""
    chance = random.Random(0)
    roots = [[chance.randrange(97) for _ in range(300)] for _ in range(6)]
    prompts = [[*chance.choice(roots)[: chance.randrange(20, 260)], chance.randrange(97)] for _ in range(500)]
    params = [SamplingParams(temperature=1, seed=n, max_new_tokens=chance.randrange(1, 12)) for n in range(500)]
    visits = [*zip(prompts, params, strict=True)]
    leaving = {n for n in range(500) if chance.random() < 0.2}

    def texts(**options):
        with running(tiny_llama, queue_limit=500, **options) as engine:
            started = [start(engine, ids, each) for ids, each in visits]
            for n, (request, streamer) in enumerate(started):
                if options and n in leaving:
                    streamer.next()
                    engine.cancel(request)
            found = [streamer.rest() for _, streamer in started]
            assert engine.occupancy.kv_tokens == 0
            return found, [request.finish_reason for request, _ in started], engine.occupancy.recalled_tokens

    expected, _, _ = texts()
    found, reasons, recalled = texts(tokens=10 * BLOCK_SIZE, host_bytes=30 * BLOCK_SIZE * 256)
    assert recalled > 1_000
    assert "cancelled" in reasons
    for whole, ids, n, reason in zip(expected, found, range(500), reasons, strict=True):
        if n in leaving:
            ids = [whole[0], *ids]  # read before it left
        assert ids == (whole[: len(ids)] if reason == "cancelled" else whole)
