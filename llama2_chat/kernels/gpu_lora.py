"""What LoRA adapters add to linear layers on a GPU. Narrow steps, as those that decode, have two Triton kernels for all
layers with the same input, where PyTorch's products and sums are some five for each; wide ones, as prompts, have those.

The first kernel multiplies with A, in parts of the input, so that enough programs read it; the second sums these in an
order that never changes, multiplies with B and adds to what the layers gave. Of each row only its own adapter's part is
written and read, and a program computes as many rows whoever they are: a row's bits depend neither on the others nor on
how many there are. Custom operators, so that torch.compile takes them as they are.

The first needs the input alone. In a recorded step it runs beside the layers' own product, on a stream of its own; the
second waits for both. x is an argument of both operators, so that nothing takes its memory while the first reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2_chat.kernels.lora import Lora, Taken, products

MOST_ROWS = 64  # above, PyTorch's products are faster
MOST_RANK = 128
ROWS = 16  # per program, the fewest that tensor cores take
COLUMNS = 16  # of A's, per program
CHUNK_BYTES = 1024  # of each column's inputs, per program
OUTPUTS = 128  # per program
AT_ONCE = 64  # B's columns that are multiplied at once, or those of one adapter
PARTS_AT_ONCE = 8192  # numbers that are summed at once


class GpuLora(Lora):
    """up: what the ups are views of, those of the adapted layers side by side; rank: of each adapter."""

    up: Tensor

    def __init__(self, down: Tensor, ups: Sequence[Tensor | None], up: Tensor, rank: int) -> None:
        super().__init__(down, ups)
        self.register_buffer("up", up, persistent=False)
        self._rank = rank

    @classmethod
    def joined(cls, loras: Sequence[Any]) -> GpuLora:
        adapted = [lora for lora in loras if lora is not None]
        down, up = torch.cat([lora.down for lora in adapted]), torch.cat([lora.up for lora in adapted], 1)
        ups = up.split([lora.up.shape[1] for lora in adapted], 1)
        for lora, own_down, own_up in zip(adapted, down.chunk(len(adapted)), ups, strict=True):
            lora.down, lora.up, lora.up0 = own_down, own_up, own_up
        return cls(down, [lora.up if lora else None for lora in loras], up, adapted[0]._rank)

    def begin(self, x: Tensor, taken: Taken) -> Tensor:
        adapters = taken.adapters.to(x.device)
        return torch.ops.llama2_chat.begin_adapters(x, adapters, self.down, len(self.up), self._rank)

    def add_to(self, y: Tensor, x: Tensor, taken: Taken, widths: Sequence[int], begun: Tensor | None) -> Tensor:
        rows = [states.to(x.device) for states in taken]
        places = [each for *each, up in zip(accumulate([0, *widths]), widths, self.ups, strict=False) if up is not None]
        starts, own_widths = [start for start, _ in places], [width for _, width in places]
        ops = torch.ops.llama2_chat
        ops.add_adapters_(y, x, begun, *rows, self.down, self.up, self._rank, starts, own_widths)
        return y


@triton.jit(do_not_specialize=["T"])  # a number of rows not met before must not wait for a compiler
def _shrink_kernel(
    x,
    down,
    adapters,
    parts,
    T,
    K,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """parts[chunk, t, layer, r]: what a chunk of x[t] gives with row r of A of the adapter that t takes, in float32."""
    k = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    known = c < LAYERS * COUNT * RANK
    at = c.to(tl.int64)[None, :] * K + k[:, None]
    weights = tl.load(down + at, mask=known[None, :] & (k[:, None] < K), other=0.0)
    own = tl.load(adapters + t, mask=t < T, other=0)
    inputs = tl.load(x + t[:, None] * K + k[None, :], mask=(own > 0)[:, None] & (k[None, :] < K), other=0.0)
    hidden = tl.dot(inputs.to(weights.dtype), weights, input_precision="ieee")
    layer, place = c // (COUNT * RANK), c % (COUNT * RANK)
    taken = (own[:, None] == (place // RANK + 1)[None, :]) & known[None, :]
    at = ((tl.program_id(0) * T + t[:, None]) * LAYERS + layer[None, :]) * RANK + (place % RANK)[None, :]
    tl.store(parts + at, hidden, mask=taken)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def _expand_kernel(
    y,
    up,
    adapters,
    parts,
    T,
    CHUNKS,
    y_stride,
    up_stride,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add to y[t, STARTS[layer] + n], for some n below WIDTHS[layer], what the adapter that t takes says.

    ADAPTERS: of so many B is multiplied at once; RANKS: to so many columns each is filled up; PARTS: summed at once.
    EARLY: it may begin before the kernel in front of it has ended, and B is read until that is so.
    """
    LAYERS: tl.constexpr = len(WIDTHS)
    layer, start, width, before, all_before = tl.program_id(1), 0, 0, 0, 0
    for index in tl.static_range(LAYERS):
        start = tl.where(layer == index, STARTS[index], start)
        width = tl.where(layer == index, WIDTHS[index], width)
        before = tl.where(layer == index, all_before, before)
        all_before += WIDTHS[index]
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column, r, part = tl.arange(0, ADAPTERS * RANKS), tl.arange(0, RANKS), tl.arange(0, PARTS)
    of_adapter, of_rank = column // RANKS, column % RANKS
    columns = up + before + (of_adapter * RANK + of_rank).to(tl.int64)[:, None] * up_stride + n[None, :]
    there = (of_rank < RANK)[:, None] & (n < width)[None, :]
    weights = tl.load(columns, mask=there & (of_adapter < COUNT)[:, None], other=0.0)
    # Made before the mask was, by PyTorch's kernels, which nothing overlaps: it is there without waiting.
    own = tl.load(adapters + t, mask=t < T, other=0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    changed = (own > 0)[:, None] & (n < width)[None, :]
    outputs = y + start + t.to(tl.int64)[:, None] * y_stride + n[None, :]
    base = tl.load(outputs, mask=changed, other=0.0)
    hidden = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(0, CHUNKS, PARTS):
        chunk = first + part[:, None, None]
        at = ((chunk * T + t[None, :, None]) * LAYERS + layer) * RANK + r[None, None, :]
        taken = (chunk < CHUNKS) & (own > 0)[None, :, None] & (r < RANK)[None, None, :]
        hidden += tl.sum(tl.load(parts + at, mask=taken, other=0.0), 0)
    rounded = hidden.to(weights.dtype)
    added = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in tl.static_range(0, COUNT, ADAPTERS):
        taken = own[:, None] == (first + 1 + tl.arange(0, ADAPTERS))[None, :]
        spread = tl.where(taken[:, :, None], rounded[:, None, :], 0.0).to(weights.dtype)
        added = tl.dot(spread.reshape(ROWS, ADAPTERS * RANKS), weights, added, input_precision="ieee")
        if first + ADAPTERS < COUNT:
            following = first + ADAPTERS + of_adapter
            columns += ADAPTERS * RANK * up_stride
            weights = tl.load(columns, mask=there & (following < COUNT)[:, None], other=0.0)
    total = base.to(tl.float32) + added.to(weights.dtype).to(tl.float32)
    tl.store(outputs, total.to(base.dtype), mask=changed)


@torch.library.custom_op("llama2_chat::begin_adapters", mutates_args=())
def begin_adapters(x: Tensor, adapters: Tensor, down: Tensor, columns: int, rank: int) -> Tensor:
    """What add_adapters_() takes: it depends on x alone, not on what layers give for it.

    In a recorded step it is complete once the stream _beside() is: add_adapters_() must come behind each of it.
    adapters: as Taken has them; down: A of the adapted layers below each other, [layers * columns, in].
    """
    inputs = x.reshape(-1, x.shape[-1]).contiguous()
    if len(inputs) != len(adapters):
        raise RuntimeError(f"{len(inputs)} rows came into a layer, of a step of {len(adapters)}")
    parts = _new_parts(x, down, columns, rank)
    if not _takes_kernels(x, rank):
        return parts
    with torch.cuda.device_of(x):  # Triton launches on the current one
        if (side := _beside(x)) is not None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                _shrink(parts, inputs, adapters, down, columns, rank)
        else:
            _shrink(parts, inputs, adapters, down, columns, rank)
    return parts


@begin_adapters.register_fake
def _(x, adapters, down, columns, rank):
    return _new_parts(x, down, columns, rank)


@torch.library.custom_op("llama2_chat::add_adapters_", mutates_args=("y",))
def add_adapters_(
    y: Tensor,
    x: Tensor,
    parts: Tensor,
    adapters: Tensor,
    mask: Tensor,
    down: Tensor,
    up: Tensor,
    rank: int,
    starts: Sequence[int],
    widths: Sequence[int],
) -> None:
    """Add to y [..., out] what adapters say of x [..., in], from each of `starts` on to so many of its features.

    parts: what begin_adapters() gave for the same; mask: as Taken has it; up: B of the adapted layers side by side,
    [columns, sum of widths].
    """
    inputs, outputs = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if not _takes_kernels(x, rank):
        added = products(inputs, mask, down, up.split([*widths], 1))
        for start, width, part in zip(starts, widths, added, strict=True):
            outputs[:, start : start + width] += part
        return
    with torch.cuda.device_of(x):
        if (side := _beside(x)) is not None:
            torch.cuda.current_stream().wait_stream(side)
        _expand(outputs, parts, adapters, _chunks(down), up, rank, starts, widths)


@add_adapters_.register_fake
def _(y, x, parts, adapters, mask, down, up, rank, starts, widths):
    pass


def _takes_kernels(x: Tensor, rank: int) -> bool:
    return x.shape[:-1].numel() <= MOST_ROWS and rank <= MOST_RANK


def _beside(x: Tensor) -> torch.cuda.Stream | None:
    """The stream on which a recorded step computes what needs x alone; None for that of all others."""
    if x.device.type != "cuda":
        return None
    side = _side_stream(x.device)  # made in the step before the first recorded one
    # What is read must stay until add_adapters_(): x does, a copy of it would not.
    return side if torch.cuda.is_current_stream_capturing() and x.is_contiguous() else None


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Its kernels come first where all want to run: layers' own may leave no room for others."""
    return torch.cuda.Stream(device, priority=-1)


def _chunks(down: Tensor) -> int:
    """In so many parts an input is multiplied."""
    return -(-down.shape[1] // (CHUNK_BYTES // down.element_size()))


def _new_parts(x: Tensor, down: Tensor, columns: int, rank: int) -> Tensor:
    """Room for the most rows: a size that does not change with them is nothing that torch.compile must know of."""
    return x.new_empty(_chunks(down), MOST_ROWS, len(down) // columns, rank, dtype=torch.float32)


def begins_early(device: torch.device) -> bool:
    """Whether a kernel can begin there before the one in front of it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def can_add(device: torch.device) -> bool:
    """Whether a GPU can have adapters of this kind: steps are recorded there, and Triton multiplies."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _shrink(parts: Tensor, x: Tensor, adapters: Tensor, down: Tensor, columns: int, rank: int) -> None:
    (T, K), chunk = x.shape, CHUNK_BYTES // down.element_size()
    _shrink_kernel[_chunks(down), triton.cdiv(len(down), COLUMNS), triton.cdiv(T, ROWS)](
        x,
        down,
        adapters,
        parts,
        T,
        K,
        COUNT=columns // rank,
        RANK=rank,
        LAYERS=len(down) // columns,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        CHUNK=chunk,
    )


def _expand(
    y: Tensor,
    parts: Tensor,
    adapters: Tensor,
    chunks: int,
    up: Tensor,
    rank: int,
    starts: Sequence[int],
    widths: Sequence[int],
) -> None:
    T, count, ranks = len(y), len(up) // rank, triton.next_power_of_2(rank)
    early: dict[str, Any] = {"EARLY": False}
    if begins_early(y.device):
        early = {"EARLY": True, "launch_pdl": True}
    at_once = min(triton.next_power_of_2(count), max(1, AT_ONCE // ranks))
    if at_once * ranks < ROWS:  # the fewest that tensor cores take
        at_once = ROWS // ranks
    most_parts = max(1, PARTS_AT_ONCE // (ROWS * ranks))
    _expand_kernel[triton.cdiv(max(widths), OUTPUTS), len(widths), triton.cdiv(T, ROWS)](
        y,
        up,
        adapters,
        parts,
        T,
        chunks,
        y.stride(0),
        up.stride(0),
        STARTS=tuple(starts),
        WIDTHS=tuple(widths),
        COUNT=count,
        RANK=rank,
        ROWS=ROWS,
        OUTPUTS=OUTPUTS,
        ADAPTERS=at_once,
        RANKS=ranks,
        PARTS=min(triton.next_power_of_2(chunks), most_parts),
        **early,
    )
