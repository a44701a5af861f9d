"""The compiled attention of a Llama on the CPU, against PyTorch's, and against itself in other chunks and company."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llama2_chat.engine.cpu_attention import CpuStep
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.kernels.block_attention import BLOCK, attend_in_blocks

SHAPES = [(9, 3, 64), (4, 4, 32), (8, 1, 10), (2, 1, 128), (3, 1, 130)]  # heads, kv_heads, head_dim


class Memory:
    """Blocks for the keys and values of some requests, which lie backwards in them."""

    def __init__(self, _heads, kv_heads, head_dim, requests=3, blocks=4):
        self.scale = head_dim**-0.5
        shapes = (kv_heads, head_dim, BLOCK), (kv_heads, BLOCK, head_dim)
        self.kept = [np.full((1 + requests * blocks, *shape), 0x3F80, np.uint16) for shape in shapes]  # bfloat16's 1
        self.tables = np.arange(requests * blocks, 0, -1).reshape(requests, blocks)
        self.requests = [SimpleNamespace(blocks=SimpleNamespace(blocks=table.tolist())) for table in self.tables]

    def attend(self, *chunks):
        """chunks: of each its request, its start and its states; returns what comes of each."""
        states = np.concatenate([states for *_, states in chunks])
        places = CpuStep(self, [Chunk(self.requests[n], at, at + len(states)) for n, at, states in chunks]).places
        output = attend_in_blocks(states, *places, *self.kept, self.scale)
        return np.split(output, np.cumsum([len(states) for *_, states in chunks])[:-1])


def random_states(count, heads, kv_heads, head_dim, seed=0):
    states = np.random.default_rng(seed).standard_normal((count, heads + 2 * kv_heads, head_dim), dtype=np.float32)
    states[:, :heads] *= 4  # so that some tokens are looked at more than others
    return states


@pytest.mark.parametrize("shape", SHAPES)
def test_each_token_attends_to_those_before_it(shape):
    heads, kv_heads, _ = shape
    memory, states = Memory(*shape), random_states(200, *shape)
    (found,) = memory.attend((1, 0, states))
    query, key, value = torch.from_numpy(states).transpose(0, 1).split([heads, kv_heads, kv_heads])
    key, value = key.bfloat16().float(), value.bfloat16().float()
    expected = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(found, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_gets_the_same_bits_in_any_chunks_and_any_company(shape, threads, monkeypatch):
    states = random_states(200, *shape)
    (whole,) = Memory(*shape).attend((0, 0, states))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for size in (1, 7, 64, 150):
        memory, found = Memory(*shape), []
        others = {request: random_states(130, *shape, seed=request) for request in (1, 2)}
        for start in range(0, len(states), size):
            # The others read their prompts in one step, then answer a token at a time.
            company = [
                (request, 0, other[:120]) if start == 0 else (request, 119 + request, other[120:121])
                for request, other in others.items()
            ]
            found.append(memory.attend(company[0], (0, start, states[start : start + size]), company[1])[1])
        assert np.concatenate(found).tobytes() == whole.tobytes()


def test_keys_and_values_are_rounded_as_pytorch_rounds_them():
    shape = 1, 1, 64
    states = random_states(100, *shape)
    states[5, 1:, :4] = np.float32([1.00390625, 1.01171875, np.nan, np.inf])  # two halfway, to the even one
    memory = Memory(*shape)
    memory.attend((0, 0, states))
    keys, values = (kept[memory.tables[0, :2], 0] for kept in memory.kept)
    written = torch.from_numpy(states[:, 1:].copy()).bfloat16().transpose(0, 1)
    for kept, expected in ((keys.transpose(0, 2, 1), written[0]), (values, written[1])):
        kept = torch.from_numpy(kept.reshape(128, 64)[:100].copy()).view(torch.bfloat16)
        assert torch.equal(kept.nan_to_num(7), expected.nan_to_num(7))


def test_what_is_not_finite_reaches_the_tokens_behind_it_and_no_others():
    shape = 2, 1, 32
    states, others = random_states(10, *shape), random_states(10, *shape, seed=1)
    states[4, 2] = np.nan  # the key of one token
    first, second = Memory(*shape).attend((0, 0, states), (1, 0, others))
    assert np.isfinite(first[:4]).all()
    assert np.isnan(first[4:]).all()
    assert np.isfinite(second).all()
