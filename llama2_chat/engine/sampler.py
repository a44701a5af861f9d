"""The next token of every running request at once: penalties, temperature, top-k, top-p, in the order `generate` has.

`SamplerState` holds what the decode step reads and writes, a row for each slot, on the model's device, so that a step
needs nothing from the host. Random numbers are drawn on the CPU when a request joins, from a generator of its
own: a seed gives the same answer on any device and in any company.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama2_chat.types import SamplingParams

NARROW = 64  # requests that keep no more candidates than this are sorted by topk(), the others whole


def is_narrow(params: SamplingParams) -> bool:
    return params.temperature == 0 or 0 < params.top_k <= NARROW


def draws(params: SamplingParams, limit: int) -> Tensor:
    """The random numbers of an answer of up to `limit` tokens, float32 [limit], each from 0 to 1.

    A longer answer begins with the same numbers.
    """
    generator = torch.Generator()
    generator.manual_seed(params.seed) if params.seed is not None else generator.seed()
    return torch.rand(limit, generator=generator)


def restrict(logits: Tensor, rows: list[int], masks: Tensor) -> None:
    """In these rows of logits [N, V] leave only the ids whose bit is set in masks, int32 [n, V / 32] on the CPU."""
    masks = masks.to(logits.device, non_blocking=True)
    allowed = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    allowed = allowed.flatten(1)[:, : logits.shape[1]].bool()
    at = torch.tensor(rows, device=logits.device)
    logits[at] = torch.where(allowed, logits[at], -torch.inf)


class SamplerState:
    """The state of up to `slots` requests. One slot more takes what padding computes, and is never read."""

    def __init__(self, slots: int, vocab_size: int, max_new_tokens: int, device: torch.device) -> None:
        R, V = slots + 1, vocab_size
        self.padding = slots
        self.vocab_size = V
        self.device = device
        self.tokens = torch.zeros(R, dtype=torch.long, device=device)  # the newest id, whose keys are not yet computed
        self.positions = torch.zeros(R, dtype=torch.long, device=device)  # where it stands
        self._answer_tokens = torch.zeros(R, dtype=torch.long, device=device)
        self._draws = torch.zeros(R, max_new_tokens, device=device)
        self._counts = torch.zeros(R, V, dtype=torch.int32, device=device)  # how often each token is in the answer
        self._seen = torch.zeros(R, V, dtype=torch.bool, device=device)  # in prompt or answer
        self._true = torch.ones((), dtype=torch.bool, device=device)  # a CUDA graph takes no value from the host
        # temperature, top_k, top_p, repetition, presence and frequency penalty; padding is greedy
        self._params = torch.tensor([[0, 1, 1, 1, 0, 0]], dtype=torch.float32, device=device).repeat(R, 1)

    def join(self, slot: int, ids: Sequence[int], answer_tokens: int, params: SamplingParams, draws: Tensor) -> None:
        """Make a slot ready for a request of which ids are known, the last answer_tokens of them its answer so far."""
        self.positions[slot] = len(ids) - 1
        self._answer_tokens[slot] = answer_tokens
        self._draws[slot, : len(draws)] = draws.to(self.device)
        top_k = params.top_k or self.vocab_size
        values = (params.temperature, top_k, params.top_p, params.repetition_penalty)
        penalties = (params.presence_penalty, params.frequency_penalty)
        self._params[slot] = torch.tensor([*values, *penalties], dtype=torch.float32, device=self.device)
        known = torch.tensor(ids, dtype=torch.long, device=self.device)
        self._seen[slot] = False
        self._seen[slot].index_fill_(0, known, True)
        self._counts[slot] = 0
        if answer_tokens:
            self._counts[slot] = known[-answer_tokens:].bincount(minlength=self.vocab_size)[: self.vocab_size].int()

    def sample(self, logits: Tensor, slots: Tensor, kept: int) -> Tensor:
        """The next token of each slot, int64 [N], which the slots now hold; -1 where the logits are not finite.

        logits: [N, V]. slots: int64 [N]. kept: NARROW if all requests are narrow, else the size of the vocabulary.
        """
        scores = self._penalise(logits[:, : self.vocab_size].float(), slots)
        temperature, top_k, top_p = self._params[slots, :3].unbind(1)
        scores, ids = scores.topk(min(kept, self.vocab_size))  # in descending order; NaN sorts first
        highest = scores[:, :1]
        ranks = torch.arange(scores.shape[1], device=scores.device)
        scores = torch.where(ranks < top_k[:, None], scores, -torch.inf)
        # Below 1e-6 the division would overflow float32, and the likeliest token takes everything anyway.
        probs = torch.softmax((scores - highest) / temperature.clamp(min=1e-6)[:, None], dim=-1)
        cumulative = probs.cumsum(dim=-1)
        # Exclude zero-probability tokens: rounding in cumsum could select one.
        candidates = (cumulative - probs < top_p[:, None]) & (probs > 0)
        last = candidates.sum(dim=-1, keepdim=True).clamp(min=1) - 1
        threshold = self._draws[slots, self._answer_tokens[slots]][:, None] * cumulative.gather(1, last)
        chosen = torch.minimum((cumulative <= threshold).sum(dim=-1, keepdim=True), last)
        chosen = torch.where(temperature[:, None] == 0, 0, chosen)
        tokens = ids.gather(1, chosen)[:, 0]
        self.tokens[slots] = tokens
        self.positions[slots] = torch.where(slots == self.padding, 0, self.positions[slots] + 1)
        self._answer_tokens[slots] = (self._answer_tokens[slots] + 1).clamp(max=self._draws.shape[1] - 1)
        self._counts[slots, tokens] += 1
        self._seen.index_put_((slots, tokens), self._true)
        return torch.where(highest[:, 0].isfinite(), tokens, -1)

    def _penalise(self, scores: Tensor, slots: Tensor) -> Tensor:
        repetition, presence, frequency = self._params[slots, 3:, None].unbind(1)
        pushed = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(self._seen[slots], pushed, scores)
        counts = self._counts[slots]
        return scores - presence * (counts > 0) - frequency * counts
