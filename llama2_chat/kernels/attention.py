"""Attention of the newest tokens of answers over the blocks of a KV pool, in Triton.

What is here and in prefill_attention.py are custom operators, so that torch.compile takes them as they are: they turn
queries and keys by their positions, write keys and values, and attend. They need compute capability 8.0 and bfloat16;
elsewhere PyTorch's attention does the same work (engine/paged_attention.py). Sizes of blocks and tiles are read from
the tensors' shapes. Over keys and values in 8 bits scores are multiplied by the keys' scales, and the weights of values
by theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2_chat.kernels.kv_cells import KEPT, write_cells

TILE_SIZE = 16  # tokens that decoding over 8 bits goes through at once

# ---- Online softmax: one block of scores after another ----


@triton.jit
def accumulate(highest, total, mixed, scores, v, v_scales):
    """The highest score, the total weight and the weighted sum of values, with these scores and values added."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    fade, p = tl.exp(highest - higher), tl.exp(scores - higher[:, None])
    total = total * fade + tl.sum(p, 1)
    if v_scales is not None:
        p *= v_scales[None, :]
    return higher, total, mixed * fade[:, None] + tl.dot(p.to(v.dtype), v)


@triton.jit
def store_result(highest, total, mixed, lane, mine, split, output, partial, weights, dims, SPLITS: tl.constexpr):
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


# ---- Attention of the newest tokens of requests, each over its blocks ----


@triton.jit
def _attend_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    positions,
    table,
    partial,
    weights,
    output,
    scale,
    table_width,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,  # heads that share keys, padded to what a tensor core takes
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One token, one head of keys, one in SPLITS of its request's blocks."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)
    position = tl.load(positions + row).to(tl.int32)
    heads: tl.constexpr = HEADS // KV_HEADS
    group, dims, tokens = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK)
    mine = group < heads
    lane = row * HEADS + head * heads + group
    q = tl.load(query + lane[:, None] * HEAD_DIM + dims[None, :], mask=mine[:, None], other=0.0)
    highest = tl.full((GROUP,), -1e30, tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    mixed = tl.zeros((GROUP, HEAD_DIM), tl.float32)
    inside = (tokens[:, None] * KV_HEADS + head) * HEAD_DIM + dims[None, :]
    full = position // BLOCK  # blocks before the one that the token is in
    for index in tl.range(split, full, SPLITS, num_stages=3):
        block = tl.load(table + slot * table_width + index).to(tl.int64)
        k = tl.load(keys + block * (BLOCK * KV_HEADS * HEAD_DIM) + inside).to(q.dtype)
        v = tl.load(values + block * (BLOCK * KV_HEADS * HEAD_DIM) + inside).to(q.dtype)
        scores = tl.dot(q, tl.trans(k)) * scale
        if key_scales is not None:
            scaled = (block * KV_HEADS + head) * BLOCK + tokens
            scores *= tl.load(key_scales + scaled).to(tl.float32)[None, :]
            v_scales = tl.load(value_scales + scaled).to(tl.float32)
            highest, total, mixed = accumulate(highest, total, mixed, scores, v, v_scales)
        else:
            highest, total, mixed = accumulate(highest, total, mixed, scores, v, None)
    if split == full % SPLITS:
        block = tl.load(table + slot * table_width + full).to(tl.int64)
        seen = tokens <= position % BLOCK
        k = tl.load(keys + block * (BLOCK * KV_HEADS * HEAD_DIM) + inside, mask=seen[:, None], other=0.0).to(q.dtype)
        v = tl.load(values + block * (BLOCK * KV_HEADS * HEAD_DIM) + inside, mask=seen[:, None], other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k)) * scale
        if key_scales is not None:
            scaled = (block * KV_HEADS + head) * BLOCK + tokens
            scores *= tl.load(key_scales + scaled, mask=seen, other=0.0).to(tl.float32)[None, :]
            v_scales = tl.load(value_scales + scaled, mask=seen, other=0.0).to(tl.float32)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            highest, total, mixed = accumulate(highest, total, mixed, scores, v, v_scales)
        else:
            scores = tl.where(seen[None, :], scores, float("-inf"))
            highest, total, mixed = accumulate(highest, total, mixed, scores, v, None)
    store_result(highest, total, mixed, lane, mine, split, output, partial, weights, dims, SPLITS)


