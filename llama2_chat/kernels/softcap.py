"""Attention whose scores a soft cap bounds, as in Gemma 2: PyTorch's own has none."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention of query [N, heads, T, head_dim] over key and value [N, heads, S, head_dim].

    mask: broadcast to [N, heads, T, S]: bool, or 0 and -inf in the type of the query.
    """
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
