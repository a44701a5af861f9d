"""New keys and values to their cells of a KV pool, and queries turned as the keys are, in Triton.

Keys and values are kept as they are, or in 8 bits with a scale for each token and head, as kv_codes.py makes them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2_chat.kernels.kv_codes import LARGEST, SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
_LARGEST_INT8, _LARGEST_FP8 = tl.constexpr(LARGEST[torch.int8]), tl.constexpr(LARGEST[torch.float8_e4m3fn])
# Added to a small float32 and taken away again, it leaves the nearest whole number, of two the even one.
_ROUNDING = tl.constexpr(1.5 * 2**23)

KEPT = ("keys", "values", "key_scales", "value_scales")  # what operators write, in 8 bits


def write_cells(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_index: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """The queries [T, heads, head_dim], turned as the keys that are written."""
    query, key, value = _tokens(query), _tokens(key), _tokens(value)
    (T, heads, head_dim), kv_heads = query.shape, key.shape[1]
    turned = query.new_empty(query.shape)
    at_once = math.gcd(heads, kv_heads, 8)
    _write_kernel[T, (heads + 2 * kv_heads) // at_once](
        query,
        key,
        value,
        None if cos is None else cos.contiguous(),
        None if sin is None else sin.contiguous(),
        turned,
        keys,
        values,
        key_scales,
        value_scales,
        kv_index,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=keys.shape[1],
        AT_ONCE=at_once,
        num_warps=1,
    )
    return turned


def _tokens(states: Tensor) -> Tensor:
    """[1, heads, T, head_dim] as [T, heads, head_dim], of which each token lies in one piece."""
    states = states[0].transpose(0, 1)
    return states if states.stride()[1:] == (states.shape[2], 1) else states.contiguous()


@triton.jit
def _write_kernel(
    query,
    key,
    value,
    cos,
    sin,
    turned,
    keys,
    values,
    key_scales,
    value_scales,
    kv_index,
    query_stride,
    key_stride,
    value_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """AT_ONCE heads of one token: of its query to `turned`, of its key or of its value to its cell."""
    token, head = tl.program_id(0), tl.program_id(1) * AT_ONCE
    heads, dims = tl.arange(0, AT_ONCE)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    if head < HEADS:
        states = _turn(query + token * query_stride + head * HEAD_DIM, cos, sin, token, HEAD_DIM, AT_ONCE)
        tl.store(turned + (token * HEADS + head + heads) * HEAD_DIM + dims, states)
    elif head < HEADS + KV_HEADS:
        head -= HEADS
        states = _turn(key + token * key_stride + head * HEAD_DIM, cos, sin, token, HEAD_DIM, AT_ONCE)
        _keep(states, keys, key_scales, tl.load(kv_index + token), head, KV_HEADS, BLOCK)
    else:
        head -= HEADS + KV_HEADS
        states = tl.load(value + token * value_stride + (head + heads) * HEAD_DIM + dims)
        _keep(states, values, value_scales, tl.load(kv_index + token), head, KV_HEADS, BLOCK)


@triton.jit
def _turn(source, cos, sin, token, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr):
    """Some heads of one token, [AT_ONCE, HEAD_DIM], turned by the token's position, unless they are already."""
    first, dims = source + tl.arange(0, AT_ONCE)[:, None] * HEAD_DIM, tl.arange(0, HEAD_DIM)
    states = tl.load(first + dims[None, :])
    if cos is not None:
        partners = tl.load(first + ((dims + HEAD_DIM // 2) % HEAD_DIM)[None, :]).to(tl.float32)
        partners = tl.where((dims < HEAD_DIM // 2)[None, :], -partners, partners)
        by_cos = tl.load(cos + token * HEAD_DIM + dims).to(tl.float32)[None, :]
        by_sin = tl.load(sin + token * HEAD_DIM + dims).to(tl.float32)[None, :]
        states = (states.to(tl.float32) * by_cos + partners * by_sin).to(states.dtype)
    return states


@triton.jit
def _keep(states, kept, scales, cell, head, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Keys or values of some heads of one token, from `head` on, to its cell."""
    HEAD_DIM: tl.constexpr = states.shape[1]
    heads = head + tl.arange(0, states.shape[0])
    if scales is not None:
        states, its_scales = _encode(states, kept.dtype.element_ty)
        tl.store(scales + (cell // BLOCK * KV_HEADS + heads) * BLOCK + cell % BLOCK, its_scales)
    tl.store(kept + (cell * KV_HEADS + heads)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], states)


@triton.jit
def _encode(states, CODES: tl.constexpr):
    """Codes of some heads, [N, head_dim], and their scales, [N]: kv_codes.encode()."""
    LARGEST: tl.constexpr = _LARGEST_INT8 if tl.int8 == CODES else _LARGEST_FP8
    states = states.to(tl.float32)
    scales = tl.maximum(tl.max(tl.abs(states), 1), _SMALLEST) / LARGEST
    # A GPU's maximum passes over NaN. It is to be seen in the scale, and so is infinity.
    scales = (scales + 0.0 * tl.sum(states, 1)).to(tl.bfloat16)
    codes = tl.minimum(tl.maximum(states / scales.to(tl.float32)[:, None], -LARGEST), LARGEST)
    if tl.int8 == CODES:
        codes = (codes + _ROUNDING) - _ROUNDING
    return codes.to(CODES), scales
