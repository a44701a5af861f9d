"""Many answers side by side, for training: each chosen as the engine would choose it, with its own random numbers.

It is faster than the engine at answers by the hundreds, for nobody joins, leaves or reads while they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
GPU_MULTIPLE = 128  # columns, that a recorded step attends to


@torch.inference_mode()
def write(
    model: PreTrainedModel, prompts: Sequence[list[int]], params: Sequence[SamplingParams], stop_ids: Collection[int]
) -> list[list[int]]:
    """What follows each of these prompts, up to one of stop_ids. The model must attend by paged_attention.ATTENTION."""
    B, T, most = len(prompts), max(map(len, prompts)), max(each.max_new_tokens for each in params)
    embeddings = input_embeddings(model).weight
    device, V = embeddings.device, embeddings.shape[0]
    sample_narrow: Callable[..., Tensor] | None = None
    if device.type == "cpu":
        from llama2_chat.kernels.cpu_sampling import sample_narrow  # compiled, which nobody else needs
    sampler = SamplerState(B, V, most, device, sample_narrow)
    for slot, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        sampler.join(slot, prompt, 0, each, draws(each, each.max_new_tokens))
    kept = NARROW if all(map(is_narrow, params)) else V
    rows = _Rows.of(model, [T - len(prompt) for prompt in prompts], T + most)
    slots, stops = torch.arange(B, device=device), torch.tensor(sorted(stop_ids), device=device)
    written = torch.full((B, most), min(stop_ids), device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)
    tokens = sampler.sample(rows.read(model, ids), slots, kept)
    step = _Step(model, rows, sampler, kept, slots, tokens)
    for n in range(most):
        written[slots, n] = tokens
        ended |= torch.isin(tokens, stops) | (tokens < 0)
        if n % LOOK_EVERY == LOOK_EVERY - 1:
            going = (~ended).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) <= len(slots) * 3 / 4:
                rows.keep(going)
                slots, tokens, ended = slots[going], tokens[going], ended[going]
                step = _Step(model, rows, sampler, kept, slots, tokens)
        if n < most - 1:
            tokens = step.next()
    limits = [each.max_new_tokens for each in params]
    return [_until(row[:limit], stop_ids) for row, limit in zip(written.tolist(), limits, strict=True)]


def _until(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    return ids[: next((n for n, id in enumerate(ids) if id in stop_ids or id < 0), len(ids))]


class _Step:
    """The next token of each row, again and again; on a GPU as a CUDA graph, whose many small kernels would take longer
    to launch than to run."""

    def __init__(
        self, model: Any, rows: _Rows, sampler: SamplerState, kept: int, slots: Tensor, tokens: Tensor
    ) -> None:
        self._model, self._rows, self._sampler, self._kept, self._slots = model, rows, sampler, kept, slots
        self._tokens = tokens.clone()  # the newest ones
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # of steps that attend to so many columns

    def next(self) -> Tensor:
        """int64 [B]; -1 where the logits are not finite."""
        rows = self._rows
        rows.end += 1
        if not self._tokens.is_cuda:
            self._compute(rows.end)
            return self._tokens
        width = min(-(-rows.end // GPU_MULTIPLE) * GPU_MULTIPLE, rows.columns)
        if width in self._graphs:
            self._graphs[width].replay()
        else:
            self._compute(width)  # as it is, which makes ready what cannot be recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=next((each.pool() for each in self._graphs.values()), None)):
                self._compute(width)
            self._graphs[width] = graph
        return self._tokens

    def _compute(self, width: int) -> None:
        logits = self._rows.go_on(self._model, self._tokens.clamp(min=0)[:, None], width)
        self._tokens.copy_(self._sampler.sample(logits, self._slots, self._kept))


@dataclass
class _Rows:
    """Keys and values of B texts, which end in the same column, behind `padding` columns that hold nothing.

    A paged_attention.AttentionStep of rows side by side: what it attends to and returns is [B, ...] where that has 1.
    """

    padding: Tensor  # int64 [B, 1]
    layers: list[list[Tensor]]  # keys and values of each, [B, kv_heads, columns, head_dim]
    columns: int
    column: Tensor  # int64 [1], the one that is computed now
    end: int = 0  # of the columns that have been computed

    @classmethod
    def of(cls, model: PreTrainedModel, padding: Sequence[int], columns: int) -> _Rows:
        probe = probe_keys(model)
        shapes = [(len(padding), keys.shape[1], columns, keys.shape[3]) for keys in probe]
        layers = [[keys.new_zeros(shape) for _ in range(2)] for keys, shape in zip(probe, shapes, strict=True)]
        device = probe[0].device
        return cls(torch.tensor(padding, device=device)[:, None], layers, columns, torch.zeros(1, device=device).long())

    def read(self, model: Any, ids: Tensor) -> Tensor:
        """Logits [B, V] after the first columns, int64 [B, T]."""
        self.end = ids.shape[1]
        self.column.fill_(self.end)
        columns = torch.arange(self.end, device=ids.device)
        # What is padding attends to padding, for nothing at all would be NaN, and is attended to by nothing else.
        may = (columns >= self.padding)[:, None] | (columns < self.padding)[:, :, None]
        self._at, self._seen = columns, (may & (columns <= columns[:, None]))[:, None]
        return self._forward(model, ids, columns - self.padding)

    def go_on(self, model: Any, ids: Tensor, width: int) -> Tensor:
        """The same after the next column, int64 [B, 1]. width: of columns that are looked at, at least to that one."""
        columns = torch.arange(width, device=ids.device)
        self._at, self._seen = self.column, ((columns >= self.padding) & (columns <= self.column))[:, None, None]
        logits = self._forward(model, ids, self.column - self.padding)
        self.column += 1
        return logits

    def _forward(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        output = model.base_model(
            input_ids=ids,
            position_ids=positions.clamp(min=0),
            attention_mask=torch.empty(1, 1, 1, 1, device=ids.device),  # transformers makes none when it is given one
            use_cache=False,
            step=self,
        )
        return model.get_output_embeddings()(output.last_hidden_state[:, -1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        query = query.to(key.dtype)  # layers in 8 bits have it in float32
        for states, new in zip(self.layers[layer], (key, value), strict=True):
            states.index_copy_(2, self._at, new.to(states.dtype))
        keys, values = (states[:, :, : self._seen.shape[-1]] for states in self.layers[layer])
        if query.shape[2] > 1:
            return scoring.mix(query, keys, values, self._seen).transpose(1, 2)
        # Queries that share a head of keys stand where the tokens of one query would: no key is repeated.
        shared = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        return scoring.mix(shared, keys, values, self._seen).reshape(len(query), 1, -1, query.shape[3])

    def keep(self, rows: Tensor) -> None:
        """Let the others go. rows: int64 [n]."""
        self.padding = self.padding[rows]
        for kept in self.layers:
            kept[:] = [states[rows] for states in kept]
