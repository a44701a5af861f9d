"""The memory that is left to steps beside the KV pool. That GPUs have enough of it, tests/engine/test_gpu.py shows."""

import pytest
import torch

from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool
from llama2_chat.engine.paged_attention import attention_windows
from llama2_chat.engine.rehearsal import pool_beside_steps, rehearse
from llama2_chat.engine.sampler import SamplerState
from llama2_chat.engine.step_ways import EagerWay
from llama2_chat.errors import ModelUnavailable

CPU = torch.device("cpu")
GB = 1_000_000_000


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # it would look through what all other tests have left


class Pool:
    """Takes all that it is left, as a KV pool does."""

    devices = (CPU,)

    def __init__(self, free_bytes):
        self.tokens = free_bytes()[CPU]
        if self.tokens < GB:
            raise ModelUnavailable("Nothing is left.")


class Device:
    """Whose libraries keep so much once a step has been computed, and which runs out of memory so often."""

    def __init__(self, kept=0, failures=0, total=10 * GB):
        self.kept, self.failures, self.total, self.outside, self.pool = kept, failures, total, 0, None

    def free_bytes(self):
        return {CPU: self.total - self.outside - (self.pool.tokens if self.pool else 0)}

    def make_pool(self, free_bytes):
        self.pool = None
        self.pool = Pool(free_bytes)
        return self.pool

    def rehearse(self, pool):
        self.outside = self.kept
        if self.failures:
            self.failures -= 1
            raise RuntimeError("CUDA driver error: out of memory")

    def room(self):
        return pool_beside_steps(self.make_pool, self.free_bytes, GB, self.rehearse).tokens


def test_what_is_not_left_to_the_steps_is_the_pools():
    assert Device().room() == 9 * GB


def test_what_libraries_took_of_the_steps_memory_is_taken_back_from_the_pool():
    # The first step of a kernel takes memory where PyTorch does not look.
    assert Device(kept=GB // 2).room() == pytest.approx(8.5 * GB)


def test_where_the_longest_steps_run_out_of_memory_the_pool_gets_smaller_until_they_do_not():
    assert 7 * GB < Device(failures=3).room() < 9 * GB


def test_where_no_pool_is_small_enough_its_sentence_is_said():
    with pytest.raises(ModelUnavailable, match="Nothing is left"):
        Device(failures=1000, total=3 * GB).room()


def test_the_longest_steps_leave_all_blocks_but_the_padding_as_they_were(tiny_llama):
    attention_windows(tiny_llama)  # from here on it attends over the pool
    pool = KVPool(tiny_llama, lambda: {CPU: 2**24}, context_length=256, max_batch=2)
    sampler = SamplerState(2, tiny_llama.config.vocab_size, 256, CPU)
    rehearse(EagerWay(tiny_llama, pool, sampler, None, 256 // BLOCK_SIZE), sampler, 200)
    assert all(kept[0].any() and not kept[1:].any() for kept in pool.tensors)
