"""What LoRA adapters add to linear layers, several adapters in one step: each row takes the one that it names.

The adapters of a layer lie side by side, filled up to one rank. Every row goes through all of them, and what is not of
its own adapter is multiplied by zero: products of the same shapes whoever shares the step, so that a step can be
recorded. What a layer has in its weights, and in how many bits, is nothing to them: they are added to what it gives.

The products are PyTorch's here, as a CPU takes them. On a GPU recorded narrow steps have kernels of their own
(gpu_lora.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama2_chat.kernels.fixed_rows import MANY_ROWS, ROWS

if TYPE_CHECKING:
    from llama2_chat.kernels.int8_rows import Codes


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


class Taken(NamedTuple):
    """Which adapter each row of a step takes.

    adapters: int64 [T], 1 for the first one, 0 for none; mask: [T, columns], 1 in the columns of that one, else 0.
    """

    adapters: Tensor
    mask: Tensor


class AdapterRows:
    """Which adapters there are, and which of them each row of the step that is being computed takes.

    rank: to which all are filled up; multiple: of columns, which are so many for all adapters together.
    """

    def __init__(self, count: int, rank: int, multiple: int, device: torch.device, dtype: torch.dtype) -> None:
        numbers = torch.arange(1, count + 1, device=device).repeat_interleave(rank)
        self._numbers = F.pad(numbers, (0, -len(numbers) % multiple), value=-1)
        self._dtype = dtype
        self.taken: Taken | None = None  # None while no row takes any

    @property
    def columns(self) -> int:
        return len(self._numbers)

    def taken_by(self, adapters: Tensor) -> Taken:
        """adapters: of each row, int64 [T]."""
        return Taken(adapters, (adapters[:, None] == self._numbers).to(self._dtype))

    @contextmanager
    def taking(self, adapters: Sequence[int]) -> Iterator[None]:
        """Layers that are called meanwhile, with a row for each of these, add what the adapters say."""
        if any(adapters):
            self.taken = self.taken_by(torch.tensor(adapters, device=self._numbers.device))
        try:
            yield
        finally:
            self.taken = None


class Lora(nn.Module):
    """The adapters of linear layers that have the same input: one product for all that comes in, then one a layer.

    down: [adapted layers * columns, in]; ups: of each layer [columns, out], or None if no adapter changes it.
    """

    down: Tensor

    def __init__(self, down: Tensor, ups: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        for index, up in enumerate(ups):
            self.register_buffer(f"up{index}", up, persistent=False)
        self._layers = len(ups)

    @classmethod
    def joined(cls, loras: Sequence[Lora | None]) -> Lora:
        """Of several layers, from that of each. Theirs become views of it, so that it takes no more memory."""
        adapted = [lora for lora in loras if lora is not None]
        whole = cls(torch.cat([lora.down for lora in adapted]), [lora.ups[0] if lora else None for lora in loras])
        for lora, down in zip(adapted, whole.down.chunk(len(adapted)), strict=True):
            lora.down = down
        return whole

    @property
    def ups(self) -> list[Tensor | None]:
        return [getattr(self, f"up{index}") for index in range(self._layers)]

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor | None]:
        """What is added to each layer's [..., out] for x [..., in]; mask: [rows of x, columns].

        On a CPU rows go through in blocks of so many that each comes out the same, bit for bit, whoever the others are.
        """
        rows, mask = x.reshape(-1, x.shape[-1]), mask.to(x.device)
        if len(rows) != len(mask):
            raise RuntimeError(f"{len(rows)} rows came into a layer, of a step of {len(mask)}")
        if (block := self._block(rows)) is None:
            added = self._added(rows, mask)
        else:
            rows, mask = (F.pad(each, (0, 0, 0, -len(each) % block)) for each in (rows, mask))
            blocks = [*map(self._added, rows.split(block), mask.split(block))]
            added = blocks[0] if len(blocks) == 1 else [*map(torch.cat, zip(*blocks, strict=True))]
        parts = (part[: x.shape[:-1].numel()].view(*x.shape[:-1], -1) for part in added)
        return [None if up is None else next(parts) for up in self.ups]

    def begin(self, x: Tensor, taken: Taken) -> Tensor | None:
        """What add_to() takes of the same x. Called before the layers compute theirs, it may run beside them."""
        return None

    def add_to(self, y: Tensor, x: Tensor, taken: Taken, widths: Sequence[int], begun: Tensor | None) -> Tensor:
        """y [..., out of all layers], each of so many features, and what is added for x [..., in].

        y may be changed by it, too. begun: what begin() gave.
        """
        parts = zip(y.split([*widths], -1), self(x, taken.mask), strict=True)
        sums = [part if added is None else (part + added).to(part.dtype) for part, added in parts]
        return sums[0] if len(sums) == 1 else torch.cat(sums, -1)

    def _block(self, rows: Tensor) -> int | None:
        """How many rows must be multiplied at a time; None for all."""
        return ROWS if rows.device.type == "cpu" else None

    def _added(self, rows: Tensor, mask: Tensor) -> list[Tensor]:
        """Of the adapted layers alone."""
        return products(rows, mask, self.down, [up for up in self.ups if up is not None])


def products(rows: Tensor, mask: Tensor, down: Tensor, ups: Sequence[Tensor]) -> list[Tensor]:
    """What is added to each layer that has one of these ups, as Lora has them. rows: [T, in]; mask: [T, columns]."""
    hidden = F.linear(rows.to(down.dtype), down).view(len(rows), len(ups), -1) * mask[:, None]
    return [part @ up for part, up in zip(hidden.unbind(1), ups, strict=True)]


class Int8Lora(Lora):
    """The same in 8 bits, beside layers in 8 bits on the CPU: what takes the time is to read A and B.

    down: int8; scale: bfloat16, of each of its rows; ups: int8 [out, columns], 127 being the largest of each column,
    whose size is in the scale. So no adapter is rounded otherwise for the others beside it.
    """

    MULTIPLE = 64  # of in_features and of columns: _weight_int8pack_mm reads past the end of a row of any other length

    def __init__(self, down: Tensor, ups: Sequence[Tensor | None], scale: Tensor) -> None:
        super().__init__(down, ups)
        # Where Python finds them at once: looking for buffers of a module takes as long as the products.
        self._first = down, scale
        self._then = [(up, torch.ones(len(up), dtype=torch.bfloat16)) for up in ups if up is not None]
        self._adapted = [up is not None for up in ups]

    @classmethod
    def of(cls, down: Tensor, up: Tensor) -> Int8Lora:
        """Of one layer, from its A [columns, in] and B [columns, out] in float32."""
        sizes = [each.abs().amax(1, keepdim=True).clamp_(min=1e-12) / 127 for each in (down, up)]
        codes = [(each / size).round_().to(torch.int8) for each, size in zip((down, up), sizes, strict=True)]
        return cls(codes[0], [codes[1].t().contiguous()], (sizes[0] * sizes[1])[:, 0].bfloat16())

    @classmethod
    def joined(cls, loras: Sequence[Any]) -> Int8Lora:
        adapted = [lora for lora in loras if lora is not None]
        down, scale = map(torch.cat, zip(*(lora._first for lora in adapted), strict=True))
        for lora, *first in zip(adapted, down.chunk(len(adapted)), scale.chunk(len(adapted)), strict=True):
            lora.down, lora._first = first[0], tuple(first)
        return cls(down, [lora.ups[0] if lora else None for lora in loras], scale)

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor | None]:
        if x.dim() > 2 or not int8_rows_are_alike(torch.get_num_threads()):
            return super().forward(x, mask)
        added = self._added(x, mask)
        return added if len(added) == len(self._adapted) else [added.pop(0) if each else None for each in self._adapted]

    def _block(self, rows: Tensor) -> int | None:
        return None if int8_rows_are_alike(torch.get_num_threads()) else ROWS

    def _added(self, rows: Tensor, mask: Tensor) -> list[Any]:
        hidden = torch._weight_int8pack_mm(rows.bfloat16(), *self._first).view(len(rows), len(self._then), -1)
        parts = hidden.mul_(mask[:, None]).unbind(1)
        return [torch._weight_int8pack_mm(part, *then) for part, then in zip(parts, self._then, strict=True)]


@cache
def int8_rows_are_alike(threads: int) -> bool:
    """Whether a row comes out of a product with weights in 8 bits with the same bits, however many there are."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (96, 128), dtype=torch.int8, generator=random)
    rows, scale = torch.randn(67, 128, generator=random).bfloat16(), torch.ones(96, dtype=torch.bfloat16)
    whole = torch._weight_int8pack_mm(rows, weight, scale)
    return all(
        torch.equal(torch.cat([torch._weight_int8pack_mm(part, weight, scale) for part in rows.split(size)]), whole)
        for size in (1, ROWS, MANY_ROWS)
    )


