"""One product for several layers that are given the same input one after another, as query, key and value are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class SharedProduct:
    """The first of the layers has it computed for all of them.

    compute: what comes in -> what all of them give, side by side, [..., out_features].
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], out_features: int) -> None:
        self._compute, self._out_features = compute, out_features
        self._memo: list[Tensor] = []  # what came in last and what came out, as long as somebody has not asked for it

    def part(self, x: Tensor, start: int, end: int) -> Tensor:
        """What the layer of these output features gives for x."""
        if not self._memo or self._memo[0] is not x:
            self._memo[:] = x, self._compute(x)
        y = self._memo[1][..., start:end]
        if end == self._out_features:  # it was the last
            self._memo.clear()
        return y
