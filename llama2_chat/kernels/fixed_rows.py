"""Floating-point work for the CPU of which each row comes out the same, bit for bit, whoever shares the step.

How a sum of products is rounded depends on its order, and libraries choose the order by the number of rows. So they are
always given the same number here: products and queries go through in blocks of ROWS, keys in blocks of KEYS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from llama2_chat.kernels.softcap import attend_softcapped

ROWS = 8  # as many as decode together on a CPU
KEYS = 512  # PyTorch's attention takes so many keys at a time on a CPU, and the last ones in a product of another shape
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
    """Attention of N requests with T tokens each, in blocks of ROWS queries that share a head of keys.

    query: [N, heads, T, head_dim]; key, value: [N, kv_heads, L, head_dim], L the same
    whenever a query stands at the same position; mask: from
    fixed_rows_mask(). Returns [N, T, heads, head_dim].
    """
    N, heads, T, _ = query.shape
    kv_heads = key.shape[1]
    # [N, kv_heads, group, T, head_dim] -> [N, kv_heads, T * group, head_dim]
    rows = query.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3)
    rows = F.pad(rows, (0, 0, 0, -rows.shape[2] % ROWS)).unflatten(2, (-1, ROWS))
    blocks = rows.shape[2]
    q = rows.transpose(1, 2).flatten(0, 1)  # [N * blocks, kv_heads, ROWS, head_dim]
    k, v = (
        states[:, None].expand(-1, blocks, -1, -1, -1).flatten(0, 1) if N > 1 else states.expand(blocks, -1, -1, -1)
        for states in (key, value)
    )
    if softcap is None:
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        output = attend_softcapped(q, k, v, mask, scale, softcap)
    output = output.unflatten(0, (N, blocks)).transpose(1, 2).flatten(2, 3)[:, :, : T * heads // kv_heads]
    return output.unflatten(2, (T, -1)).transpose(1, 2).flatten(2, 3)


def fixed_rows_mask(
    positions: Tensor, group: int, length: int, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """What may be attended to from positions, int64 [N, T]: [N * blocks, 1, ROWS, length], 0 or -inf.

    group: heads that share a head of keys; length: of the keys; window: tokens that each attends to, None for all.
    """
    rows = positions.repeat_interleave(group, 1)
    rows = F.pad(rows, (0, -rows.shape[1] % ROWS)).view(-1, 1, ROWS, 1)
    keys = torch.arange(length)
    seen = keys <= rows if window is None else (keys <= rows) & (keys > rows - window)
    return torch.zeros((), dtype=dtype).where(seen, -torch.inf)
