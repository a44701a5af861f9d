"""Attention of chunks of prompts over the blocks of their requests in a KV pool, in Triton: as attention.py has it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2_chat.kernels.attention import accumulate, combine_kernel, new_results, splits_among, store_result
from llama2_chat.kernels.kv_cells import KEPT, write_cells


@triton.jit
def _prefill_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
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
    kv_head = head // (HEADS // KV_HEADS)
    SIZE: tl.constexpr = BLOCK * KV_HEADS * HEAD_DIM
    inside = (tokens[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
    for index in tl.range(split, (start + TILE - 1) // BLOCK + 1, SPLITS, num_stages=2):
        block = tl.load(table + slot * table_width + index).to(tl.int64)
        # 0 * NaN is NaN: values behind the end are masked too, whatever an earlier request left there.
        inhabited = index * BLOCK + tokens < end
        k = tl.load(keys + block * SIZE + inside).to(q.dtype)
        v = tl.load(values + block * SIZE + inside, mask=inhabited[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        if key_scales is not None:
            scaled = (block * KV_HEADS + kv_head) * BLOCK + tokens
            scores *= tl.load(key_scales + scaled).to(tl.float32)[None, :]
        seen = (index * BLOCK + tokens)[None, :] <= (start + queries)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        if key_scales is not None:
            v_scales = tl.load(value_scales + scaled, mask=inhabited, other=0.0).to(tl.float32)
            highest, total, mixed = accumulate(highest, total, mixed, scores, v.to(q.dtype), v_scales)
        else:
            highest, total, mixed = accumulate(highest, total, mixed, scores, v, None)
    store_result(highest, total, mixed, lane, queries < TILE, split, output, partial, weights, dims, SPLITS)


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    slots: Tensor,
    starts: Tensor,
    counts: Tensor,
    table: Tensor,
    scale: float,
    *kept: Tensor,
) -> Tensor:
    """Writes the keys and values of T tokens and attends to their requests so far, with nothing asked of the host.

    query, key, value, cos, sin, kv_index and kept: as decode_attention() takes them; slots, starts and counts, int64
    [T / tile size]: whose the tile is, at which position it begins and how many of its tokens count; table: int32 [R,
    P], the blocks of each slot, one more than the longest request has. Returns [1, T, heads, head_dim].
    """
    attend = _prefill_attention if len(kept) == 2 else _prefill_attention_in_8_bits
    return attend(query, key, value, cos, sin, kv_index, slots, starts, counts, table, scale, *kept)


@torch.library.custom_op("llama2_chat::prefill_attention", mutates_args=("keys", "values"))
def _prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    slots: Tensor,
    starts: Tensor,
    counts: Tensor,
    table: Tensor,
    scale: float,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    return _prefill(
        query, key, value, cos, sin, kv_index, slots, starts, counts, table, scale, keys, values, None, None
    )


@torch.library.custom_op("llama2_chat::prefill_attention_in_8_bits", mutates_args=KEPT)
def _prefill_attention_in_8_bits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    slots: Tensor,
    starts: Tensor,
    counts: Tensor,
    table: Tensor,
    scale: float,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
) -> Tensor:
    kept = keys, values, key_scales, value_scales
    return _prefill(query, key, value, cos, sin, kv_index, slots, starts, counts, table, scale, *kept)


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    slots: Tensor,
    starts: Tensor,
    counts: Tensor,
    table: Tensor,
    scale: float,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    (heads, T, head_dim), kv_heads = query.shape[1:], key.shape[1]
    tile = T // len(slots)
    splits = splits_among(T // tile * heads)
    with torch.cuda.device_of(query):
        query = write_cells(query, key, value, cos, sin, kv_index, keys, values, key_scales, value_scales)
        output, partial, weights = new_results(query, splits)
        _prefill_kernel[T // tile, heads, splits](
            query,
            keys,
            values,
            key_scales,
            value_scales,
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
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK=keys.shape[1],
            TILE=tile,
            SPLITS=splits,
            num_warps=4,
        )
        if splits > 1:
            combine_kernel[(T * heads,)](partial, weights, output, HEAD_DIM=head_dim, SPLITS=splits, num_warps=1)
    return output[None]


@_prefill_attention.register_fake
@_prefill_attention_in_8_bits.register_fake
def _(query, *_):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
