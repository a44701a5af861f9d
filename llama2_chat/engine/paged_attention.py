"""Attention over the blocks of a KV pool on a GPU, in plain PyTorch: what transformers' layers call in the engine.

`attend` is registered with transformers under ATTENTION. A step that the engine passes through the model says where
the keys and values of its tokens are; without one, transformers' own attention computes. What a layer asks for beyond
its scale, its window and its soft cap is not computed here, and attention_windows() refuses a model that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool, input_embeddings
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.softcap import attend_softcapped

ATTENTION = "paged"  # the name under which transformers knows attend()
# What layers hand to attention that changes nothing in eval mode, or that each step knows better.
WITHOUT_EFFECT = {
    *("dropout", "position_ids", "cache_position", "use_cache", "past_key_values", "logits_to_keep", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}
WHAT_IT_IS = {"s_aux": "attention sinks", "position_bias": "a bias for each distance (ALiBi)"}


@dataclass(frozen=True)
class Scoring:
    """How a layer weighs the tokens that it attends to."""

    scale: float
    window: int | None = None  # tokens that each attends to, itself and those before it; None for all
    softcap: float | None = None  # scores stay between -softcap and softcap

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.softcap is None

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        """Attention of query [N, heads, T, head_dim] over key and value [N, kv_heads, S, head_dim].

        mask: bool, broadcast to [N, heads, T, S]: what each may attend to; None for all, or for those before it.
        """
        gqa = query.shape[1] != key.shape[1]
        if type(mask) is Tensor and gqa:  # PyTorch's fast kernels for GPUs take either a mask or shared heads
            key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
            gqa = False
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, scale=self.scale, enable_gqa=gqa
            )
        return attend_softcapped(query, key, value, mask, self.scale, self.softcap)


class AttentionStep(Protocol):
    """Where the keys and values of the tokens in one forward pass are. Passed through the model to attend()."""

    @property
    def positions(self) -> Tensor: ...  # int64 [T]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]; returns [1, T, heads, head_dim]."""


