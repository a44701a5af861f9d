"""Attention over the blocks of a KV pool on a GPU, in plain PyTorch: what transformers' layers call in the engine.

`attend` is registered with transformers under ATTENTION. A step that the engine passes through the model says where
the keys and values of its tokens are; without one, transformers' own attention computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool

ATTENTION = "paged"  # the name under which transformers knows attend()


class AttentionStep(Protocol):
    """Where the keys and values of the tokens in one forward pass are. Passed through the model to attend()."""

    @property
    def positions(self) -> Tensor: ...  # int64 [T]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]; returns [1, T, heads, head_dim]."""


@dataclass
class PrefillStep:
    """Tokens of several prompts side by side, [1, T], and where their keys and values go."""

    pool: KVPool
    positions: Tensor  # int64 [T]
    kv_index: Tensor  # int64 [T]
    spans: list[tuple[int, int, int]]  # of each prompt: first token, one past the last, position of the first
    tables: Tensor  # int64 [n, B]: the blocks of each prompt's request, padded with block 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Writes key and value, and lets each prompt attend to its request so far."""
        self.pool.write(layer, key, value, self.kv_index)
        output = torch.empty_like(query)
        gqa = query.shape[1] != key.shape[1]
        for (start, end, position), table in zip(self.spans, self.tables, strict=True):
            q, k, v = (states[:, :, start:end] for states in (query, key, value))
            mask = None
            if position > 0:
                length = position + end - start
                k, v = self.pool.read(layer, table[: -(-length // BLOCK_SIZE)], length)
                mask = causal_lower_right(end - start, length)  # a kernel's name: it is never made
            output[:, :, start:end] = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
            )
        return output.transpose(1, 2)


@dataclass
class DecodeStep:
    """One token of each of several requests, [1, N], and where their keys and values are."""

    pool: KVPool
    lengths: list[int]  # tokens of each request before this one
    tables: Tensor  # int64 [N, B], the blocks of each request, padded with block 0
    kernel: Callable[..., Tensor] | None = None  # kernels.attention.decode_attention, where it runs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        tables = self.tables.to(key.device)
        N, kv_heads, head_dim = len(tables), key.shape[1], key.shape[3]
        if self.kernel is not None:
            slots, positions = torch.arange(N, device=key.device), self.positions.to(key.device)
            return self.kernel(query, key, value, *self.pool.layers[layer], slots, positions, tables, scale)
        self.pool.write(layer, key, value, self.kv_index)
        # The queries that share a head of keys stand where the tokens of one query would: no key is repeated.
        q = query[0].transpose(0, 1).reshape(N, kv_heads, -1, head_dim)
        if N == 1:
            mask = None
            k, v = self.pool.read(layer, tables[0], self.lengths[0] + 1)
        else:
            mask = self.mask.to(key.device)
            k, v = self.pool.read_batch(layer, tables)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return output.reshape(1, N, -1, head_dim)

    @cached_property
    def positions(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.tables.device)

    @cached_property
    def kv_index(self) -> Tensor:
        blocks = self.tables.gather(1, self.positions[:, None] // BLOCK_SIZE)[:, 0]
        return blocks * BLOCK_SIZE + self.positions % BLOCK_SIZE

    @cached_property
    def mask(self) -> Tensor:
        """bool [N, 1, 1, B * BLOCK_SIZE]: what each may attend to."""
        tokens = torch.arange(self.tables.shape[1] * BLOCK_SIZE, device=self.tables.device)
        return (tokens <= self.positions[:, None])[:, None, None]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    step: AttentionStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pool when the engine passes a step through the model, else transformers' own."""
    if step is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with soft caps or sinks")
    return step.attend(cast(int, module.layer_idx), query, key, value, scaling or query.shape[-1] ** -0.5), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
