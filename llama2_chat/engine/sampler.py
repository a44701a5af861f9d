"""The next token of every running request at once: penalties, temperature, top-k, top-p, min-p, in `generate`'s order.

`SamplerState` holds what the decode step reads and writes, a row for each slot, on the model's device, so that a step
needs nothing from the host. Random numbers are drawn on the CPU when a request joins, from a generator of its
own: a seed gives the same answer on any device and in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama2_chat.types import SamplingParams

LEAST_LOGPROB = -9999.0  # which OpenAI writes; JSON has no infinity
NARROW = 64  # requests that keep no more candidates than this are sorted by topk(), the others whole
# Every setting that sample() reads, with the value that padding has: greedy, nothing penalised.
NEUTRAL = {
    "temperature": 0.0,
    "top_k": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def is_narrow(params: SamplingParams) -> bool:
    return params.temperature == 0 or 0 < params.top_k <= NARROW


def draws(params: SamplingParams, limit: int) -> Tensor:
    """The random numbers of an answer of up to `limit` tokens, float32 [limit], each from 0 to 1.

    A longer answer begins with the same numbers.
    """
    generator = torch.Generator()
    generator.manual_seed(params.seed) if params.seed is not None else generator.seed()
    return torch.rand(limit, generator=generator)


def restrict(logits: Tensor, indices: list[int], masks: Tensor) -> None:
    """Leave in logits[indices] only the ids whose bit is set in masks.

    logits: [N, V]. indices: n of the N. masks: int32 [n, V / 32], on the CPU.
    """
    if logits.device.type == "cpu":  # where NumPy unpacks bits at once
        bits = (~masks).numpy().view(np.uint8)
        forbidden = np.unpackbits(bits, axis=1, count=logits.shape[1], bitorder="little")
        for index, ids in zip(indices, torch.from_numpy(forbidden).view(torch.bool), strict=True):
            logits[index].masked_fill_(ids, -torch.inf)
        return
    masks = masks.to(logits.device, non_blocking=True)
    allowed = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    allowed = allowed.flatten(1)[:, : logits.shape[1]].bool()
    at = torch.tensor(indices, device=logits.device)
    logits[at] = torch.where(allowed, logits[at], -torch.inf)


class Likeliest(NamedTuple):
    """What the model found likely in some rows of a step's logits, before anything changes them."""

    rows: list[int]
    logprobs: Tensor  # float32 [n, V]
    top: Tensor  # [n, k], the likeliest first
    ids: Tensor  # int64 [n, k], of `top`

    @classmethod
    def of(cls, logits: Tensor, rows: list[int], most: int) -> Likeliest:
        """logits: [N, V]. most: k."""
        logprobs = logits[torch.tensor(rows, device=logits.device)].float().log_softmax(-1).clamp(min=LEAST_LOGPROB)
        return cls(rows, logprobs, *logprobs.topk(min(most, logits.shape[1])))

    def chosen(self, tokens: Tensor) -> Tensor:
        """Of what was chosen in each row, [n]. tokens: int64 [N]; -1 is nothing."""
        tokens = tokens[torch.tensor(self.rows, device=tokens.device)].clamp(min=0)
        return self.logprobs.gather(1, tokens[:, None])[:, 0]


def biased(logits: Tensor, biases: Mapping[int, Sequence[tuple[int, float]]]) -> Tensor:
    """Logits, float32 [N, V], with what is added to some of them; those of other rows stay bit for bit.

    logits: [N, V], left as they are. biases: of some of the N, pairs of an id and what is added to its logit.
    """
    entries = [(row, id, value) for row, bias in biases.items() for id, value in bias]
    rows, ids, values = (torch.tensor(column, device=logits.device) for column in zip(*entries, strict=True))
    return logits.to(torch.float32, copy=True).index_put_((rows, ids), values.float(), accumulate=True)


