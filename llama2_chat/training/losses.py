"""What a model loses on each conversation: cross-entropy, summed over the tokens of the answers.

Training measures its eval split by it and evaluations everything, so that one figure is the other's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from llama2_chat.prompt import TokenizedExample
from llama2_chat.training.examples import IGNORED, labels

PIECE = 1024  # tokens whose logits are in float32 at once: 131 MB with Llama 2's vocabulary


@torch.no_grad()  # inference_mode() would leave tensors behind that training cannot go on with
def conversation_losses(
    model: Any,  # of transformers, in eval mode
    examples: list[TokenizedExample],
    batch_size: int,
    on_progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """[conversations, 2]: for each, the loss summed over the tokens of its answers, and how many tokens these are."""
    found = np.zeros((len(examples), 2))
    # The longest first: if memory runs out, it does so at once.
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found[batch] = _batch_losses(model, [examples[i] for i in batch])
        on_progress(len(batch))
    return found


def _batch_losses(model: Any, examples: list[TokenizedExample]) -> np.ndarray:
    T = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (T - len(row)) for row in rows], device=model.device)

    input_ids = padded([example.input_ids for example in examples], 0)
    targets = padded([labels(example) for example in examples], IGNORED)[:, 1:]
    mask = padded([[1] * len(example.input_ids) for example in examples], 0)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    counted = targets != IGNORED
    sums = torch.zeros(len(examples), dtype=torch.double, device=model.device)
    for places in counted.nonzero().split(PIECE):
        rows, columns = places.T
        losses = F.cross_entropy(logits[rows, columns].float(), targets[rows, columns], reduction="none")
        sums.index_add_(0, rows, losses.double())
    return torch.stack([sums, counted.sum(1).double()], 1).cpu().numpy()
