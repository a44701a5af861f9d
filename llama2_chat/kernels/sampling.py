"""The next tokens of requests that keep few candidates, in Triton: two kernels for the dozens of engine/sampler.py.

Every part of the vocabulary gives its likeliest tokens, and one program for each request chooses among those. Of two
equal scores the one with the lower id comes first, however many requests share the step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_PART, MOST_PARTS = 1024, 32  # ids that one program looks at, at least; programs for each request


@triton.jit
def _likeliest_kernel(
    logits,
    row_stride,
    slots,
    settings,
    seen,
    counts,
    likeliest,
    VOCABULARY: tl.constexpr,
    SETTINGS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """One request, one part of the vocabulary: its likeliest ids once penalties are taken off, and their scores."""
    row, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    ids = part * PART + tl.arange(0, PART)
    inside = ids < VOCABULARY
    scores = tl.load(logits + row * row_stride + ids, mask=inside, other=0.0).to(tl.float32)
    repetition, presence, frequency = (
        tl.load(settings + slot * SETTINGS + 4),
        tl.load(settings + slot * SETTINGS + 5),
        tl.load(settings + slot * SETTINGS + 6),
    )
    if repetition != 1:
        is_seen = tl.load(seen + slot * VOCABULARY + ids, mask=inside, other=0) != 0
        pushed = tl.where(scores > 0, tl.div_rn(scores, repetition), scores * repetition)
        scores = tl.where(is_seen, pushed, scores)
    if (presence != 0) | (frequency != 0):
        count = tl.load(counts + slot * VOCABULARY + ids, mask=inside, other=0).to(tl.float32)
        scores = scores - tl.where(count > 0, presence, 0.0) - frequency * count
    # As whole numbers that are ordered as the scores are, NaN above all, with the id below them.
    bits = scores.to(tl.int32, bitcast=True)
    order = tl.where(scores != scores, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    keys = tl.where(inside, keys, -0x8000000000000000)
    tl.store(likeliest + (row * PARTS + part) * KEPT + tl.arange(0, KEPT), tl.topk(keys, KEPT))


@triton.jit
def _choose_kernel(
    likeliest,
    slots,
    settings,
    draws,
    draws_width,
    tokens,
    positions,
    answer_tokens,
    seen,
    counts,
    chosen_tokens,
    padding,
    VOCABULARY: tl.constexpr,
    SETTINGS: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """One request: SamplerState.sample() from the likeliest ids of all parts on."""
    row, ranks = tl.program_id(0), tl.arange(0, KEPT)
    slot = tl.load(slots + row)
    keys = tl.topk(tl.load(likeliest + row * (PARTS * KEPT) + tl.arange(0, PARTS * KEPT)), KEPT)
    ids = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    order = (keys >> 32).to(tl.int32)
    scores = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    scores = tl.where(ids < VOCABULARY, scores, float("-inf"))  # what fills the parts of a small vocabulary
    highest = tl.sum(tl.where(ranks == 0, scores, 0.0))
    temperature, top_k = tl.load(settings + slot * SETTINGS), tl.load(settings + slot * SETTINGS + 1)
    top_p, min_p = tl.load(settings + slot * SETTINGS + 2), tl.load(settings + slot * SETTINGS + 3)
    weights = tl.where(ranks < top_k, tl.exp((scores - highest) / tl.maximum(temperature, 1e-6)), 0.0)
    probs = weights / tl.sum(weights)
    cumulative = tl.cumsum(probs)
    first = tl.sum(tl.where(ranks == 0, probs, 0.0))
    candidates = (cumulative - probs < top_p) & (probs > 0) & (probs >= min_p * first)
    last = tl.maximum(tl.sum(candidates.to(tl.int32)), 1) - 1
    answered = tl.load(answer_tokens + slot)
    draw = tl.load(draws + slot * draws_width + answered)
    threshold = draw * tl.sum(tl.where(ranks == last, cumulative, 0.0))
    chosen = tl.minimum(tl.sum((cumulative <= threshold).to(tl.int32)), last)
    chosen = tl.where(temperature == 0, 0, chosen)
    token = tl.sum(tl.where(ranks == chosen, ids, 0)).to(tl.int64)
    is_finite = tl.abs(highest) < float("inf")
    tl.store(chosen_tokens + row, tl.where(is_finite, token, -1))
    tl.store(tokens + slot, token)
    position = tl.load(positions + slot)
    tl.store(positions + slot, tl.where(slot == padding, 0, position + 1))
    tl.store(answer_tokens + slot, tl.minimum(answered + 1, draws_width - 1))
    at = slot * VOCABULARY + token
    tl.store(counts + at, tl.load(counts + at) + 1)
    tl.store(seen + at, 1)


def sample_narrow(
    logits: Tensor,
    slots: Tensor,
    kept: int,
    params: Tensor,
    draws: Tensor,
    tokens: Tensor,
    positions: Tensor,
    answer_tokens: Tensor,
    seen: Tensor,
    counts: Tensor,
) -> Tensor:
    """The next token of each slot, int64 [N]; -1 where the logits are not finite. The state is brought up to date.

    logits: [N, at least V]; slots: int64 [N], the last of S may be there several times and is padding; kept: candidates
    at most, a power of two; of S slots, as SamplerState has it: params, float32 [S, 7] in the order of NEUTRAL, draws,
    float32 [S, D], tokens, positions and answer_tokens, int64 [S], seen, bool [S, V], counts, int32 [S, V].
    """
    N, (slots_in_all, vocabulary) = len(slots), counts.shape
    part = max(LEAST_PART, triton.next_power_of_2(-(-vocabulary // MOST_PARTS)))
    parts = triton.next_power_of_2(-(-vocabulary // part))
    likeliest = torch.empty(N, parts, kept, dtype=torch.int64, device=logits.device)
    chosen = torch.empty(N, dtype=torch.int64, device=logits.device)
    sizes = {"VOCABULARY": vocabulary, "SETTINGS": params.shape[1], "PARTS": parts, "KEPT": kept}
    seen = seen.view(torch.uint8)
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        _likeliest_kernel[N, parts](
            logits, logits.stride(0), slots, params, seen, counts, likeliest, PART=part, **sizes, num_warps=4
        )
        _choose_kernel[(N,)](
            likeliest,
            slots,
            params,
            draws,
            draws.shape[1],
            tokens,
            positions,
            answer_tokens,
            seen,
            counts,
            chosen,
            slots_in_all - 1,
            **sizes,
            num_warps=8,
        )
    return chosen
