"""Engines with memory for so many tokens, streamers whose ids a test reads, and a grammar of three lines."""

import queue
import time
from contextlib import contextmanager

import torch

from llama2_chat.engine.engine import Engine
from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.engine.model_runner import build_runner
from llama2_chat.errors import ChatError
from llama2_chat.types import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=12)
SEEDED = SamplingParams(seed=7, temperature=1, max_new_tokens=24)
LONG = SamplingParams(seed=7, temperature=1, max_new_tokens=4000)
END = None


def letters(text):
    """Ids for a model of 97 tokens."""
    return [ord(letter) % 97 for letter in text]


class Ids:
    """A streamer whose ids the test reads one by one."""

    def __init__(self):
        self.queue = queue.Queue()

    def put(self, value):
        self.queue.put(value.item())

    def end(self):
        self.queue.put(END)

    def next(self):
        return self.queue.get(timeout=60)

    def rest(self):
        return list(iter(self.next, END))


class Slow(Ids):
    """Holds the engine up, so that what happens meanwhile happens in time."""

    def put(self, value):
        time.sleep(0.003)
        super().put(value)


class Stairs:
    """A TokenConstraint: after an id only the next one and the one after it, until an answer has `steps` of them."""

    def __init__(self, first, steps=10**6, breaks_at=None):
        self.last, self.left, self.breaks_at = first, steps, breaks_at

    @property
    def complete(self):
        return not self.left

    def allow(self, mask):
        if self.last == self.breaks_at:
            raise ChatError("Too many stairs.")
        bits = torch.zeros(128, dtype=torch.int64)
        bits[[(self.last + 1) % 97, (self.last + 2) % 97]] = 1
        mask[:4] = (bits.view(4, 32) << torch.arange(32)).sum(1).to(torch.int32)

    def forced(self):
        return [(self.last + 1) % 97, (self.last + 2) % 97]

    def advance(self, token):
        assert (token - self.last) % 97 in (1, 2)
        self.last, self.left = token, self.left - 1


@contextmanager
def running(model, tokens=16_000, context_length=None, stop_ids=(), queue_limit=64, on_lost=lambda: None, **runner):
    """An engine with memory for so many tokens; runner: what build_runner() takes."""
    bytes_per_token = 2 * sum(layer.self_attn.k_proj.out_features for layer in model.model.layers) * 4
    free = {CPU: -(-tokens // BLOCK_SIZE) * BLOCK_SIZE * bytes_per_token}
    runner = build_runner(model, lambda: free, context_length or tokens, **runner)
    engine = Engine(runner, set(stop_ids), queue_limit, on_lost)
    try:
        yield engine
    finally:
        engine.close()


def start(engine, input_ids, params=GREEDY, grammar=None):
    streamer = Ids()
    return engine.submit(input_ids, params, streamer, grammar), streamer


def answer(engine, input_ids, params=GREEDY):
    """The ids of one whole answer, and the request that gave them."""
    request, streamer = start(engine, input_ids, params)
    return streamer.rest(), request
