"""That the engine's seams are real: a runner that computes nothing drives it, and a second KV format and a second way
to compute a step plug in from outside."""

import threading
from dataclasses import dataclass

import pytest
import torch

from llama2_chat.engine.engine import Engine
from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool
from llama2_chat.engine.model_runner import ModelRunner
from llama2_chat.engine.sampler import SamplerState
from llama2_chat.engine.step_ways import ModelStep
from llama2_chat.types import SamplingParams
from tests.support.engines import CPU, GREEDY, LONG, answer, running, start

COUNT = SamplingParams(max_new_tokens=10)


@dataclass
class Script:
    """A step, and the tokens that it gives."""

    requests: list
    tokens: list

    def result(self):
        return self.tokens


class ScriptedRunner:
    """Computes nothing: the next token is always the one after the last."""

    num_blocks, block_size, max_batch, vocab_size = 17, 4, 3, 1000
    longest_chunk, shortest_chunk, piece_size, context_length, draft_tokens, host_blocks = 16, 4, None, 64, 0, 0
    draft_cost, row_cost, may_draft = None, 0.1, False
    mode, kv_format, kv_bytes, maintenance_due, check_lengths = "scripted", "none", 0, False, (24,)

    def __init__(self, pipelined=False):
        self.pipelined = pipelined
        self.batches = []  # how many requests each decode step had
        self.read = {}  # of each request by its first id: the ids that were prefilled

    def nothing(self, *args):
        return None

    start = wait = close = enter_thread = maintain = synchronize = release_memory = copy_block = zero_blocks = nothing
    are_arriving = wait_for_block = nothing

    def self_check(self, requests):
        return True

    def is_alive(self):
        return True

    def are_finite(self, blocks):
        return True

    def prefill(self, chunks):
        for chunk in chunks:
            assert len(chunk.request.blocks) * self.block_size >= chunk.end
            self.read.setdefault(chunk.request.ids[0], []).extend(chunk.ids)
        return self.step([chunk.request for chunk in chunks if chunk.is_last])

    def decode(self, requests):
        self.batches.append(len(requests))
        for request in requests:
            assert len(request.blocks) * self.block_size > request.computed
        return self.step(requests)

    def step(self, requests):
        return Script([*requests], [request.ids[0] + request.sampled + 1 for request in requests])

    def sample(self, step, masks):
        # In a pipelined step the request's newest ids are still in flight: count what was chosen, not what arrived.
        return Script(step.requests, [request.ids[0] + request.sampled + 1 for request in step.requests])


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_runner_that_computes_nothing_drives_the_engine(pipelined):
    runner = ScriptedRunner(pipelined)
    engine = Engine(runner, stop_ids=set())
    with engine.paused():
        started = [start(engine, [100 * n, 7, 7, 7, 7], COUNT) for n in range(1, 8)]
    for n, (request, streamer) in enumerate(started, 1):
        assert streamer.rest() == [100 * n + i for i in range(1, 11)]
        assert request.finish_reason == "length"
    engine.close()
    assert max(runner.batches) == runner.max_batch
    assert engine.occupancy.kv_tokens == 0


def test_memory_for_one_is_enough_for_all_in_turn():
    runner = ScriptedRunner()
    engine = Engine(runner, stop_ids=set())
    with engine.paused():
        started = [start(engine, [100 * n] * 40, SamplingParams(max_new_tokens=24)) for n in range(1, 4)]
    assert [len(streamer.rest()) for _, streamer in started] == [24, 24, 24]
    engine.close()


def test_a_runner_that_dies_ends_everyone_with_a_sentence():
    runner, lost = ScriptedRunner(), threading.Event()

    def fail(requests):
        runner.is_alive = lambda: False
        raise RuntimeError("no device")

    runner.decode = fail
    engine = Engine(runner, set(), on_lost=lost.set)
    request, streamer = start(engine, [1, 2, 3], LONG)
    streamer.rest()
    assert lost.wait(60)
    assert "must be restarted" in str(request.error)


class SplitPool(KVPool):
    """Another format: head by head, each number as a bfloat16 and another one for what the first loses."""

    def allocate(self, keys):
        shape = self.num_blocks, 2, keys.shape[1], BLOCK_SIZE, keys.shape[3]
        return torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)

    def write(self, layer, key, value, kv_index):
        for states, new in zip(self.layers[layer], (key, value), strict=True):
            high = new[0].transpose(0, 1)
            for part in range(2):
                states[kv_index // BLOCK_SIZE, part, :, kv_index % BLOCK_SIZE] = high.to(torch.bfloat16)
                high = high - high.to(torch.bfloat16).to(high.dtype)

    def read(self, layer, blocks, length):
        keys, values = self.read_batch(layer, blocks[None])
        return keys[:, :, :length], values[:, :, :length]

    def read_batch(self, layer, tables):
        return tuple(states.float().sum(1)[tables].transpose(1, 2).flatten(2, 3) for states in self.layers[layer])


def test_another_kv_format_plugs_in(tiny_llama):
    prompts = [[n, n + 1, n + 2] * 50 for n in range(4)]
    with running(tiny_llama) as engine:
        expected = [answer(engine, prompt)[0] for prompt in prompts]
    with running(tiny_llama, make_pool=SplitPool) as engine:
        with engine.paused():
            started = [start(engine, prompt) for prompt in prompts]
        assert [streamer.rest() for _, streamer in started] == expected
        again, request = answer(engine, prompts[0])  # from its cached blocks
        assert (again, request.cached_tokens) == (expected[0], len(prompts[0]) // BLOCK_SIZE * BLOCK_SIZE)


class WholeWay:
    """A second way to compute steps: each request whole, through the model, with no cache at all."""

    mode, maintenance_due = "whole", False

    def __init__(self, model, sampler):
        self.model, self.sampler, self.steps = model, sampler, 0

    def start(self, wake):
        pass

    maintain = close = lambda self: None

    def logits(self, ids):
        self.steps += 1
        return self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]

    def prefill(self, chunks):
        rows = [self.logits(chunk.request.ids) for chunk in chunks if chunk.is_last]
        return torch.stack(rows) if rows else torch.empty(0, self.sampler.vocab_size)

    def decode(self, requests):
        logits = torch.stack([self.logits(request.ids) for request in requests])
        return ModelStep([*requests], logits, torch.tensor([request.slot for request in requests]))


def test_a_second_way_to_compute_a_step_plugs_in(tiny_llama):
    prompts = [[n, n + 1, n + 2] * 10 for n in range(4)]
    with running(tiny_llama) as engine:
        expected = [answer(engine, prompt)[0] for prompt in prompts]
    pool = KVPool(tiny_llama, lambda: {CPU: 2**24}, context_length=1000, max_batch=4)
    sampler = SamplerState(4, 97, 4096, CPU)
    way = WholeWay(tiny_llama, sampler)
    engine = Engine(ModelRunner(tiny_llama, pool, sampler, 1000, faster=way), set())
    with engine.paused():
        started = [start(engine, prompt, GREEDY) for prompt in prompts]
    assert [streamer.rest() for _, streamer in started] == expected
    engine.close()
    assert way.steps >= len(prompts) * GREEDY.max_new_tokens
