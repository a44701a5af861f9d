"""Attention over the blocks of a KV pool, in Triton: one new token per request, and chunks of prompts.

Both are custom operators, so that torch.compile takes them as they are. They need compute capability 8.0 and bfloat16;
elsewhere PyTorch's attention does the same work (engine/paged_attention.py). Sizes of blocks and tiles are read from
the tensors' shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# ---- Online softmax: one block of scores after another ----


@triton.jit
def _accumulate(highest, total, mixed, scores, v):
    """The highest score, the total weight and the weighted sum of values, with these scores and values added."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    fade, p = tl.exp(highest - higher), tl.exp(scores - higher[:, None])
    return higher, total * fade + tl.sum(p, 1), mixed * fade[:, None] + tl.dot(p.to(v.dtype), v)


@triton.jit
def _store(highest, total, mixed, lane, mine, split, output, partial, weights, dims, SPLITS: tl.constexpr):
    """The result, or what one in SPLITS programs has of it."""
    HEAD_DIM: tl.constexpr = dims.shape[0]
    if SPLITS == 1:
        result = (mixed / total[:, None]).to(output.dtype.element_ty)
        tl.store(output + lane[:, None] * HEAD_DIM + dims[None, :], result, mask=mine[:, None])
    else:
        place = lane * SPLITS + split
        tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], mixed, mask=mine[:, None])
        tl.store(weights + place * 2, highest, mask=mine)
        tl.store(weights + place * 2 + 1, total, mask=mine)


# ---- Attention of one new token per request, over its blocks ----


