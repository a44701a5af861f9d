"""What LoRA adapters add to linear layers, several adapters in one step: each row takes the one that it names.

The adapters of a layer lie side by side, filled up to one rank. Every row goes through all of them, and what is not of
its own adapter is multiplied by zero: products of the same shapes whoever shares the step, so that a step can be
recorded. What a layer has in its weights, and in how many bits, is nothing to them: they are added to what it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama2_chat.kernels.fixed_rows import ROWS


@dataclass(frozen=True)
class LoraWeights:
    """One adapter.

    layers: by the name of the linear layer in the model, A [rank, in] and B [out, rank], the latter times its scale.
    """

    name: str
    layers: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        return max(len(a) for a, _ in self.layers.values())


class AdapterRows:
    """Which adapter each row of the step that is being computed takes: 1 for the first one, 0 for none."""

    def __init__(self, count: int, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        self._numbers = torch.arange(1, count + 1, device=device).repeat_interleave(rank)
        self._dtype = dtype
        self.mask: Tensor | None = None  # as mask_of() makes it; None while no row takes any

    def mask_of(self, adapters: Tensor) -> Tensor:
        """1 in the columns of each row's adapter, else 0, [T, columns]. adapters: int64 [T]."""
        return (adapters[:, None] == self._numbers).to(self._dtype)

    @contextmanager
    def taking(self, adapters: Sequence[int]) -> Iterator[None]:
        """Layers that are called meanwhile, with a row for each of these, add what the adapters say."""
        if any(adapters):
            mask = self.mask_of(torch.tensor(adapters, device=self._numbers.device))
            self.mask = F.pad(mask, (0, 0, 0, -len(mask) % ROWS)) if mask.device.type == "cpu" else mask
        try:
            yield
        finally:
            self.mask = None


class Lora(nn.Module):
    """The adapters of linear layers that have the same input: one product for all that comes in, then one a layer.

    down: [adapted layers * columns, in], columns being adapters times rank; ups: of each layer [columns, out], or None
    if no adapter changes it.
    """

    down: Tensor

    def __init__(self, down: Tensor, ups: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        for index, up in enumerate(ups):
            self.register_buffer(f"up{index}", up, persistent=False)
        self._layers = len(ups)

    @property
    def ups(self) -> list[Tensor | None]:
        return [getattr(self, f"up{index}") for index in range(self._layers)]

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor | None]:
        """What is added to each layer's [..., out] for x [..., in]; mask: [rows of x, columns].

        On a CPU the mask has a multiple of ROWS rows, and rows go through in blocks of so many: each comes out the
        same, bit for bit, whoever the others are.
        """
        rows, mask = x.reshape(-1, x.shape[-1]).to(self.down.dtype), mask.to(x.device)
        if x.device.type != "cpu":
            added = self._added(rows, mask)
        else:
            padded = F.pad(rows, (0, 0, 0, len(mask) - len(rows))) if len(mask) > len(rows) else rows
            blocks = [*map(self._added, padded.split(ROWS), mask.split(ROWS))]
            added = blocks[0] if len(blocks) == 1 else [*map(torch.cat, zip(*blocks, strict=True))]
        parts = (part[: len(rows)].view(*x.shape[:-1], -1) for part in added)
        return [None if up is None else next(parts) for up in self.ups]

    def _added(self, rows: Tensor, mask: Tensor) -> list[Tensor]:
        """Of the adapted layers alone."""
        ups = [up for up in self.ups if up is not None]
        hidden = F.linear(rows, self.down).view(len(rows), len(ups), -1) * mask[:, None]
        return [part @ up for part, up in zip(hidden.unbind(1), ups, strict=True)]


class AdaptedLinear(nn.Module):
    """A linear layer and what adapters add to it.

    lora: of this layer alone; None if no adapter changes it.
    """

    def __init__(self, base_layer: nn.Module, lora: Lora | None, rows: AdapterRows) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.lora, self._rows = lora, rows
        self.shared: Lora | None = None  # of all layers that have its input, at the first of them
        self._widths: list[int] = []  # of what they give

    def forward(self, x: Tensor) -> Tensor:
        y, mask = self.base_layer(x), self._rows.mask
        if mask is None or self.lora is None:
            return y
        (added,) = self.lora(x, mask)
        return (y + added).to(y.dtype)

    def of_rows(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """As Int8Linear has it."""
        y, mask = self.base_layer.of_rows(rows, added), self._rows.mask
        if mask is None or self.lora is None:
            return y
        (more,) = self.lora(rows, mask)
        return y.add_(more)

    def together(self, rows: Tensor) -> Tensor:
        """As JoinedInt8Linear has it."""
        y, mask = self.base_layer.together(rows), self._rows.mask
        if mask is not None and self.shared is not None:
            for part, added in zip(y.split(self._widths, -1), self.shared(rows, mask), strict=True):
                if added is not None:
                    part += added
        return y

    def share(self, linears: Sequence[AdaptedLinear]) -> None:
        """Let what adapters add to these layers, which have its input and of which it is the first, begin with one
        product."""
        loras = [linear.lora for linear in linears if linear.lora is not None]
        whole = torch.cat([lora.down for lora in loras])
        for lora, down in zip(loras, whole.chunk(len(loras)), strict=True):
            lora.down = down
        self.shared = Lora(whole, [linear.lora.ups[0] if linear.lora else None for linear in linears])
        self._widths = [linear.base_layer.out_features for linear in linears]


def stack(adapters: Sequence[LoraWeights], layer: str, rank: int) -> tuple[Tensor, Tensor]:
    """A [adapters * rank, in] and B [adapters * rank, out] of a layer, zeros where an adapter has less or nothing."""
    found = [adapter.layers.get(layer) for adapter in adapters]
    one = next(each for each in found if each is not None)
    down = torch.zeros(len(adapters), rank, one[0].shape[1])
    up = torch.zeros(len(adapters), rank, one[1].shape[0])
    for index, each in enumerate(found):
        if each is not None:
            down[index, : len(each[0])], up[index, : len(each[0])] = each[0], each[1].t()
    return down.flatten(0, 1), up.flatten(0, 1)
