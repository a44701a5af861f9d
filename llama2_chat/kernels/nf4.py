"""Products with NF4 weights as bitsandbytes keeps them, in Triton: for a few tokens at once, and unpacking for many.

A custom operator, so that torch.compile takes it as it is. It needs compute capability 8.0 and bfloat16; elsewhere
bitsandbytes' own products do the same work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import get_4bit_type
from torch import Tensor
from torch.nn import functional as F

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
    if M == 1 or not can_unpack(N, K) or x.dtype != torch.bfloat16:
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
        return F.linear(x, unpack(packed, absmax, code, absmax_scale, offset, N))
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


def can_unpack(out_features: int, in_features: int) -> bool:
    return out_features % OUTPUTS_MULTIPLE == 0 and in_features % BLOCK_WEIGHTS == 0


def unpack(
    packed: Tensor, absmax: Tensor, code: Tensor, absmax_scale: Tensor, offset: Tensor, out_features: int
) -> Tensor:
    """W of nf4_linear() in bfloat16, [out_features, in_features], if can_unpack() it."""
    weight = packed.new_empty(out_features, 2 * packed.numel() // out_features, dtype=torch.bfloat16)
    with torch.cuda.device_of(packed):  # Triton launches on the current one
        _unpack_kernel[(weight.numel() // BLOCK_WEIGHTS // UNPACKED_BLOCKS,)](
            packed, absmax, code, absmax_scale, offset, weight, BLOCKS=UNPACKED_BLOCKS, BLOCK=BLOCK_WEIGHTS
        )
    return weight


@nf4_linear.register_fake
def _(x, packed, absmax, code, absmax_scale, offset, out_features):
    return x.new_empty(*x.shape[:-1], out_features)
