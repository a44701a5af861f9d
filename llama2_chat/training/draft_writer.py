"""Many answers side by side, for training: each chosen as the engine would choose it, with its own random numbers.

It is faster than the engine at answers by the hundreds, for nobody joins, leaves or reads while they are written.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat.engine.kv_pool import input_embeddings, probe_keys
from llama2_chat.engine.paged_attention import Scoring
from llama2_chat.engine.sampler import NARROW, SamplerState, draws, is_narrow
from llama2_chat.types import SamplingParams

LOOK_EVERY = 16  # tokens: then answers that have ended leave


@torch.inference_mode()
def write(
    model: PreTrainedModel, prompts: Sequence[list[int]], params: Sequence[SamplingParams], stop_ids: Collection[int]
) -> list[list[int]]:
    """What follows each of these prompts, up to one of stop_ids. The model must attend by paged_attention.ATTENTION."""
    B, T, most = len(prompts), max(map(len, prompts)), max(each.max_new_tokens for each in params)
    embeddings = input_embeddings(model).weight
    device, V = embeddings.device, embeddings.shape[0]
    sampler = SamplerState(B, V, most, device)
    for slot, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        sampler.join(slot, prompt, 0, each, draws(each, each.max_new_tokens))
    kept = NARROW if all(map(is_narrow, params)) else V
    rows = _Rows.of(model, [T - len(prompt) for prompt in prompts], T + most)
    slots, stops = torch.arange(B, device=device), torch.tensor(sorted(stop_ids), device=device)
    written = torch.full((B, most), min(stop_ids), device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)
    for n in range(most):
        tokens = sampler.sample(rows.forward(model, ids), slots, kept)
        written[slots, n] = tokens
        ended |= torch.isin(tokens, stops) | (tokens < 0)
        if n % LOOK_EVERY == LOOK_EVERY - 1:
            going = (~ended).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) <= len(slots) * 3 / 4:
                rows.keep(going)
                slots, tokens, ended = slots[going], tokens[going], ended[going]
        ids = tokens[:, None].clamp(min=0)
    limits = [each.max_new_tokens for each in params]
    return [_until(row[:limit], stop_ids) for row, limit in zip(written.tolist(), limits, strict=True)]


def _until(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    return ids[: next((n for n, id in enumerate(ids) if id in stop_ids or id < 0), len(ids))]


@dataclass
class _Rows:
    """Keys and values of B texts, which end in the same column, behind `padding` columns that hold nothing.

    A paged_attention.AttentionStep of rows side by side: what it attends to and returns is [B, ...] where that has 1.
    """

    padding: Tensor  # int64 [B, 1]
    layers: list[list[Tensor]]  # keys and values of each, [B, kv_heads, columns, head_dim]
    start: int = 0  # the columns that are computed now
    end: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, padding: Sequence[int], columns: int) -> _Rows:
        probe = probe_keys(model)
        shapes = [(len(padding), keys.shape[1], columns, keys.shape[3]) for keys in probe]
        layers = [[keys.new_zeros(shape) for _ in range(2)] for keys, shape in zip(probe, shapes, strict=True)]
        return cls(torch.tensor(padding, device=probe[0].device)[:, None], layers)

    def forward(self, model: Any, ids: Tensor) -> Tensor:
        """Logits [B, V] after the next columns, int64 [B, T]."""
        self.start, self.end = self.end, self.end + ids.shape[1]
        columns = torch.arange(self.end, device=ids.device)
        # What is padding attends to padding, for nothing at all would be NaN, and is attended to by nothing else.
        may = (columns >= self.padding)[:, None] | (columns < self.padding)[:, self.start :, None]
        self._seen = (may & (columns <= columns[self.start :, None]))[:, None]
        output = model.base_model(
            input_ids=ids,
            position_ids=(columns[self.start :] - self.padding).clamp(min=0),
            attention_mask=torch.empty(1, 1, 1, 1, device=ids.device),  # transformers makes none when it is given one
            use_cache=False,
            step=self,
        )
        return model.get_output_embeddings()(output.last_hidden_state[:, -1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        query = query.to(key.dtype)  # layers in 8 bits have it in float32
        for states, new in zip(self.layers[layer], (key, value), strict=True):
            states[:, :, self.start : self.end] = new
        keys, values = (states[:, :, : self.end] for states in self.layers[layer])
        if self.end - self.start > 1:
            return scoring.mix(query, keys, values, self._seen).transpose(1, 2)
        # Queries that share a head of keys stand where the tokens of one query would: no key is repeated.
        shared = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        return scoring.mix(shared, keys, values, self._seen).reshape(len(query), 1, -1, query.shape[3])

    def keep(self, rows: Tensor) -> None:
        """Let the others go. rows: int64 [n]."""
        self.padding = self.padding[rows]
        for kept in self.layers:
            kept[:] = [states[rows] for states in kept]
