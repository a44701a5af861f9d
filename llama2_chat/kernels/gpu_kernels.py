"""GPU kernels, in Triton, for the two places where decoding waits for memory: attention over pages, and NF4 weights.

Both are custom operators, so that torch.compile takes them as they are. They need compute capability 8.0 and bfloat16;
elsewhere, and for many tokens at once, PyTorch's attention and bitsandbytes' products do the same work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import get_4bit_type
from torch import Tensor
from torch.nn import functional as F

from llama2_chat.engine.kv_cache import BLOCK_TOKENS, PAGE_TOKENS

# ---- Softmax as it goes along ----


@triton.jit
def _take_in(highest, total, mixed, scores, v):
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


# ---- Attention of one new token per request, over its pages ----


@triton.jit
def _attend_kernel(
    query,
    key,
    value,
    keys,
    values,
    rows,
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
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One request, one head of keys, one in SPLITS of its pages. Writes the new key and value on the way."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + request)
    position = tl.load(positions + row).to(tl.int32)
    heads: tl.constexpr = HEADS // KV_HEADS
    group, dims, tokens = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM), tl.arange(0, PAGE)
    mine = group < heads
    lane = request * HEADS + head * heads + group
    q = tl.load(query + lane[:, None] * HEAD_DIM + dims[None, :], mask=mine[:, None], other=0.0)
    highest = tl.full((GROUP,), -1e30, tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    mixed = tl.zeros((GROUP, HEAD_DIM), tl.float32)
    inside = (tokens[:, None] * KV_HEADS + head) * HEAD_DIM + dims[None, :]
    full = position // PAGE  # pages before the one that the new token goes to
    for index in tl.range(split, full, SPLITS, num_stages=3):
        page = tl.load(table + row * table_width + index).to(tl.int64) * (PAGE * KV_HEADS * HEAD_DIM)
        k = tl.load(keys + page + inside)
        v = tl.load(values + page + inside)
        scores = tl.dot(q, tl.trans(k)) * scale
        highest, total, mixed = _take_in(highest, total, mixed, scores, v)
    if split == full % SPLITS:
        page = tl.load(table + row * table_width + full).to(tl.int64) * (PAGE * KV_HEADS * HEAD_DIM)
        before, new = tokens < position % PAGE, tokens == position % PAGE
        k = tl.load(keys + page + inside, mask=before[:, None], other=0.0)
        v = tl.load(values + page + inside, mask=before[:, None], other=0.0)
        new_k = tl.load(key + request * key_stride + head * HEAD_DIM + dims)
        new_v = tl.load(value + request * value_stride + head * HEAD_DIM + dims)
        k = tl.where(new[:, None], new_k[None, :], k)
        v = tl.where(new[:, None], new_v[None, :], v)
        tl.store(keys + page + inside, k, mask=new[:, None])
        tl.store(values + page + inside, v, mask=new[:, None])
        scores = tl.where((before | new)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        highest, total, mixed = _take_in(highest, total, mixed, scores, v)
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
    rows: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
) -> Tensor:
    """Appends one token to each request's pages and attends to all of them.

    query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, head_dim]; rows: int64 [N]; positions: int64 [R] of
    the new token; table: int32 [R, P], the pages of each row. Returns [1, N, heads, head_dim].
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
            rows,
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
            PAGE=PAGE_TOKENS,
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
    """Among how many the pages of each are shared, so that there are enough programs to fill a large GPU."""
    return min(8, triton.next_power_of_2(max(1, 320 // programs)))


def _results(query: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places for the whole result and for each split's: its mean of values, and its highest score and total weight."""
    T, heads, head_dim = query.shape
    partial = query.new_empty(T, heads, splits, head_dim, dtype=torch.float32)
    return torch.empty_like(query), partial, query.new_empty(T, heads, splits, 2, dtype=torch.float32)


@decode_attention.register_fake
def _(query, key, value, keys, values, rows, positions, table, scale):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


# ---- Attention of chunks of prompts, over the pages of their requests ----


@triton.jit
def _write_kernel(key, value, keys, values, slots, key_stride, value_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One token's key and value, of SIZE numbers each, to its slot."""
    token, at = tl.program_id(0), tl.arange(0, BLOCK)
    slot = tl.load(slots + token).to(tl.int64) * SIZE
    tl.store(keys + slot + at, tl.load(key + token * key_stride + at, mask=at < SIZE), mask=at < SIZE)
    tl.store(values + slot + at, tl.load(value + token * value_stride + at, mask=at < SIZE), mask=at < SIZE)


@triton.jit
def _prefill_kernel(
    query,
    keys,
    values,
    rows,
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
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One block, one head, one in SPLITS of its pages. Token i of the block stands at its start + i and attends to all
    up to itself."""
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, start = tl.load(rows + block), tl.load(starts + block).to(tl.int32)
    end = start + tl.load(counts + block).to(tl.int32)
    dims, tokens, queries = tl.arange(0, HEAD_DIM), tl.arange(0, PAGE), tl.arange(0, BLOCK)
    lane = (block * BLOCK + queries) * HEADS + head
    q = tl.load(query + lane[:, None] * HEAD_DIM + dims[None, :])
    highest = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    inside = (tokens[:, None] * KV_HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM + dims[None, :]
    for index in tl.range(split, (start + BLOCK - 1) // PAGE + 1, SPLITS, num_stages=2):
        page = tl.load(table + row * table_width + index).to(tl.int64) * (PAGE * KV_HEADS * HEAD_DIM)
        k = tl.load(keys + page + inside)
        # What is masked is still multiplied, and behind the end may stand what is not a number.
        v = tl.load(values + page + inside, mask=(index * PAGE + tokens < end)[:, None], other=0.0)
        seen = (index * PAGE + tokens)[None, :] <= (start + queries)[:, None]
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        highest, total, mixed = _take_in(highest, total, mixed, scores, v)
    _store(highest, total, mixed, lane, queries < BLOCK, split, output, partial, weights, dims, SPLITS)


@torch.library.custom_op("llama2_chat::prefill_attention", mutates_args=("keys", "values"))
def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rows: Tensor,
    starts: Tensor,
    counts: Tensor,
    table: Tensor,
    scale: float,
) -> Tensor:
    """Writes the keys and values of T tokens and attends to their requests so far, with nothing asked of the host.

    query: [1, heads, T, head_dim]; key, value: [1, kv_heads, T, head_dim]; slots: int64 [T]; rows, starts and counts,
    int64 [T / BLOCK_TOKENS]: whose the block is, where it begins and how many of its tokens count; table: int32 [R, P],
    the pages of each row, a page more than the longest request has. Returns [1, T, heads, head_dim].
    """
    query, key, value = query[0].transpose(0, 1).contiguous(), _tokens(key), _tokens(value)
    T, heads, head_dim = query.shape
    size = key.shape[1] * head_dim
    splits = _splits(T // BLOCK_TOKENS * heads)
    output, partial, weights = _results(query, splits)
    with torch.cuda.device_of(query):
        places = keys, values, slots, key.stride(0), value.stride(0)
        _write_kernel[(T,)](key, value, *places, SIZE=size, BLOCK=triton.next_power_of_2(size))
        _prefill_kernel[T // BLOCK_TOKENS, heads, splits](
            query,
            keys,
            values,
            rows,
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
            PAGE=PAGE_TOKENS,
            BLOCK=BLOCK_TOKENS,
            SPLITS=splits,
            num_warps=4,
        )
        if splits > 1:
            _combine_kernel[(T * heads,)](partial, weights, output, HEAD_DIM=head_dim, SPLITS=splits, num_warps=1)
    return output[None]


@prefill_attention.register_fake
def _(query, key, value, keys, values, slots, rows, starts, counts, table, scale):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


# ---- Products with NF4 weights, for up to MOST_ROWS tokens ----

MOST_ROWS = 32  # above, unpacking the weights once and a plain matrix product is faster
OUTPUTS_MULTIPLE = 128
UNPACKED_BLOCKS = 32  # per program
BLOCK_WEIGHTS = 64  # weights that share a scale, as bitsandbytes lays them out
SPLITS = 8


def _decoder_asm() -> str:
    """PTX that turns four bytes, eight NF4 weights, into bfloat16: the four high nibbles, then the four low ones.

    PRMT picks bytes by nibble: the packed weights are themselves the selectors into the codebook, whose 16 values lie
    as two planes of bytes in eight registers. 21 instructions for 8 weights, no memory is read.
    """
    codes = get_4bit_type("nf4", device="cpu").to(torch.bfloat16).view(torch.int16).tolist()
    lines = [
        ".reg .b32 s0, s1, shifted, m0, m1, p, q, l0, h0, l1, h1;",
        "and.b32 s0, $4, 0x77777777;",
        "shr.u32 s1, s0, 16;",
        "shl.b32 shifted, $4, 4;",
        "prmt.b32 m0, shifted, $4, 0xD9C8;",  # 0xFF where a nibble is 8 or more: the upper half of the codebook
        "prmt.b32 m1, shifted, $4, 0xFBEA;",
    ]
    for plane, shift in (("l", 0), ("h", 8)):
        words = [sum((codes[4 * i + j] >> shift & 255) << 8 * j for j in range(4)) for i in range(4)]
        for half in (0, 1):
            lines += [
                f"prmt.b32 p, {words[0]:#x}, {words[1]:#x}, s{half};",
                f"prmt.b32 q, {words[2]:#x}, {words[3]:#x}, s{half};",
                f"lop3.b32 {plane}{half}, p, q, m{half}, 0xD8;",  # q where the mask is set, else p
            ]
    lines += [f"prmt.b32 ${out}, l{half}, h{half}, {order};" for out, half, order in
              ((0, 0, "0x7351"), (1, 1, "0x7351"), (2, 0, "0x6240"), (3, 1, "0x6240"))]  # fmt: skip
    return "{" + "\n".join(lines) + "}"


DECODER_ASM = tl.constexpr(_decoder_asm())


@triton.jit
def _scale(absmax, code, absmax_scale, shift, block):
    """Of these blocks of weights: the scales are themselves 8-bit, with a scale for each 256 of them."""
    return tl.load(code + tl.load(absmax + block).to(tl.int32)) * tl.load(absmax_scale + block // 256) + shift


@triton.jit
def _unpack_kernel(packed, absmax, code, absmax_scale, offset, output, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Some of the blocks of weights, in bfloat16."""
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    bytes_ = tl.load(packed + block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :])
    even, odd = tl.inline_asm_elementwise(
        DECODER_ASM, "=r,=r,=r,=r,r", [bytes_], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )
    weights = tl.interleave(even, odd) * _scale(absmax, code, absmax_scale, tl.load(offset), block)[:, None]
    tl.store(output + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], weights.to(tl.bfloat16))


@triton.jit(do_not_specialize=["M"])  # a number of tokens not met before must not wait for a compiler
def _nf4_kernel(
    x,
    packed,
    absmax,
    code,
    absmax_scale,
    offset,
    partial,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """partial[split, m, n]: the part of x @ W.T that one in SPLITS of the blocks of K gives, in float32."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    m, pair = tl.arange(0, ROWS), tl.arange(0, BLOCK // 2)
    blocks: tl.constexpr = K // BLOCK
    each: tl.constexpr = (blocks + SPLITS - 1) // SPLITS
    shift = tl.load(offset)
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for block in tl.range(split * each, tl.minimum(split * each + each, blocks), num_stages=3):
        bytes_ = tl.load(packed + n[:, None] * (K // 2) + (block * (BLOCK // 2) + pair)[None, :])
        even, odd = tl.inline_asm_elementwise(
            DECODER_ASM, "=r,=r,=r,=r,r", [bytes_], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
        inputs = x + m[None, :] * K + block * BLOCK + 2 * pair[:, None]
        product = tl.dot(even, tl.load(inputs, mask=m[None, :] < M, other=0.0))
        product = tl.dot(odd, tl.load(inputs + 1, mask=m[None, :] < M, other=0.0), product)
        total += product * _scale(absmax, code, absmax_scale, shift, n * blocks + block)[:, None]
    tl.store(partial + (split * M + m[None, :]) * N + n[:, None], total, mask=m[None, :] < M)


@triton.jit
def _sum_kernel(partial, output, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    parts = tl.load(partial + tl.arange(0, SPLITS)[:, None] * size + at[None, :], mask=at[None, :] < size, other=0.0)
    tl.store(output + at, tl.sum(parts, 0).to(output.dtype.element_ty), mask=at < size)


@torch.library.custom_op("llama2_chat::nf4_linear", mutates_args=())
def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, absmax_scale: Tensor, offset: Tensor, out_features: int
) -> Tensor:
    """x @ W.T for W [out_features, in_features] as bitsandbytes keeps it in NF4 with double quantisation.

    x: [..., in_features]; packed: uint8, two weights a byte; absmax: uint8, one scale per 64 weights, looked up in
    code, float32 [256], times absmax_scale, float32 per 256 scales, plus offset. Returns [..., out_features].
    """
    K, N = x.shape[-1], out_features
    M = x.numel() // K
    # For a single token bitsandbytes' own kernel is as fast.
    if M == 1 or N % OUTPUTS_MULTIPLE or K % BLOCK_WEIGHTS or x.dtype != torch.bfloat16:
        return torch.ops.bitsandbytes.gemm_4bit(
            x,
            packed,
            [N, K],
            absmax_scale,
            BLOCK_WEIGHTS,
            "nf4",
            absmax_8bit=absmax,
            absmax_code=code,
            absmax_offset=offset,
        )
    if M > MOST_ROWS:
        weight = x.new_empty(N, K)
        with torch.cuda.device_of(x):  # Triton launches on the current one
            programs = N * K // BLOCK_WEIGHTS // UNPACKED_BLOCKS
            scales = absmax, code, absmax_scale, offset
            _unpack_kernel[(programs,)](packed, *scales, weight, BLOCKS=UNPACKED_BLOCKS, BLOCK=BLOCK_WEIGHTS)
        return F.linear(x, weight)
    partial = x.new_empty(SPLITS, M, N, dtype=torch.float32)
    outputs, warps = (64, 2) if M <= 16 else (128, 4)  # per program
    with torch.cuda.device_of(x):
        _nf4_kernel[N // outputs, SPLITS](
            x.contiguous(),
            packed,
            absmax,
            code,
            absmax_scale,
            offset,
            partial,
            M,
            N=N,
            K=K,
            ROWS=16 if M <= 16 else MOST_ROWS,
            COLUMNS=outputs,
            BLOCK=BLOCK_WEIGHTS,
            SPLITS=SPLITS,
            num_warps=warps,
        )
        output = x.new_empty(*x.shape[:-1], N)
        _sum_kernel[(triton.cdiv(M * N, 1024),)](partial, output, M * N, SPLITS=SPLITS, BLOCK=1024)
    return output


@nf4_linear.register_fake
def _(x, packed, absmax, code, absmax_scale, offset, out_features):
    return x.new_empty(*x.shape[:-1], out_features)
