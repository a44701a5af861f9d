"""Floating-point work for the CPU of which each row comes out the same, bit for bit, whoever shares the step.

How a sum of products is rounded depends on its order, and libraries choose the order by the number of rows. So they are
always given the same number here: products and queries go through in blocks of ROWS, keys in numbers that the position
of the query alone decides (engine/cpu_attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from llama2_chat.kernels.softcap import attend_softcapped

ROWS = 8  # as many as decode together on a CPU
MANY_ROWS = 32  # PyTorch's attention takes so many queries at a time on a CPU
GRAIN = 32768  # PyTorch shares no elementwise work of so few numbers among threads
VECTORS = 64  # numbers; what is left over goes through other instructions


def in_blocks(function: Callable[[Tensor], Tensor], x: Tensor, rows: int = ROWS) -> Tensor:
    """function(x) of x [..., in], in blocks of [rows, in], the last one filled up with zeros."""
    flat = x.reshape(-1, x.shape[-1])
    blocks = F.pad(flat, (0, 0, 0, -len(flat) % rows)).split(rows)
    y = function(blocks[0]) if len(blocks) == 1 else torch.cat([function(block) for block in blocks])
    return y[: len(flat)].view(*x.shape[:-1], y.shape[-1])


class FixedRowsLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return in_blocks(super().forward, input)


class FixedRowsConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return in_blocks(super().forward, x)


class FixedRowsActivation(nn.Module):
    """Exponentials and their like, in pieces that begin at the same places of each row and stay in one thread."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        rows = GRAIN // width if width % VECTORS == 0 else 1
        if x.numel() == rows * width:
            return self.activation(x)
        flat = x.reshape(-1, width)
        return torch.cat([self.activation(piece) for piece in flat.split(max(1, rows))]).view(x.shape)


def fix_rows(model: nn.Module) -> None:
    """Let the layers of a model on the CPU compute in blocks of a fixed number of rows. Their weights stay shared."""
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            module.__class__ = FixedRowsLinear
        elif type(module) is Conv1D:
            module.__class__ = FixedRowsConv1D
        elif not isinstance(module, FixedRowsActivation):
            for name, child in module.named_children():
                if _is_activation(child):
                    setattr(module, name, FixedRowsActivation(child))


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    return home in ("torch.nn.modules.activation", "transformers.activations") and not list(module.parameters())


def attend_fixed_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of N requests with T tokens each, in blocks of queries that share a head of keys, in float32.

    query: [N, T, heads, head_dim]; key, value: [N, kv_heads, L, head_dim], L the same whenever a query stands at the
    same position; mask: from fixed_rows_mask(), whose blocks have as many rows. Returns [N, T, heads, head_dim].
    """
    N, T, heads, head_dim = query.shape
    kv_heads, size = key.shape[1], mask.shape[2]
    rows = T * heads // kv_heads
    q = query.float()
    if T > 1:  # -> [N, kv_heads, T, group, head_dim]
        q = q.view(N, T, kv_heads, -1, head_dim).transpose(1, 2)
    q = q.reshape(N, kv_heads, rows, head_dim)
    k, v, blocks = key.float(), value.float(), -(-rows // size)
    if rows < blocks * size:
        q = F.pad(q, (0, 0, 0, blocks * size - rows))
    if blocks > 1:
        q = q.view(N, kv_heads, blocks, size, head_dim).transpose(1, 2).flatten(0, 1)  # [N * blocks, ...]
        k, v = (each[:, None].expand(-1, blocks, -1, -1, -1).flatten(0, 1) for each in (k, v))
    if softcap is None:
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        output = attend_softcapped(q, k, v, mask, scale, softcap)
    if blocks > 1:
        output = output.view(N, blocks, kv_heads, size, head_dim).transpose(1, 2).flatten(2, 3)
    if rows < blocks * size:
        output = output[:, :, :rows]
    if T > 1:
        output = output.reshape(N, kv_heads, T, -1, head_dim).transpose(1, 2)
    return output.reshape(N, T, heads, head_dim)


def fixed_rows_mask(positions: Tensor, group: int, length: int, rows: int, window: int | None = None) -> Tensor:
    """What may be attended to from positions, int64 [N, T]: float32 [N * blocks, 1, rows, length], 0 or -inf.

    group: heads that share a head of keys; length: of the keys; rows: of a block; window: tokens that each attends to,
    None for all.
    """
    at = positions.repeat_interleave(group, 1)
    at = F.pad(at, (0, -at.shape[1] % rows)).view(-1, 1, rows, 1)
    keys = torch.arange(length)
    seen = keys <= at if window is None else (keys <= at) & (keys > at - window)
    return torch.zeros(()).where(seen, -torch.inf)


def block_rows(queries: int, length: int, head_dim: int, softcap: float | None) -> int:
    """How many queries of so many, which share a head of `length` keys, go into a block: ROWS, or as suits them
    better where that changes no bit."""
    suiting = queries if queries <= ROWS else MANY_ROWS
    alike = softcap is None and rows_are_alike(suiting, length, head_dim, torch.get_num_threads())
    return suiting if alike else ROWS


@cache
def rows_are_alike(size: int, length: int, head_dim: int, threads: int) -> bool:
    """Whether attention gives queries in blocks of this size the bits that it gives them in blocks of ROWS."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, MANY_ROWS, 2, head_dim, generator=random)
    k, v = (torch.randn(1, 2, length, head_dim, generator=random) for _ in range(2))
    positions = torch.arange(length)[None, -MANY_ROWS:]
    suiting, usual = (
        attend_fixed_rows(q, k, v, fixed_rows_mask(positions, 1, length, rows), head_dim**-0.5) for rows in (size, ROWS)
    )
    return torch.equal(suiting, usual)