@dataclass
class PrefillStep:
    """Tokens of several prompts side by side, [1, T], and where their keys and values go."""

    pool: KVPool
    positions: Tensor  # int64 [T]
    kv_index: Tensor  # int64 [T]
    spans: list[tuple[int, int, int]]  # of each prompt: first token, one past the last, position of the first
    tables: Tensor  # int64 [n, B]: the blocks of each prompt's request, padded with block 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Writes key and value, and lets each prompt attend to its request so far."""
        self.pool.write(layer, key, value, self.kv_index)
        output = torch.empty_like(query)
        window = scoring.window
        for (start, end, position), table in zip(self.spans, self.tables, strict=True):
            q, k, v = (states[:, :, start:end] for states in (query, key, value))
            length, unseen = position + end - start, 0
            if position > 0 or not self.pool.is_exact:  # in 8 bits a token sees the same of those in its own chunk
                # Blocks that lie before the window of the first token are not read.
                unseen = max(position - window + 1, 0) // BLOCK_SIZE if window else 0
                blocks = table[unseen : -(-length // BLOCK_SIZE)]
                k, v = self.pool.read(layer, blocks, length - unseen * BLOCK_SIZE)
            if scoring.softcap or (window and window < length):
                mask: Tensor | None = _causal(end - start, k.shape[2], window, q.device)
            else:
                mask = causal_lower_right(end - start, length) if position > 0 else None  # a kernel's name; never made
            output[:, :, start:end] = scoring.mix(q, k, v, mask, is_causal=mask is None)
        return output.transpose(1, 2)


def _causal(new: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [new, length]: what the last `new` of so many tokens may attend to."""
    mask = torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new)
    return mask if window is None else mask.triu(length - new - window + 1)


@dataclass
class DecodeStep:
    """Few tokens, [1, N], mostly one of each of several requests, and where their keys and values are."""

    pool: KVPool
    lengths: list[int]  # tokens of its request before each
    tables: Tensor  # int64 [N, B], the blocks of its request, padded with block 0
    kernel: Callable[..., Tensor] | None = None  # kernels.attention.decode_attention, where it runs
    _seen: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        N, kv_heads, head_dim = len(self.tables), key.shape[1], key.shape[3]
        if self.kernel is not None and scoring.is_plain:
            places = (place.to(key.device) for place in (self.kv_index, self._rows, self.positions, self.tables))
            return self.kernel(query, key, value, None, None, *places, scoring.scale, *self.pool.layers[layer])
        self.pool.write(layer, key, value, self.kv_index)
        # The queries that share a head of keys stand where the tokens of one query would: no key is repeated.
        q = query[0].transpose(0, 1).reshape(N, kv_heads, -1, head_dim)
        mask: Tensor | None = None
        if N == 1 and scoring.window is None:
            k, v = self.pool.read(layer, self.tables[0], self.lengths[0] + 1)
        else:
            tables, mask = (part.to(key.device) for part in self._visible(scoring.window))
            k, v = self.pool.read_batch(layer, tables)
        return scoring.mix(q, k, v, mask).reshape(1, N, -1, head_dim)

    @cached_property
    def positions(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.tables.device)

    @cached_property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.tables), device=self.tables.device)

    @cached_property
    def kv_index(self) -> Tensor:
        blocks = self.tables.gather(1, self.positions[:, None] // BLOCK_SIZE)[:, 0]
        return blocks * BLOCK_SIZE + self.positions % BLOCK_SIZE

    def _visible(self, window: int | None) -> tuple[Tensor, Tensor]:
        """The blocks that hold what each request may attend to, int64 [N, b], and which of their tokens it is, bool
        [N, 1, 1, b * BLOCK_SIZE]. Made once for all layers with this window."""
        if window not in self._seen:
            position, width = self.positions[:, None], self.tables.shape[1]
            earliest = torch.zeros_like(position) if window is None else (position - window + 1).clamp(min=0)
            most = width if window is None else min((window + BLOCK_SIZE - 2) // BLOCK_SIZE + 1, width)
            blocks = earliest // BLOCK_SIZE + torch.arange(most, device=position.device)  # some lie past the newest
            offset = torch.arange(BLOCK_SIZE, device=position.device)
            token = (blocks[:, :, None] * BLOCK_SIZE + offset).flatten(1)
            mask = (token >= earliest) & (token <= position)
            self._seen[window] = self.tables.gather(1, blocks.clamp(max=width - 1)), mask[:, None, None]
        return self._seen[window]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step: AttentionStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pool when the engine passes a step through the model, else transformers' own."""
    scoring = Scoring(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    if step is not None:
        _refuse_unknown(module, kwargs)
        return step.attend(cast(int, module.layer_idx), query, key, value, scoring), None
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is None:  # transformers makes none where all may be seen, or all that came before
        attention_mask = _causal(query.shape[2], key.shape[2], None, query.device)
    return scoring.mix(query, key, value, attention_mask).transpose(1, 2), None


def _refuse_unknown(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise ModelUnavailable if a layer asks for something that would be missing from the answer."""
    if not kwargs.pop("is_causal", getattr(module, "is_causal", True)):
        raise _unlike_llama(module, "attends to tokens that come later")
    if unknown := sorted(name for name, what in kwargs.items() if what is not None and name not in WITHOUT_EFFECT):
        raise _unlike_llama(module, f"attends with {WHAT_IT_IS.get(unknown[0], unknown[0])}")


def _unlike_llama(module: torch.nn.Module, what: str) -> ModelUnavailable:
    name = type(module).__name__
    return ModelUnavailable(
        f"{name} {what}, which this program does not compute. Choose a Llama 2, or a model that attends as it does."
    )


@dataclass
class _Listening:
    """A step of one token, which attends to itself alone; how its layers score is remembered."""

    scorings: dict[int, Scoring] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.scorings[layer] = scoring
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)


@torch.inference_mode()
def attention_windows(model: PreTrainedModel) -> list[int | None]:
    """Of each layer how many tokens it attends to, None for all. From here on the model attends by ATTENTION.

    Raises ModelUnavailable, with the reason, for a model whose attention cannot be computed over the pool.
    """
    model.set_attn_implementation(ATTENTION)
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
        raise _unlike_llama(model, "has an attention of its own, such as ALiBi")
    device = input_embeddings(model).weight.device
    one, step = torch.zeros(1, 1, dtype=torch.long, device=device), _Listening()
    mask = torch.empty(1, 1, 1, 1, device=device)
    model(input_ids=one, position_ids=one, attention_mask=mask, use_cache=False, logits_to_keep=1, step=step)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(step.scorings) != list(range(layers)):
        raise _unlike_llama(model, "keeps from its layers where the tokens of a step belong")
    return [step.scorings[layer].window for layer in range(layers)]


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
