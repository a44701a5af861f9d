"""Perplexity from the losses of conversations, with a 95 % interval by the bootstrap. Nothing here knows models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

RESAMPLES = 1000  # bootstrap samples of the conversations


@dataclass(frozen=True)
class Measurement:
    """A model's losses in one precision on one split of the conversations."""

    model: str
    precision: str
    fold: int | None  # from 1, of a run with folds
    split: str  # one of chat_data.SPLITS
    losses: np.ndarray  # [conversations, 2]: the loss summed over the tokens of the answers, and how many they are
    seconds: float
    memory_gb: float

    @property
    def conversations(self) -> int:
        return len(self.losses)

    @property
    def tokens(self) -> int:
        return int(self.losses[:, 1].sum())

    @property
    def loss(self) -> float:
        """The mean over all tokens."""
        total, tokens = self.losses.sum(0)
        return float(total / tokens)

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the perplexity; None for a single conversation."""
        return bootstrap_interval(self.losses)


def bootstrap_interval(losses: np.ndarray, base_losses: np.ndarray | None = None) -> tuple[float, float] | None:
    """The 95 % interval of the perplexity, or of its ratio to a base's on the same conversations.

    losses, base_losses: as in Measurement. None if there is only one conversation.
    """
    N = len(losses)
    if N < 2:
        return None
    random, each = np.random.default_rng(0), np.full(N, 1 / N)
    columns = losses if base_losses is None else np.hstack([losses, base_losses])
    with np.errstate(invalid="ignore"):  # a broken model's losses are NaN
        # How often each conversation is drawn, as floats, so that BLAS multiplies them. One sample at a time: all of
        # them at once would take 8 KB for each conversation.
        sums = np.stack([random.multinomial(N, each).astype(float) @ columns for _ in range(RESAMPLES)])
        logs = sums[:, 0] / sums[:, 1] - (0 if base_losses is None else sums[:, 2] / sums[:, 3])
        low, high = np.percentile(logs, (2.5, 97.5))
    return exp(low), exp(high)


def exp(loss: float) -> float:
    """e to the loss: infinity where math.exp would raise OverflowError, NaN for NaN."""
    if math.isnan(loss):
        return math.nan
    return math.exp(loss) if loss < 700 else math.inf