class AdaptedLinear(nn.Module):
    """A linear layer and what adapters add to it.

    lora: of this layer alone; None if no adapter changes it.
    """

    def __init__(self, base_layer: nn.Module, lora: Lora | None, rows: AdapterRows) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.lora, self._rows = lora, rows
        self.shared: Lora | None = None  # of all layers that have its input, at the first of them
        self._widths: list[Any] = [self.base_layer.out_features]  # of what they give

    def forward(self, x: Tensor) -> Tensor:
        """By PyTorch's products: where nothing is recorded they take less time to launch than kernels of ours."""
        y, taken = self.base_layer(x), self._rows.taken
        if taken is None or self.lora is None:
            return y
        (added,) = self.lora(x, taken.mask)
        return (y + added).to(y.dtype)

    def begin_all(self, x: Tensor, taken: Taken) -> Tensor | None:
        """What add_to_all() takes of the same x, called before the layers compute theirs."""
        lora = self.lora if self.shared is None else self.shared
        return None if lora is None else lora.begin(x, taken)

    def add_to_all(self, y: Tensor, x: Tensor, taken: Taken, begun: Tensor | None) -> Tensor:
        """What layers that share() an input give for x, side by side, and what adapters add to it; y may be changed."""
        lora = self.lora if self.shared is None else self.shared
        return y if lora is None else lora.add_to(y, x, taken, self._widths, begun)

    def products(self, codes: Codes) -> Tensor:
        """As Int8Linear and JoinedInt8Linear have it."""
        y, taken = self.base_layer.products(codes), self._rows.taken
        lora = self.lora if self.shared is None else self.shared
        if taken is not None and lora is not None:
            parts = y.split(self._widths, -1)
            for part, added in zip(parts, lora(torch.from_numpy(codes.rows), taken.mask), strict=True):
                if added is not None:
                    codes.add_to_products(part, added)
        return y

    def share(self, linears: Sequence[AdaptedLinear]) -> None:
        """Let what adapters add to these layers, which have its input and of which it is the first, begin with one
        product."""
        loras = [linear.lora for linear in linears]
        kind = next(type(lora) for lora in loras if lora is not None)
        self.shared = kind.joined(loras)
        self._widths = [linear.base_layer.out_features for linear in linears]


def stack(adapters: Sequence[LoraWeights], layer: str, rank: int, columns: int) -> tuple[Tensor, Tensor]:
    """A [columns, in] and B [columns, out] of a layer, zeros where an adapter has less than the rank, or nothing."""
    found = [adapter.layers.get(layer) for adapter in adapters]
    one = next(each for each in found if each is not None)
    down, up = torch.zeros(columns, one[0].shape[1]), torch.zeros(columns, one[1].shape[0])
    for index, each in enumerate(found):
        if each is not None:
            own = slice(index * rank, index * rank + len(each[0]))
            down[own], up[own] = each[0], each[1].t()
    return down, up
