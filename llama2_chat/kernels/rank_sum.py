"""Sums over the processes that compute one model together, each with a part of its heads and of its MLP.

Recorded steps add them to the residual stream and normalise that at once: kernels/sum_and_norm.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_this_thread = threading.local()


@contextmanager
def together(with_others: bool = True) -> Iterator[None]:
    """What this thread computes meanwhile, the other processes compute too: products are summed over all of them.

    Elsewhere, and where with_others is False, a SummedLinear gives its own part alone, as probing a shape or compiling
    a layer asks for it: nobody waits for a process that does something else.
    """
    before = is_together()
    _this_thread.together = with_others
    try:
        yield
    finally:
        _this_thread.together = before


def is_together() -> bool:
    return getattr(_this_thread, "together", False)


class SummedLinear(nn.Module):
    """A linear layer of whose input each process has a part: what they make of it is summed.

    part: the layer of this process; a bias is added by one of them alone.
    """

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part
        self.in_features, self.out_features = part.in_features, part.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        torch.ops.llama2_chat.rank_sum_(y)
        return y


@torch.library.custom_op("llama2_chat::rank_sum_", mutates_args=("x",))
def rank_sum_(x: Tensor) -> None:
    """Make x its sum over all processes, within together(). A custom operator: torch.compile takes it as it is."""
    if is_together():
        dist.all_reduce(x)


@rank_sum_.register_fake
def _(x: Tensor) -> None:
    pass