@dataclass
class LikelyTokens:
    """The likeliest token of some rows, and how likely it is, after the repetition penalty of each."""

    seen: Tensor  # bool [N, v]: which tokens are in prompt or answer, those that were chosen here included
    repetition: Tensor  # [N, 1]

    def choose(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Their places in the vocabulary, int64 [n], and chances, [n]. logits: [n, v]. rows: int64 [n], of the N."""
        if logits.device.type == "cpu":
            from llama2_chat.kernels.cpu_sampling import choose_best  # compiled, which nobody else needs

            return choose_best(logits, rows, self.seen, self.repetition)
        scores, repetition = logits.float(), self.repetition[rows]
        pushed = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(self.seen[rows], pushed, scores)
        highest, best = scores.max(-1, keepdim=True)
        self.seen[rows, best[:, 0]] = True
        return best[:, 0], 1 / (scores - highest).exp().sum(-1)


class SamplerState:
    """The state of up to `slots` requests. One slot more takes what padding computes, and is never read.

    sample_narrow: of kernels/sampling.py or kernels/cpu_sampling.py, where it runs.
    """

    def __init__(
        self,
        slots: int,
        vocab_size: int,
        max_new_tokens: int,
        device: torch.device,
        sample_narrow: Callable[..., Tensor] | None = None,
    ) -> None:
        S, V = slots + 1, vocab_size
        self.padding = slots
        self.vocab_size = V
        self.device = device
        # Of each slot: its newest id, whose keys are not yet computed, and where that stands.
        self.newest = torch.zeros(2, S, dtype=torch.long, device=device)
        self.tokens, self.positions = self.newest
        self._answer_tokens = torch.zeros(S, dtype=torch.long, device=device)
        self._draws = torch.zeros(S, max_new_tokens, device=device)
        self._counts = torch.zeros(S, V, dtype=torch.int32, device=device)  # how often each token is in the answer
        self._seen = torch.zeros(S, V, dtype=torch.bool, device=device)  # in prompt or answer
        self._true = torch.ones((), dtype=torch.bool, device=device)  # a CUDA graph takes no value from the host
        # A column for each setting of NEUTRAL.
        self._params = torch.tensor([list(NEUTRAL.values())], dtype=torch.float32, device=device).repeat(S, 1)
        self._sample_narrow = sample_narrow

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As kernels.sampling takes it."""
        return self._params, self._draws, self.tokens, self.positions, self._answer_tokens, self._seen, self._counts

    def join(self, slot: int, ids: Sequence[int], answer_tokens: int, params: SamplingParams, draws: Tensor) -> None:
        """Make a slot ready for a request of which ids are known, the last answer_tokens of them its answer so far."""
        self.positions[slot] = len(ids) - 1
        self._answer_tokens[slot] = answer_tokens
        self._draws[slot, : len(draws)] = draws.to(self.device)
        self._params[slot] = self._settings([params])[0]
        known = torch.tensor(ids, dtype=torch.long, device=self.device)
        self._seen[slot] = False
        self._seen[slot].index_fill_(0, known, True)
        self._counts[slot] = 0
        if answer_tokens:
            self._counts[slot] = known[-answer_tokens:].bincount(minlength=self.vocab_size)[: self.vocab_size].int()

    def join_all(
        self, slots: Tensor, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], draws: Tensor
    ) -> None:
        """join() of many requests that have no answer yet. slots: int64 [n]. draws: [n, max_new_tokens]."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.positions[slots], self._answer_tokens[slots] = lengths - 1, 0
        self._draws[slots] = draws.to(self.device)
        self._params[slots] = self._settings(params)
        self._seen[slots], self._counts[slots] = False, 0
        known = torch.tensor([id for prompt in prompts for id in prompt], device=self.device)
        self._seen.index_put_((slots.repeat_interleave(lengths), known), self._true)

    def _settings(self, params: Sequence[SamplingParams]) -> Tensor:
        """A row for each, as _params has it."""
        rows = [vars(each) | {"top_k": each.top_k or self.vocab_size} for each in params]
        values = [[row[name] for name in NEUTRAL] for row in rows]
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def sample(self, logits: Tensor, slots: Tensor, kept: int) -> Tensor:
        """The next token of each slot, int64 [N], which the slots now hold; -1 where the logits are not finite.

        logits: [N, V]. slots: int64 [N]. kept: NARROW if all requests are narrow, else the size of the vocabulary.
        """
        if self._sample_narrow is not None and kept == NARROW:
            return self._sample_narrow(logits, slots, kept, *self.tensors)
        params = dict(zip(NEUTRAL, self._params[slots, :, None].unbind(1), strict=True))  # each [N, 1]
        temperature = params["temperature"]
        scores = self._penalise(logits[:, : self.vocab_size].float(), slots, params)
        scores, ids = scores.topk(min(kept, self.vocab_size))
        highest = scores[:, :1]
        ranks = torch.arange(scores.shape[1], device=scores.device)
        scores = torch.where(ranks < params["top_k"], scores, -torch.inf)
        # Below 1e-6 the division would overflow float32, and the likeliest token takes everything anyway.
        probs = torch.softmax((scores - highest) / temperature.clamp(min=1e-6), dim=-1)
        cumulative = probs.cumsum(dim=-1)
        # Exclude zero-probability tokens: rounding in cumsum could select one.
        candidates = (cumulative - probs < params["top_p"]) & (probs > 0) & (probs >= params["min_p"] * probs[:, :1])
        last = candidates.sum(dim=-1, keepdim=True).clamp(min=1) - 1
        threshold = self._draws[slots, self._answer_tokens[slots]][:, None] * cumulative.gather(1, last)
        chosen = torch.minimum((cumulative <= threshold).sum(dim=-1, keepdim=True), last)
        chosen = torch.where(temperature == 0, 0, chosen)
        tokens = ids.gather(1, chosen)[:, 0]
        self.tokens[slots] = tokens
        self.positions[slots] = torch.where(slots == self.padding, 0, self.positions[slots] + 1)
        self._answer_tokens[slots] = (self._answer_tokens[slots] + 1).clamp(max=self._draws.shape[1] - 1)
        self._counts[slots, tokens] += 1
        self._seen.index_put_((slots, tokens), self._true)
        return torch.where(highest[:, 0].isfinite(), tokens, -1)

    def likely(self, slots: Tensor, ids: Tensor | None) -> LikelyTokens:
        """What a model that guesses would have these slots, int64 [N], say. ids: as LikelyTokens takes them."""
        repetition = list(NEUTRAL).index("repetition_penalty")
        if self.device.type == "cpu":  # where NumPy has found them sooner than PyTorch begins
            at = slots.numpy()
            seen = self._seen.numpy()[at]
            known = torch.from_numpy(seen if ids is None else seen.take(ids.numpy(), 1))
            return LikelyTokens(known, torch.from_numpy(self._params.numpy()[at, repetition, None]))
        seen = self._seen[slots] if ids is None else self._seen[slots[:, None], ids]
        return LikelyTokens(seen, self._params[slots, repetition, None])

    def _penalise(self, scores: Tensor, slots: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        repetition = params["repetition_penalty"]
        if self.device.type == "cpu" and all(bool((params[name] == NEUTRAL[name]).all()) for name in PENALTIES):
            return scores  # as below, without reading and writing the vocabulary several times
        pushed = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(self._seen[slots], pushed, scores)
        counts = self._counts[slots]
        return scores - params["presence_penalty"] * (counts > 0) - params["frequency_penalty"] * counts
