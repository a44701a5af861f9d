"""The next tokens of requests that keep few candidates, compiled for the CPU: one pass over each row of logits for the
dozens of engine/sampler.py. kernels/sampling.py does the same on a GPU.

Of two equal scores the one with the lower id comes first, whoever shares the step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llama2_chat.kernels.compiled import LEAST, compiled, exp, of_ordinal, ordinal, part, row_sum

PART = 64  # ids of which the highest score is known
ABOVE_ALL = np.int32(0x7FFFFFFF)  # where a score is NaN


@part
def order_of(score):
    """A whole number, int32, that is ordered as scores are, NaN above all."""
    return ordinal(score) if score == score else ABOVE_ALL


@part
def order_row(logits, orders):
    for id in range(len(orders)):
        orders[id] = order_of(logits[id])


@part
def order_repeated(logits, seen, repetition, orders):
    for id in range(len(orders)):
        logit = logits[id]
        pushed = logit / repetition if logit > 0 else logit * repetition
        orders[id] = order_of(pushed if seen[id] else logit)


@part
def order_penalised(logits, seen, counts, repetition, presence, frequency, orders):
    for id in range(len(orders)):
        logit = logits[id]
        pushed = logit / repetition if logit > 0 else logit * repetition
        score = pushed if seen[id] else logit
        presence_of = presence if counts[id] > 0 else np.float32(0)
        orders[id] = order_of(score - presence_of - frequency * np.float32(counts[id]))


@part
def find_highest(orders, highest):
    """Of each part of orders."""
    for at in range(len(highest)):
        most = -ABOVE_ALL
        for order in orders[at * PART : (at + 1) * PART]:
            most = order if order > most else most
        highest[at] = most


@part
def find_likeliest(orders, highest, best, ids):
    """The highest of orders in descending order, as many as there is room for in best and ids; returns how many.

    highest: of each part of orders.
    """
    found, most = 0, len(best)
    for at in range(len(highest)):
        if found == most and highest[at] <= best[most - 1]:
            continue
        for id in range(at * PART, min((at + 1) * PART, len(orders))):
            order = orders[id]
            if found == most and order <= best[most - 1]:
                continue
            found = min(found + 1, most)
            place = found - 1
            while place > 0 and best[place - 1] < order:
                best[place], ids[place] = best[place - 1], ids[place - 1]
                place -= 1
            best[place], ids[place] = order, id
    return found


@part
def choose(best, chances, settings, draw):
    """The place of what is drawn among the likeliest, as SamplerState.sample() does it.

    best: their orders. chances: room for as many. settings: as sampler.NEUTRAL has them. draw: from 0 to 1.
    """
    temperature, top_k, top_p, min_p = settings[0], settings[1], settings[2], settings[3]
    if temperature == 0:
        return 0
    highest, total = of_ordinal(best[0]), np.float32(0)
    temperature = max(temperature, np.float32(1e-6))
    for rank in range(len(best)):
        gap = (of_ordinal(best[rank]) - highest) / temperature
        chances[rank] = exp(gap) if rank < top_k and gap > LEAST else np.float32(0)
        total += chances[rank]
    so_far, candidates, first = np.float32(0), 0, chances[0] / total
    for rank in range(len(best)):
        chance = chances[rank] / total
        if so_far < top_p and chance > 0 and chance >= min_p * first:
            candidates += 1
        so_far += chance
        chances[rank] = so_far  # of this one and all likelier ones
    last = max(candidates, 1) - 1
    threshold = draw * chances[last]
    for rank in range(last):
        if chances[rank] > threshold:
            return rank
    return last


@compiled(
    "void(float32[:, ::1], int64[::1], float32[:, ::1], float32[:, ::1], int64[::1], int64[::1], int64[::1],"
    " boolean[:, ::1], int32[:, ::1], int32[::1], int32[::1], int32[::1], int32[::1], float32[::1], int64[::1])"
)
def sample_rows(
    logits,
    slots,
    params,
    draws,
    tokens,
    positions,
    answer_tokens,
    seen,
    counts,
    orders,
    highest,
    best,
    ids,
    chances,
    chosen,
):
    padding = len(counts) - 1
    for row in range(len(slots)):
        slot = slots[row]
        settings = params[slot]
        repetition, presence, frequency = settings[4], settings[5], settings[6]
        if presence != 0 or frequency != 0:
            order_penalised(logits[row], seen[slot], counts[slot], repetition, presence, frequency, orders)
        elif repetition != 1:
            order_repeated(logits[row], seen[slot], repetition, orders)
        else:
            order_row(logits[row], orders)
        find_highest(orders, highest)
        found = find_likeliest(orders, highest, best, ids)
        answered = answer_tokens[slot]
        token = np.int64(ids[choose(best[:found], chances, settings, draws[slot, answered])])
        chosen[row] = token if np.isfinite(of_ordinal(best[0])) else -1
        tokens[slot] = token
        positions[slot] = 0 if slot == padding else positions[slot] + 1
        answer_tokens[slot] = min(answered + 1, draws.shape[1] - 1)
        counts[slot, token] += 1
        seen[slot, token] = True


def sample_narrow(logits: Tensor, slots: Tensor, kept: int, *state: Tensor) -> Tensor:
    """The next token of each slot, int64 [N]; -1 where the logits are not finite. The state is brought up to date.

    logits: [N, at least V]; slots: int64 [N]; kept: candidates at most; state: SamplerState.tensors, of V tokens.
    """
    vocabulary = state[-1].shape[1]
    if logits.shape[1] < vocabulary:
        raise ValueError(f"{vocabulary} tokens, and scores of {logits.shape[1]} alone")
    orders, highest = np.empty(vocabulary, np.int32), np.empty(-(-vocabulary // PART), np.int32)
    likeliest = (np.empty(min(kept, vocabulary), kind) for kind in (np.int32, np.int32, np.float32))
    chosen = torch.empty(len(slots), dtype=torch.long)
    rows = logits.detach().float().contiguous()
    arrays = (tensor.numpy() for tensor in (rows, slots, *state))
    sample_rows(*arrays, orders, highest, *likeliest, chosen.numpy())
    return chosen


@row_sum
def sum_of_chances(orders, highest):
    """Of all scores, where the highest one has a chance of 1."""
    total = np.float32(0)
    for id in range(len(orders)):
        total += exp(of_ordinal(orders[id]) - highest)
    return total


@part
def best_of(logits, seen, repetition, orders, highest):
    """The place of the likeliest token, which is seen from then on, and its chance. orders, highest: room."""
    order_repeated(logits, seen, repetition, orders)
    find_highest(orders, highest)
    most, id = highest.max(), highest.argmax() * PART
    while orders[id] != most:
        id += 1
    seen[id] = True
    return id, np.float32(1) / sum_of_chances(orders, of_ordinal(most))


@compiled(
    "void(float32[:, ::1], int64[::1], boolean[:, ::1], float32[:, ::1], int32[::1], int32[::1], int64[::1],"
    " float32[::1])"
)
def find_best(logits, rows, seen, repetition, orders, highest, best, chances):
    for n in range(len(rows)):
        best[n], chances[n] = best_of(logits[n], seen[rows[n]], repetition[rows[n], 0], orders, highest)


def choose_best(logits: Tensor, rows: Tensor, seen: Tensor, repetition: Tensor) -> tuple[Tensor, Tensor]:
    """LikelyTokens.choose(), of what LikelyTokens has. Raises ValueError if that is of another vocabulary."""
    if seen.shape[1] != logits.shape[1]:  # compiled code looks at no bounds
        raise ValueError(f"There are {logits.shape[1]} logits, and {seen.shape[1]} tokens that may have been seen")
    orders, highest = np.empty(logits.shape[1], np.int32), np.empty(-(-logits.shape[1] // PART), np.int32)
    best, chances = torch.empty(len(rows), dtype=torch.long), torch.empty(len(rows))
    scores = logits.detach().float().contiguous()
    kept = rows, seen, repetition.contiguous()
    find_best(*(each.numpy() for each in (scores, *kept)), orders, highest, best.numpy(), chances.numpy())
    return best, chances