@triton.jit
def _attend_kernel(
    query,
    key,
    value,
    keys,
    values,
    slots,
    positions,
    table,
    partial,
    weights,
    output,
    scale,
    key_stride,
    value_stride,
    table_width,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,  # heads that share keys, padded to what a tensor core takes
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One request, one head of keys, one in SPLITS of its blocks. Writes the new key and value on the way."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + request)
    position = tl.load(positions + slot).to(tl.int32)
    heads: tl.constexpr = HEADS // KV_HEADS
    group, dims, tokens = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK)
    mine = group < heads
    lane = request * HEADS + head * heads + group
    q = tl.load(query + lane[:, None] * HEAD_DIM + dims[None, :], mask=mine[:, None], other=0.0)
    highest = tl.full((GROUP,), -1e30, tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    mixed = tl.zeros((GROUP, HEAD_DIM), tl.float32)
    inside = (tokens[:, None] * KV_HEADS + head) * HEAD_DIM + dims[None, :]
    full = position // BLOCK  # blocks before the one that the new token goes to
    for index in tl.range(split, full, SPLITS, num_stages=3):
        block = tl.load(table + slot * table_width + index).to(tl.int64) * (BLOCK * KV_HEADS * HEAD_DIM)
        k = tl.load(keys + block + inside)
        v = tl.load(values + block + inside)
        scores = tl.dot(q, tl.trans(k)) * scale
        highest, total, mixed = _accumulate(highest, total, mixed, scores, v)
    if split == full % SPLITS:
        block = tl.load(table + slot * table_width + full).to(tl.int64) * (BLOCK * KV_HEADS * HEAD_DIM)
        before, new = tokens < position % BLOCK, tokens == position % BLOCK
        k = tl.load(keys + block + inside, mask=before[:, None], other=0.0)
        v = tl.load(values + block + inside, mask=before[:, None], other=0.0)
        new_k = tl.load(key + request * key_stride + head * HEAD_DIM + dims)
        new_v = tl.load(value + request * value_stride + head * HEAD_DIM + dims)
        k = tl.where(new[:, None], new_k[None, :], k)
        v = tl.where(new[:, None], new_v[None, :], v)
        tl.store(keys + block + inside, k, mask=new[:, None])
        tl.store(values + block + inside, v, mask=new[:, None])
        scores = tl.where((before | new)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        highest, total, mixed = _accumulate(highest, total, mixed, scores, v)
    _store(highest, total, mixed, lane, mine, split, output, partial, weights, dims, SPLITS)


@triton.jit
def _combine_kernel(partial, weights, output, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    lane, splits, dims = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    highest = tl.load(weights + (lane * SPLITS + splits) * 2)
    total = tl.load(weights + (lane * SPLITS + splits) * 2 + 1)
    weight = tl.exp(highest - tl.max(highest, 0))
    mixed = tl.load(partial + (lane * SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :])
    result = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(output + lane * HEAD_DIM + dims, result.to(output.dtype.element_ty))


@torch.library.custom_op("llama2_chat::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
) -> Tensor:
    """Appends one token to each request's blocks and attends to all of them.

    query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, head_dim]; slots: int64 [N]; positions: int64 [R] of
    the new token; table: int32 [R, P], the blocks of each slot. Returns [1, N, heads, head_dim].
    """
    query, key, value = query[0].transpose(0, 1).contiguous(), _tokens(key), _tokens(value)
    N, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    splits = _splits(N * kv_heads)
    output, partial, weights = _results(query, splits)
    with torch.cuda.device_of(query):  # Triton launches on the current one
        _attend_kernel[N, kv_heads, splits](
            query,
            key,
            value,
            keys,
            values,
            slots,
            positions,
            table,
            partial,
            weights,
            output,
            scale,
            key.stride(0),
            value.stride(0),
            table.shape[1],
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
            BLOCK=keys.shape[1],
            SPLITS=splits,
            num_warps=2,
        )
        if splits > 1:
            _combine_kernel[(N * heads,)](partial, weights, output, HEAD_DIM=head_dim, SPLITS=splits, num_warps=1)
    return output[None]


def _tokens(states: Tensor) -> Tensor:
    """[1, heads, T, head_dim] as [T, heads, head_dim], of which each token lies in one piece."""
    states = states[0].transpose(0, 1)
    return states if states.stride()[1:] == (states.shape[2], 1) else states.contiguous()


def _splits(programs: int) -> int:
    """Among how many the blocks of each are shared, so that there are enough programs to fill a large GPU."""
    return min(8, triton.next_power_of_2(max(1, 320 // programs)))


def _results(query: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places for the whole result and for each split's: its mean of values, and its highest score and total weight."""
    T, heads, head_dim = query.shape
    partial = query.new_empty(T, heads, splits, head_dim, dtype=torch.float32)
    return torch.empty_like(query), partial, query.new_empty(T, heads, splits, 2, dtype=torch.float32)


@decode_attention.register_fake
def _(query, key, value, keys, values, slots, positions, table, scale):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


# ---- Attention of chunks of prompts, over the blocks of their requests ----


@triton.jit
def _write_kernel(
    key, value, keys, values, kv_index, key_stride, value_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """One token's key and value, of SIZE numbers each, to its cell."""
    token, at = tl.program_id(0), tl.arange(0, WIDTH)
    cell = tl.load(kv_index + token).to(tl.int64) * SIZE
    tl.store(keys + cell + at, tl.load(key + token * key_stride + at, mask=at < SIZE), mask=at < SIZE)
    tl.store(values + cell + at, tl.load(value + token * value_stride + at, mask=at < SIZE), mask=at < SIZE)


@triton.jit
def _prefill_kernel(
    query,
    keys,
    values,
    slots,
    starts,
    counts,
    table,
    partial,
    weights,
    output,
    scale,
    table_width,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile, one head, one in SPLITS of its blocks. Token i of the tile stands at its start + i and attends to all
    up to itself."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, start = tl.load(slots + tile), tl.load(starts + tile).to(tl.int32)
    end = start + tl.load(counts + tile).to(tl.int32)
    dims, tokens, queries = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK), tl.arange(0, TILE)
    lane = (tile * TILE + queries) * HEADS + head
    q = tl.load(query + lane[:, None] * HEAD_DIM + dims[None, :])
    highest = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    mixed = tl.zeros((TILE, HEAD_DIM), tl.float32)
    inside = (tokens[:, None] * KV_HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM + dims[None, :]
    for index in tl.range(split, (start + TILE - 1) // BLOCK + 1, SPLITS, num_stages=2):
        block = tl.load(table + slot * table_width + index).to(tl.int64) * (BLOCK * KV_HEADS * HEAD_DIM)
        k = tl.load(keys + block + inside)
        # 0 * NaN is NaN: values behind the end are masked too, whatever an earlier request left there.
        v = tl.load(values + block + inside, mask=(index * BLOCK + tokens < end)[:, None], other=0.0)
        seen = (index * BLOCK + tokens)[None, :] <= (start + queries)[:, None]
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        highest, total, mixed = _accumulate(highest, total, mixed, scores, v)
    _store(highest, total, mixed, lane, queries < TILE, split, output, partial, weights, dims, SPLITS)


@torch.library.custom_op("llama2_chat::prefill_attention", mutates_args=("keys", "values"))
def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    kv_index: Tensor,
    slots: Tensor,
    starts: Tensor,
    counts: Tensor,
    table: Tensor,
    scale: float,
) -> Tensor:
    """Writes the keys and values of T tokens and attends to their requests so far, with nothing asked of the host.

    query: [1, heads, T, head_dim]; key, value: [1, kv_heads, T, head_dim]; kv_index: int64 [T], block * block
    size + offset of each token; slots, starts and counts, int64 [T / tile size]: whose the tile is, at which position
    it begins and how many of its tokens count; table: int32 [R, P], the blocks of each slot, one more than the longest
    request has. Returns [1, T, heads, head_dim].
    """
    query, key, value = query[0].transpose(0, 1).contiguous(), _tokens(key), _tokens(value)
    T, heads, head_dim = query.shape
    size = key.shape[1] * head_dim
    tile = T // len(slots)
    splits = _splits(T // tile * heads)
    output, partial, weights = _results(query, splits)
    with torch.cuda.device_of(query):
        places = keys, values, kv_index, key.stride(0), value.stride(0)
        _write_kernel[(T,)](key, value, *places, SIZE=size, WIDTH=triton.next_power_of_2(size))
        _prefill_kernel[T // tile, heads, splits](
            query,
            keys,
            values,
            slots,
            starts,
            counts,
            table,
            partial,
            weights,
            output,
            scale,
            table.shape[1],
            HEADS=heads,
            KV_HEADS=key.shape[1],
            HEAD_DIM=head_dim,
            BLOCK=keys.shape[1],
            TILE=tile,
            SPLITS=splits,
            num_warps=4,
        )
        if splits > 1:
            _combine_kernel[(T * heads,)](partial, weights, output, HEAD_DIM=head_dim, SPLITS=splits, num_warps=1)
    return output[None]


@prefill_attention.register_fake
def _(query, key, value, keys, values, kv_index, slots, starts, counts, table, scale):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
