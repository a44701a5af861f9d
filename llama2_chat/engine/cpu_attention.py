"""Attention over the blocks of a KV pool on a CPU, exact: what a token gets depends on the tokens before it alone, and
not on chunks, on the prefix cache or on who shares the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool
from llama2_chat.engine.paged_attention import Scoring
from llama2_chat.engine.request import Request
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.kernels.fixed_rows import attend_fixed_rows, block_rows, fixed_rows_mask

SHORT_SPANS = (BLOCK_SIZE, 2 * BLOCK_SIZE, 4 * BLOCK_SIZE, 6 * BLOCK_SIZE)  # tokens
PIECE = 32  # tokens that a thread computes at a time
LONG_SPANS = 4 * BLOCK_SIZE  # and its multiples, so that few answers of a step are apart


class Part(NamedTuple):
    """N requests with T tokens each, all between the same two spans: of one chunk, or the newest of some answers."""

    tokens: Tensor  # int64 [N, T]: where they are in the step
    positions: Tensor  # int64 [N, T]
    tables: Tensor  # int64 [N, B]: the blocks of each request that span() takes, padded with block 0


class Pieces(NamedTuple):
    """Tokens in a row of N requests, which one thread computes at a time, as block_attention.py takes them."""

    firsts: NDArray[np.int64]  # [N]: the first token of each piece in the step
    starts: NDArray[np.int64]  # [N]: its position
    ends: NDArray[np.int64]  # [N]: the position behind the last
    tables: NDArray[np.int64]  # [N, B]: the blocks of each request, padded with block 0


class Places(NamedTuple):
    """Where the tokens of a step are, as block_attention.py takes it."""

    tokens: NDArray[np.int64]  # [T]: the block of each times BLOCK_SIZE, and its place there
    pieces: Pieces


@dataclass
class CpuStep:
    """The tokens of a step, [1, T], and where their keys and values are."""

    pool: KVPool
    chunks: Sequence[Chunk]
    _masks: dict[tuple[int, int, Scoring], list[Tensor]] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]."""
        return torch.from_numpy(np.concatenate([np.arange(chunk.start, chunk.end) for chunk in self.chunks]))

    @cached_property
    def places(self) -> Places:
        chunks, positions = self.chunks, self.positions.numpy()
        length = -(-max(chunk.end for chunk in chunks) // BLOCK_SIZE) * BLOCK_SIZE
        tables = block_tables([chunk.request for chunk in chunks], length)
        pieces, first = [], 0
        for number, (start, end) in enumerate((chunk.start, chunk.end) for chunk in chunks):
            pieces += [(first + at - start, at, min(at + PIECE, end), number) for at in range(start, end, PIECE)]
            first += end - start
        pieces.sort(key=lambda piece: -piece[2])  # those that attend to most come first, so that threads end together
        firsts, starts, ends, numbers = np.array(pieces).T.copy()
        blocks = tables[
            np.repeat(np.arange(len(chunks)), [chunk.end - chunk.start for chunk in chunks]), positions // BLOCK_SIZE
        ]
        tokens = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        return Places(tokens, Pieces(firsts, starts, ends, tables[numbers]))

    @cached_property
    def parts(self) -> list[Part]:
        pieces: defaultdict[tuple[int, int], list[tuple[int, Request]]] = defaultdict(list)
        first = 0  # token of the step
        for chunk in self.chunks:
            start = chunk.start
            while start < chunk.end:
                end = min(chunk.end, span(start))
                pieces[end - start, span(start)].append((first, chunk.request))
                first, start = first + end - start, end
        parts = []
        for (count, length), alike in pieces.items():
            firsts, requests = zip(*alike, strict=True)
            tokens = torch.tensor(firsts)[:, None] + torch.arange(count)
            parts.append(Part(tokens, self.positions[tokens], torch.from_numpy(block_tables(requests, length))))
        return parts

    @cached_property
    def _kv_index(self) -> Tensor:
        index = torch.empty_like(self.positions)
        for part in self.parts:
            blocks = part.tables.gather(1, part.positions // BLOCK_SIZE)
            index[part.tokens] = blocks * BLOCK_SIZE + part.positions % BLOCK_SIZE
        return index

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Writes key and value, and lets each token attend to its request so far."""
        self.pool.write(layer, key, value, self._kv_index)
        queries, group = query.transpose(1, 2), query.shape[1] // key.shape[1]  # [1, T, heads, head_dim]
        masks = self._masks_for(group, queries.shape[3], scoring)
        outputs = [
            self._attend_part(layer, part, queries, mask, scoring) for part, mask in zip(self.parts, masks, strict=True)
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat([each.flatten(0, 1) for each in outputs])[self._order]
        return output.reshape(queries.shape).to(query.dtype)

    def _attend_part(self, layer: int, part: Part, queries: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
        """[N, T, heads, head_dim], float32. queries: [1, T, heads, head_dim], of the whole step."""
        q = queries.view(*part.tokens.shape, *queries.shape[2:]) if len(self.parts) == 1 else queries[0, part.tokens]
        k, v = self.pool.read_batch(layer, part.tables)
        return attend_fixed_rows(q, k, v, mask, scoring.scale, scoring.softcap)

    @cached_property
    def _order(self) -> Tensor:
        """Where each token is in the parts, one after another, int64 [T]."""
        return torch.cat([part.tokens.flatten() for part in self.parts]).argsort()

    def _masks_for(self, group: int, head_dim: int, scoring: Scoring) -> list[Tensor]:
        """Of each part, made once for all layers alike."""
        if (group, head_dim, scoring) not in self._masks:
            self._masks[group, head_dim, scoring] = [self._mask(part, group, head_dim, scoring) for part in self.parts]
        return self._masks[group, head_dim, scoring]

    def _mask(self, part: Part, group: int, head_dim: int, scoring: Scoring) -> Tensor:
        length, queries = part.tables.shape[1] * BLOCK_SIZE, part.positions.shape[1] * group
        rows = block_rows(queries, length, head_dim, scoring.softcap)
        return fixed_rows_mask(part.positions, group, length, rows, scoring.window)


def span(position: int) -> int:
    """How many keys are multiplied for a token at this position. What lies behind it is masked.

    The position alone decides it: with other sizes the same sums would be rounded in another order.
    """
    return next((short for short in SHORT_SPANS if position < short), (position // LONG_SPANS + 1) * LONG_SPANS)


def block_tables(requests: Sequence[Request], length: int) -> NDArray[np.int64]:
    """The blocks of each that have its first tokens, `length` of them, [N, B], padded with block 0."""
    width = length // BLOCK_SIZE
    tables = np.zeros((len(requests), width), np.int64)
    for table, request in zip(tables, requests, strict=True):
        blocks = request.blocks.blocks[:width]
        table[: len(blocks)] = blocks
    return tables
