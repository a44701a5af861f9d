"""Attention over blocks of keys and values as they are and in 8 bits, in Triton's interpreter, beside the obvious way.

The interpreter rounds to bfloat16 and to fp8 otherwise than a GPU does, so what counts is what the kernels wrote.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or by itself")

SCRIPT = r"""
import itertools, sys, torch
sys.path.insert(0, {root!r})
from llama2_chat.kernels.attention import decode_attention
from llama2_chat.kernels.prefill_attention import prefill_attention
from llama2_chat.kernels.kv_codes import CODES, SCALES

BLOCK = TILE = 16
LENGTHS = [1, 16, 33]  # of requests, before the token that is decoded
SHAPES = [(5, 5, 32), (4, 2, 64)]  # heads, heads of keys, size of a head

def empty(kv_cache, blocks, kv_heads, head_dim):
    # What nobody has written is not a number: no part of it may reach anybody.
    codes = [torch.full((blocks, BLOCK, kv_heads, head_dim), 1.0).to(CODES.get(kv_cache, torch.float32)) for _ in "kv"]
    scales = [torch.full((blocks, kv_heads, BLOCK), torch.nan, dtype=SCALES) for _ in "kv"]
    return codes + scales if kv_cache in CODES else codes

def attend(query, keys, values, scale):
    # query: [T, heads, head_dim], of the last tokens; keys, values: [S, kv_heads, head_dim]
    T, S, group = len(query), len(keys), query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(group, 1) for states in (keys, values))
    scores = torch.einsum("thd,shd->hts", query, keys) * scale
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)

def check(kv_cache, heads, kv_heads, head_dim, lengths):
    keys, values = ([torch.randn(n + 1, kv_heads, head_dim) for n in lengths] for _ in "kv")
    wide = 4
    table = torch.zeros(len(lengths) + 1, wide, dtype=torch.int32)
    table[:-1, :-1] = 1 + torch.randperm(len(lengths) * (wide - 1)).view(len(lengths), -1)
    kept = empty(kv_cache, len(lengths) * wide, kv_heads, head_dim)

    def stored(which, request, length):
        at = torch.arange(length)
        block, offset = table[request, at // BLOCK].long(), at % BLOCK
        found = kept[which].float()[block, offset]
        if kv_cache in CODES:
            found *= kept[2 + which][block, :, offset].float()[..., None]
        wanted = (keys, values)[which][request][:length]
        largest = wanted.abs().amax(-1, keepdim=True)
        allowed = {{"none": 0 * wanted, "int8": 1.1 / 127 * largest, "fp8": wanted.abs() / 2 + largest / 448}}[kv_cache]
        assert ((found - wanted).abs() <= allowed).all()
        return found

    tiles = [(i, start, min(TILE, n - start)) for i, n in enumerate(lengths) for start in range(0, n, TILE)]
    slots, starts, counts = map(torch.tensor, zip(*tiles))
    T = TILE * len(tiles)
    query = torch.randn(1, heads, T, head_dim)
    key, value = torch.full((2, 1, kv_heads, T, head_dim), torch.nan)
    kv_index = torch.arange(T) % TILE  # padding goes to block 0
    for tile, (i, start, count) in enumerate(tiles):
        rows = slice(tile * TILE, tile * TILE + count)
        key[0, :, rows], value[0, :, rows] = (x[i][start : start + count].transpose(0, 1) for x in (keys, values))
        kv_index[rows] += table[i, start // BLOCK] * BLOCK
    found = prefill_attention(query, key, value, None, None, kv_index, slots, starts, counts, table, 0.3, *kept)[0]
    for tile, (i, start, count) in enumerate(tiles):
        rows = slice(tile * TILE, tile * TILE + count)
        right = attend(query[0, :, rows].transpose(0, 1), *(stored(w, i, start + count) for w in (0, 1)), 0.3)
        torch.testing.assert_close(found[rows], right, atol=1e-4, rtol=1e-4)
    query = torch.randn(1, heads, len(lengths), head_dim)
    key, value = (torch.stack([x[-1] for x in states], 1)[None] for states in (keys, values))
    everyone = torch.arange(len(lengths))
    positions = torch.tensor(lengths)
    kv_index = table[everyone, positions // BLOCK] * BLOCK + positions % BLOCK
    found = decode_attention(query, key, value, None, None, kv_index, everyone, positions, table, 0.3, *kept)[0]
    for i, n in enumerate(lengths):
        right = attend(query[0, :, i][None], *(stored(which, i, n + 1) for which in (0, 1)), 0.3)
        torch.testing.assert_close(found[i], right[0], atol=1e-4, rtol=1e-4)

torch.manual_seed(0)
torch.inference_mode().__enter__()
for kv_cache, shape in itertools.product(("none", *CODES), SHAPES):
    check(kv_cache, *shape, LENGTHS)
check("int8", 40, 40, 128, [3])  # Llama 2 13B

# A number that is none is seen in the scale of its token and head.
for kv_cache in CODES:
    kept = empty(kv_cache, 2, 2, 16)
    key = value = torch.randn(1, 2, 1, 16)
    value[0, 1, 0, 3] = torch.nan
    where = torch.tensor([19]), torch.tensor([0]), torch.tensor([3]), torch.tensor([[1]], dtype=torch.int32)
    decode_attention(torch.randn(1, 2, 1, 16), key, value, None, None, *where, 0.3, *kept)
    assert kept[3][1, :, 3].isfinite().tolist() == [True, False]
print("equal")
"""


@pytest.mark.slow
def test_attention_over_blocks_is_that_over_what_they_hold():
    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=env)
    assert run.stdout == "equal\n", run.stderr
