"""Ways to compute a step: what each of them promises, and the one that any model has, transformers' own forward.

The other one is in cuda_graphs.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat.engine.cpu_attention import CpuStep
from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool
from llama2_chat.engine.paged_attention import AttentionStep, DecodeStep, PrefillStep
from llama2_chat.engine.request import Request
from llama2_chat.engine.sampler import SamplerState
from llama2_chat.engine.scheduler import Chunk, DraftChunk
from llama2_chat.kernels.lora import AdapterRows


@dataclass
class ModelStep:
    """Logits from which the next tokens are chosen."""

    requests: list[Request]
    logits: Tensor  # [N, V]
    slots: Tensor  # int64 [N], on the model's device
    sample: Callable[[], Tensor] | None = None  # recorded sampling, if all requests are narrow: int64 [N]


@dataclass(frozen=True)
class VerifiedDrafts:
    """Logits after each id of some DraftChunks."""

    logits: Tensor  # [T, V]
    first: Mapping[Request, int]  # the row of the first id of each request's chunk
    choose: Callable[[Sequence[Request], Tensor, list[int]], ModelStep]  # from some rows of the logits

    @classmethod
    def of(cls, chunks: Sequence[DraftChunk], logits: Tensor, choose: Callable[..., ModelStep]) -> VerifiedDrafts:
        first, rows = {}, 0
        for chunk in chunks:
            first[chunk.request] = rows
            rows += len(chunk.ids)
        return cls(logits, first, choose)

    def step(self, place: int, requests: Sequence[Request]) -> ModelStep:
        return self.choose(requests, self.logits, [self.first[request] + place for request in requests])


class StepWay(Protocol):
    """One way to compute steps. None: this way cannot, or not yet."""

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Logits [n, V] after each chunk that is the last of its request."""

    def decode(self, requests: Sequence[Request]) -> ModelStep | None: ...
    def verify(self, chunks: Sequence[DraftChunk]) -> VerifiedDrafts | None: ...


class Outcome(IntEnum):
    """Of a part of the work on a faster step; the worst is the greatest."""

    DONE = 0
    NO_MEMORY = 1  # this step stays as it is
    FAILED = 2  # all that are not ready yet stay as they are


Agree = Callable[[Outcome], Outcome]  # what came of it here -> the worst of what came of it on any rank


class BackgroundWay(StepWay, Protocol):
    """A way that becomes ready in the background: recorded steps."""

    @property
    def mode(self) -> str: ...

    @property
    def recorded(self) -> list[tuple[str, int]]: ...  # kinds and sizes of the steps that are ready

    @property
    def maintenance_due(self) -> bool: ...

    def start(self, wake: Callable[[], None]) -> None: ...
    def wait(self) -> None: ...
    def maintain(self, agree: Agree) -> None: ...  # all ranks at once, within together()
    def close(self) -> None: ...


class EagerWay:
    """Steps through transformers' own forward, whatever the model and wherever its layers are."""

    def __init__(
        self,
        model: PreTrainedModel,
        pool: KVPool,
        sampler: SamplerState,
        kernel: Callable[..., Tensor] | None,
        most_blocks: int,
        rows: AdapterRows | None = None,
    ) -> None:
        self._model, self._pool, self._sampler, self._kernel = model, pool, sampler, kernel
        self._rows = rows
        self._most_blocks, self._device = most_blocks, sampler.device
        self._on_cpu = self._device.type == "cpu"
        self._mask = torch.empty(1, 1, 1, 1, device=self._device)  # transformers makes none when it is given one

    def prefill(self, chunks: Sequence[Chunk], everywhere: bool = False) -> Tensor:
        """everywhere: logits [T, V] after each token of all chunks, instead."""
        ids = torch.tensor([token for chunk in chunks for token in chunk.ids], device=self._device)
        ends = itertools.accumulate(chunk.end - chunk.start for chunk in chunks)
        last = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.is_last]
        wanted = torch.arange(len(ids)) if everywhere else torch.tensor(last, dtype=torch.long)
        step = self.step(chunks)
        adapters = [chunk.request.adapter for chunk in chunks for _ in range(chunk.start, chunk.end)]
        return self._forward(ids, step, wanted.to(self._device), adapters)

    def step(self, chunks: Sequence[Chunk], most_rows: int = 0) -> AttentionStep:
        """Where the keys and values of these chunks are.

        most_rows: on a GPU each of so few tokens, or fewer, attends by itself, as when an answer is decoded.
        """
        if self._on_cpu:
            return CpuStep(self._pool, chunks)
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        return self._gpu_decode(chunks) if tokens <= most_rows else self._gpu_prefill(chunks)

    def decode(self, requests: Sequence[Request]) -> ModelStep:
        slots = torch.tensor([request.slot for request in requests], device=self._device)
        chunks = [Chunk(request, request.computed, request.computed + 1) for request in requests]
        step = self.step(chunks, most_rows=len(chunks))
        everyone = torch.arange(len(requests), device=self._device)
        adapters = [request.adapter for request in requests]
        return ModelStep([*requests], self._forward(self._sampler.tokens[slots], step, everyone, adapters), slots)

    def verify(self, chunks: Sequence[DraftChunk]) -> VerifiedDrafts:
        return VerifiedDrafts.of(chunks, self.prefill(chunks, everywhere=True), self._sampling_step)

    def _sampling_step(self, requests: Sequence[Request], logits: Tensor, rows: list[int]) -> ModelStep:
        slots = torch.tensor([request.slot for request in requests], device=self._device)
        which = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows  # one row needs no copy
        return ModelStep([*requests], logits[which], slots)

    def _gpu_prefill(self, chunks: Sequence[Chunk]) -> PrefillStep:
        tables = torch.zeros(len(chunks), self._most_blocks, dtype=torch.long)
        positions, kv_index, spans, start = [], [], [], 0
        for table, chunk in zip(tables, chunks, strict=True):
            blocks = torch.tensor(chunk.request.blocks.blocks)
            table[: len(blocks)] = blocks
            position = torch.arange(chunk.start, chunk.end)
            positions.append(position)
            kv_index.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            spans.append((start, start + len(position), chunk.start))
            start += len(position)
        at = torch.cat(positions).to(self._device)
        # On the device once, not in each layer, which would wait for it.
        return PrefillStep(self._pool, at, torch.cat(kv_index).to(self._device), spans, tables.to(self._device))

    def _gpu_decode(self, chunks: Sequence[Chunk]) -> DecodeStep:
        lengths = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        width = max(lengths) // BLOCK_SIZE + 1
        tables = torch.zeros(len(chunks), width, dtype=torch.long)
        for table, chunk in zip(tables, chunks, strict=True):
            blocks = chunk.request.blocks.blocks[:width]
            table[: len(blocks)] = torch.tensor(blocks)
        tables = tables.repeat_interleave(torch.tensor([chunk.end - chunk.start for chunk in chunks]), 0)
        return DecodeStep(self._pool, lengths, tables.to(self._device), self._kernel)

    def _forward(self, ids: Tensor, step: AttentionStep, last: Tensor, adapters: Sequence[int]) -> Tensor:
        """Logits [n, V] at `last`, int64 [n], of tokens ids, int64 [T], each computed by its adapter."""
        with self._rows.taking(adapters) if self._rows else nullcontext():
            output = self._model(
                input_ids=ids[None],
                position_ids=step.positions[None],
                attention_mask=self._mask,
                use_cache=False,
                logits_to_keep=last,
                step=step,
            )
        return output.logits[0].to(self._device)
