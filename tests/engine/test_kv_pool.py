"""How much memory conversations get, and what is said when there is none."""

import psutil
import pytest
import torch

from llama2_chat.engine.kv_pool import BLOCK_SIZE, LEAST_BLOCKS, KVPool, make_pool
from llama2_chat.engine.model_runner import build_runner
from llama2_chat.errors import ModelUnavailable
from tests.support.engines import answer, running

CPU = torch.device("cpu")


class Pieces(KVPool):
    """What is free lies in pieces: more blocks than so many do not fit in one."""

    most = 20

    def allocate(self, keys):
        if self.num_blocks > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().allocate(keys)


class NoRoom(Pieces):
    most = LEAST_BLOCKS


def build(model, make_pool):
    return build_runner(model, lambda: {CPU: 2**30}, context_length=4096, make_pool=make_pool)


def test_a_pool_that_does_not_fit_in_one_piece_is_made_smaller_until_it_does(tiny_llama):
    # A 13B in bfloat16 did not start on a GPU with 80 GB: 5.7 GB of what was counted as free lay in pieces.
    runner = build(tiny_llama, Pieces)
    assert Pieces.most * 3 // 4 < runner.num_blocks <= Pieces.most
    assert runner.context_length == (runner.num_blocks - 1) * BLOCK_SIZE


def test_where_nothing_is_left_for_conversations_the_numbers_are_said(tiny_llama):
    with pytest.raises(
        ModelUnavailable, match=r"leaves 1\.1 GB of GPU memory for conversations, and the shortest takes"
    ):
        build(tiny_llama, NoRoom)


@pytest.mark.parametrize("context_length", [64, 256, 448])
def test_one_answer_at_a_time_over_a_small_window_needs_no_more_than_that_window(tiny_llama, context_length):
    # With MAX_BATCH=1 such a model was refused: it left 20 GB for conversations, and the shortest took 0.1.
    with running(tiny_llama, context_length=context_length, max_batch=1) as engine:
        answer(engine, [1, 2, 3])
        assert engine.context_length == context_length


def test_what_is_free_is_measured_after_the_model_has_run_for_the_first_time(tiny_llama, monkeypatch):
    steps = []
    forward = tiny_llama.forward
    monkeypatch.setattr(tiny_llama, "forward", lambda *args, **kwargs: steps.append(1) or forward(*args, **kwargs))

    def free_bytes():
        assert steps
        return {CPU: 2**24}

    build_runner(tiny_llama, free_bytes, context_length=64)


@pytest.mark.parametrize("kv_cache", ["none", "int8"])
def test_a_pool_on_a_cpu_takes_memory_once_conversations_fill_it(tiny_llama, kv_cache):
    before = psutil.Process().memory_info().rss
    pool = make_pool(kv_cache, tiny_llama, lambda: {CPU: 2**28}, 4096, max_batch=10_000)
    assert pool.bytes > 2**28 * 0.9
    assert psutil.Process().memory_info().rss - before < pool.bytes / 2
    assert all(not kept[-1].any() for kept in pool.tensors)


@pytest.mark.parametrize("kv_cache", ["none", "int8"])
def test_keys_and_values_are_read_as_they_were_written(tiny_llama, kv_cache):
    pool = make_pool(kv_cache, tiny_llama, lambda: {CPU: 2**24}, 1000, max_batch=1)
    config, index = tiny_llama.config, torch.tensor([70, 71, 200, 3, 64])
    shape = 1, config.num_key_value_heads, len(index), config.head_dim
    key, value = torch.randn(2, *shape, dtype=pool.dtype)
    pool.write(1, key, value, index)
    found = pool.read(1, torch.arange(4), 250)
    for read, written in zip(found, pool.as_kept(key, value), strict=True):
        assert torch.equal(read[:, :, index], written.to(read.dtype))
