"""How many guesses of a head come true, on answers that it has not learned from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat.engine.sampler import LikelyTokens
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.training.draft_data import Answer
from llama2_chat.training.draft_training import embeddings, output_rows, parts_of, states_of, unrolled


@torch.no_grad()
def acceptance(
    model: PreTrainedModel, head: EagleHead, answers: Sequence[Answer], guesses: int, max_length: int
) -> list[float]:
    """How many of 1, 2, ... guesses in a row come true on average, when they begin after any token of these answers
    behind which so many follow.

    A guess is what the engine would make of the head's logits, after the answer's repetition penalty.
    """
    output, starts, true = output_rows(model, head), 0, torch.zeros(guesses)
    ids = torch.arange(model.config.vocab_size) if head.ids is None else head.ids
    ids = ids.to(model.device)
    for answer in answers:
        text = torch.tensor(answer.ids[:max_length], device=model.device)
        first, end = answer.prompt_tokens - 1, len(text) - guesses
        if first >= end:
            continue
        places = torch.arange(first, end, device=text.device)
        seen = _seen(text, model.config.vocab_size)[places][:, ids]
        penalty = torch.tensor(answer.params.repetition_penalty, device=text.device)
        likely = LikelyTokens(seen, penalty.expand(len(places), 1))
        alive = torch.ones(len(places), dtype=torch.bool, device=text.device)
        fused = head.fused(*parts_of(states_of(model, head, text[None]), head))
        steps = unrolled(head, embeddings(model, text[None]), fused, guesses)
        for step, features in enumerate(steps):
            at = places + step
            best, _ = likely.choose(features[0, at] @ output.T, at - at[:1])
            alive &= ids[best] == text[at + 1]
            true[step] += alive.sum().cpu()
        starts += len(places)
    return [round(mean, 3) for mean in (true.cumsum(0) / max(starts, 1)).tolist()]


def _seen(text: Tensor, vocab_size: int) -> Tensor:
    """bool [T, V]: which tokens stand before or at each place."""
    seen = torch.zeros(len(text), vocab_size, device=text.device)
    seen[torch.arange(len(text), device=text.device), text] = 1
    return seen.cumsum(0) > 0