@triton.jit
def _attend_codes_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    positions,
    table,
    partial,
    weights,
    output,
    scale,
    table_width,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,  # tokens; divides BLOCK
    SPLITS: tl.constexpr,
):
    """As _attend_kernel, over keys and values in 8 bits of which each head has its own. To give codes to a tensor core
    as bfloat16 takes longer than to multiply them, and fifteen of its sixteen rows would be nothing.

    TILE rows take every TILE-th token each, with a softmax of their own; they meet at the end.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SIZE: tl.constexpr = BLOCK * KV_HEADS * HEAD_DIM
    TILES: tl.constexpr = BLOCK // TILE
    slot = tl.load(slots + row)
    position = tl.load(positions + row).to(tl.int32)
    dims, rows = tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    lane = row * KV_HEADS + head
    q = tl.load(query + lane * HEAD_DIM + dims).to(tl.float32) * scale
    highest = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    mixed = tl.zeros((TILE, HEAD_DIM), tl.float32)
    inside = (rows[:, None] * KV_HEADS + head) * HEAD_DIM + dims[None, :]
    full = position // TILE  # tiles before the one that the token is in
    for index in tl.range(split, full, SPLITS, num_stages=3):
        block = tl.load(table + slot * table_width + index // TILES).to(tl.int64)
        first = index % TILES * TILE
        at = block * SIZE + first * (KV_HEADS * HEAD_DIM) + inside
        k = tl.load(keys + at).to(tl.float32)
        v = tl.load(values + at).to(tl.float32)
        scaled = (block * KV_HEADS + head) * BLOCK + first + rows
        scores = tl.sum(k * q[None, :], 1) * tl.load(key_scales + scaled).to(tl.float32)
        v_scales = tl.load(value_scales + scaled).to(tl.float32)
        highest, total, mixed = _accumulate_rows(highest, total, mixed, scores, v, v_scales)
    if split == full % SPLITS:
        block = tl.load(table + slot * table_width + full // TILES).to(tl.int64)
        first = full % TILES * TILE
        at = block * SIZE + first * (KV_HEADS * HEAD_DIM) + inside
        seen = rows <= position % TILE
        k = tl.load(keys + at, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=seen[:, None], other=0.0).to(tl.float32)
        scaled = (block * KV_HEADS + head) * BLOCK + first + rows
        k_scales = tl.load(key_scales + scaled, mask=seen, other=0.0).to(tl.float32)
        v_scales = tl.load(value_scales + scaled, mask=seen, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(k * q[None, :], 1) * k_scales, float("-inf"))
        highest, total, mixed = _accumulate_rows(highest, total, mixed, scores, v, v_scales)
    most = tl.max(highest, 0)
    fade = tl.exp(highest - most)
    total, mixed = tl.sum(total * fade, 0), tl.sum(mixed * fade[:, None], 0)
    if SPLITS == 1:
        tl.store(output + lane * HEAD_DIM + dims, (mixed / total).to(output.dtype.element_ty))
    else:
        place = lane * SPLITS + split
        tl.store(partial + place * HEAD_DIM + dims, mixed)
        tl.store(weights + place * 2, most)
        tl.store(weights + place * 2 + 1, total)


@triton.jit
def _accumulate_rows(highest, total, mixed, scores, v, v_scales):
    """accumulate() of each row by itself: of a token each the score, [rows], and the codes and scale of its values."""
    higher = tl.maximum(highest, scores)
    fade, p = tl.exp(highest - higher), tl.exp(scores - higher)
    return higher, total * fade + p, mixed * fade[:, None] + (p * v_scales)[:, None] * v


@triton.jit
def combine_kernel(partial, weights, output, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    lane, splits, dims = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    highest = tl.load(weights + (lane * SPLITS + splits) * 2)
    total = tl.load(weights + (lane * SPLITS + splits) * 2 + 1)
    weight = tl.exp(highest - tl.max(highest, 0))
    mixed = tl.load(partial + (lane * SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :])
    result = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(output + lane * HEAD_DIM + dims, result.to(output.dtype.element_ty))


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
    *kept: Tensor,
) -> Tensor:
    """Writes the keys and values of N tokens, and lets each attend to its request up to itself. Several tokens may be
    of one request.

    query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, head_dim]; cos, sin: [1, N, head_dim], None if query
    and key are turned already; kv_index, slots, positions: int64 [N], block * block size + offset, whose the token is
    and where it stands; table: int32 [R, P], the blocks of each slot; kept: the keys and values of a layer and, in 8
    bits, their scales, as a KV pool has them. Returns [1, N, heads, head_dim].
    """
    attend = _decode_attention if len(kept) == 2 else _decode_attention_in_8_bits
    return attend(query, key, value, cos, sin, kv_index, slots, positions, table, scale, *kept)


@torch.library.custom_op("llama2_chat::decode_attention", mutates_args=("keys", "values"))
def _decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    return _decode(query, key, value, cos, sin, kv_index, slots, positions, table, scale, keys, values, None, None)


@torch.library.custom_op("llama2_chat::decode_attention_in_8_bits", mutates_args=KEPT)
def _decode_attention_in_8_bits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
) -> Tensor:
    kept = keys, values, key_scales, value_scales
    return _decode(query, key, value, cos, sin, kv_index, slots, positions, table, scale, *kept)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    (heads, N, head_dim), kv_heads = query.shape[1:], key.shape[1]
    splits = splits_among(N * kv_heads)
    with torch.cuda.device_of(query):  # Triton launches on the current one
        query = write_cells(query, key, value, cos, sin, kv_index, keys, values, key_scales, value_scales)
        output, partial, weights = new_results(query, splits)
        kept = keys, values, key_scales, value_scales
        tensors = query, *kept, slots, positions, table, partial, weights, output
        shape = {"KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "BLOCK": keys.shape[1], "SPLITS": splits, "num_warps": 2}
        if key_scales is not None and heads == kv_heads:
            _attend_codes_kernel[N, kv_heads, splits](*tensors, scale, table.shape[1], TILE=TILE_SIZE, **shape)
        else:
            group = max(16, triton.next_power_of_2(heads // kv_heads))
            _attend_kernel[N, kv_heads, splits](*tensors, scale, table.shape[1], HEADS=heads, GROUP=group, **shape)
        if splits > 1:
            combine_kernel[(N * heads,)](partial, weights, output, HEAD_DIM=head_dim, SPLITS=splits, num_warps=1)
    return output[None]


def splits_among(programs: int) -> int:
    """Among how many the blocks of each are shared, so that there are enough programs to fill a large GPU."""
    return min(8, triton.next_power_of_2(max(1, 320 // programs)))


def new_results(query: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places for the whole result and for each split's: its mean of values, and its highest score and total weight."""
    T, heads, head_dim = query.shape
    partial = query.new_empty(T, heads, splits, head_dim, dtype=torch.float32)
    return torch.empty_like(query), partial, query.new_empty(T, heads, splits, 2, dtype=torch.float32)


@_decode_attention.register_fake
@_decode_attention_in_8_bits.register_fake
def _(query, *_):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
