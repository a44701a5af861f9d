"""A Llama's layers and its output head on a CPU in one compiled call, which threads compute together: between them lies
no Python, for which a token of a small model would wait as long as for its products.

What is computed is what LlamaDecoderLayer computes, in float32 between the products, and the same bits as by
engine/cpu_llama.py's CpuLlamaLayer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from llama2_chat.kernels.block_attention import BLOCK, attend_all, room_for, write_row
from llama2_chat.kernels.compiled import compiled, part
from llama2_chat.kernels.crew import end_of, take, take_next, turns_for, with_help
from llama2_chat.kernels.int8_rows import gate_row, normed, split, turn
from llama2_chat.kernels.panels import PANEL, Panels, join_panel

STAGES, LAST_STAGES = 10, 3  # of a layer, and behind all of them
# Where the addresses of what a layer has stand in its row of a table; of a product those of its Panels, one by one.
NORM_BEFORE_ATTENTION, NORM_BEFORE_MLP, KEYS, VALUES, QKV, OUT, GATE_UP, DOWN = 0, 1, 2, 3, 4, 7, 10, 13
COLUMNS = 16

Numbers = NDArray[np.float32]
Kept = Sequence[tuple[NDArray[np.uint16], NDArray[np.uint16]]]


class LayerArrays(NamedTuple):
    """What a layer has."""

    norm_before_attention: Numbers | None  # [width]
    norm_before_mlp: Numbers
    qkv: Panels  # of query, key and value, side by side
    out: Panels
    gate_up: Panels  # side by side
    down: Panels


class LayerSizes(NamedTuple):
    """Of all layers alike."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    epsilon: float  # of their norms
    scale: float  # of scores


class Computed(NamedTuple):
    """What a step of T tokens gives."""

    hidden: Numbers  # [T, width], as the output head gets it
    heard: Numbers  # [n, T, width], behind the layers that are listened to
    logits: Numbers  # [n, outputs]


class Layers:
    """Layers of a Llama, as compiled functions find them.

    kept: of each layer its keys and values, as attend_in_blocks() takes them.
    """

    def __init__(self, layers: Sequence[LayerArrays], sizes: LayerSizes) -> None:
        self._layers, self.sizes = layers, sizes  # keeps alive what addresses tell of
        self._table = np.zeros((len(layers), COLUMNS), np.int64)
        for row, layer in zip(self._table, layers, strict=True):
            row[NORM_BEFORE_ATTENTION] = address(layer.norm_before_attention)
            row[NORM_BEFORE_MLP] = address(layer.norm_before_mlp)
            for at, panels in zip((QKV, OUT, GATE_UP, DOWN), layer[2:], strict=True):
                row[at : at + len(panels)] = addresses(panels)
        self._latest: tuple[Any, Any] = None, None  # keys and values, and the table with their addresses

    def table(self, kept: Kept) -> NDArray[np.int64]:
        """[layers, COLUMNS]"""
        before, table = self._latest
        if before is not kept:  # in a table of its own: another engine may be computing with the one before
            table = self._table.copy()
            table[:, [KEYS, VALUES]] = [[array.ctypes.data for array in layer] for layer in kept]
            self._latest = kept, table
        return table

    def room(self, count: int, width: int) -> tuple[NDArray[Any], ...]:
        """For what compute_layer() computes of so many tokens, and for codes of up to `width` inputs."""
        heads, kv_heads, head_dim, intermediate, _, _ = self.sizes
        all_heads = heads + 2 * kv_heads
        widest = max(width, heads * head_dim, intermediate)
        return (
            np.empty((count, all_heads, head_dim), np.float32),
            np.empty((count, heads, head_dim), np.float32),
            np.empty((count, 2 * intermediate), np.float32),
            np.empty(2 * count * widest, np.uint8),
            np.empty(count, np.float32),
        )


class WholeLlama:
    """The layers of a Llama, the norm behind them, and its output head."""

    def __init__(self, layers: Layers, norm: Numbers, output: Panels | None) -> None:
        """norm: [width], with the epsilon of the layers'. output: None if the head is computed elsewhere."""
        self._layers, self._norm, self._output = layers, norm, output
        self._addresses = np.array(addresses(output) if output else [], np.int64)

    @property
    def has_output(self) -> bool:
        return self._output is not None

    def run(
        self,
        depth: int,
        hidden: Numbers,
        turns: tuple[Numbers, Numbers],
        tokens: NDArray[np.int64],
        pieces: tuple[NDArray[np.int64], ...],
        kept: Kept,
        listened: Sequence[int],
        last: NDArray[np.int64],
    ) -> Computed:
        """Let hidden, [T, width], go through the first layers, `depth` of them; it changes.

        turns: cosines and sines, [T, head_dim]. tokens, pieces: as attend_in_blocks() takes them. listened: numbers of
        layers. last: int64 [n], the tokens behind which there shall be logits.
        """
        count, width = hidden.shape
        outputs = len(self._output.scales) if self._output else 0
        computed = Computed(
            np.empty_like(hidden),
            np.empty((len(listened), count, width), np.float32),
            np.empty((len(last), outputs), np.float32),
        )
        heard_at = np.full(depth, -1)
        heard_at[[*listened]] = range(len(listened))
        epsilon, scale = self._layers.sizes[-2:]
        with_help(
            compute_llama,
            *(
                turns_for(STAGES * depth + len(listened) + LAST_STAGES),
                self._layers.table(kept)[:depth],
                len(kept[0][0]),
            ),
            *(np.float32(epsilon), np.float32(scale), hidden, *turns, tokens, *pieces),
            *self._layers.room(count, width),
            *(heard_at, self._norm, self._addresses, last, *computed),
        )
        return computed


def address(array: NDArray[Any] | None) -> int:
    """0 for none."""
    return 0 if array is None else array.ctypes.data


def addresses(panels: Panels) -> list[int]:
    return [array.ctypes.data for array in panels]


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@part
def multiply(me, turns, stage, codes, count, width, panels, largest, output, added):
    """The stage of a product: `count` rows of codes and largest, as split_row() writes them, times panels, addresses.
    It is written to output, [count or more, outputs], or added to what is there. Returns the next stage."""
    outputs = output.shape[1]
    shares = outputs // PANEL if count else 0
    panel = take(me, turns, stage, shares)
    while panel < shares:
        first = panel * PANEL * 4  # bytes
        weights, offsets, scales = panels[0] + panel * width * PANEL, panels[1] + first, panels[2] + first
        rows, factors, target = codes.ctypes.data, largest.ctypes.data, output.ctypes.data + first
        join_panel(rows, count, width, weights, offsets, scales, factors, target, outputs, added)
        panel = take_next(me, turns, stage, shares)
    return end_of(me, turns, stage, shares)


@part
def split_row(row, numbers, count, codes, largest):
    """Write the bytes of one of `count` rows to codes, [2 * count, width]."""
    width = len(numbers)
    low = (count + row) * width
    largest[row] = split(numbers, codes[row * width : (row + 1) * width], codes[low : low + width])


@part
def compute_layer(me, turns, stage, layer, model, hidden, rotary, tokens, pieces, space):
    """The stages of one layer, which hidden goes through. Returns the next stage.

    layer: its row of the table. model: of all layers, the number of blocks, epsilon and scale. rotary: cosines and
    sines. tokens, pieces: as attend_in_blocks() takes them. space: Layers.room(), and what own_space() makes.
    """
    num_blocks, epsilon, scale = model
    cos, sin = rotary
    states, attended, gated, codes, largest, numbers, room = space
    count, width = hidden.shape
    all_heads, head_dim = states.shape[1:]
    heads, intermediate = attended.shape[1], gated.shape[1] // 2
    kv_heads = (all_heads - heads) // 2
    keys = carray(pointer(layer[KEYS]), (num_blocks, kv_heads, head_dim, BLOCK), np.uint16)
    values = carray(pointer(layer[VALUES]), (num_blocks, kv_heads, BLOCK, head_dim), np.uint16)

    weight = carray(pointer(layer[NORM_BEFORE_ATTENTION]), (width,), np.float32)
    row = take(me, turns, stage, count)
    while row < count:
        if layer[NORM_BEFORE_ATTENTION]:
            normed(hidden[row], weight, epsilon, numbers)
            split_row(row, numbers[:width], count, codes, largest)
        else:
            split_row(row, hidden[row], count, codes, largest)
        row = take_next(me, turns, stage, count)
    stage = end_of(me, turns, stage, count)

    in_rows = states.reshape(len(states), all_heads * head_dim)
    stage = multiply(me, turns, stage, codes, count, width, layer[QKV:], largest, in_rows, False)

    row = take(me, turns, stage, count)
    while row < count:
        turn(states[row], heads + kv_heads, cos[row], sin[row])
        write_row(states[row], tokens[row], keys, values)
        row = take_next(me, turns, stage, count)
    stage = end_of(me, turns, stage, count)

    stage = attend_all(me, turns, stage, states, pieces, keys, values, scale, attended, room)

    row = take(me, turns, stage, count)
    while row < count:
        split_row(row, attended[row].reshape(heads * head_dim), count, codes, largest)
        row = take_next(me, turns, stage, count)
    stage = end_of(me, turns, stage, count)

    stage = multiply(me, turns, stage, codes, count, heads * head_dim, layer[OUT:], largest, hidden, True)

    weight = carray(pointer(layer[NORM_BEFORE_MLP]), (width,), np.float32)
    row = take(me, turns, stage, count)
    while row < count:
        normed(hidden[row], weight, epsilon, numbers)
        split_row(row, numbers[:width], count, codes, largest)
        row = take_next(me, turns, stage, count)
    stage = end_of(me, turns, stage, count)

    stage = multiply(me, turns, stage, codes, count, width, layer[GATE_UP:], largest, gated, False)

    row = take(me, turns, stage, count)
    while row < count:
        gate_row(gated[row], numbers[:intermediate])
        split_row(row, numbers[:intermediate], count, codes, largest)
        row = take_next(me, turns, stage, count)
    stage = end_of(me, turns, stage, count)

    return multiply(me, turns, stage, codes, count, intermediate, layer[DOWN:], largest, hidden, True)


@part
def own_space(hidden, states, attended, gated, starts, ends):
    """What each thread needs for itself: a row of numbers, and room to attend to pieces as long as these."""
    heads, head_dim = attended.shape[1:]
    group = heads // ((states.shape[1] - heads) // 2)
    widest = max(hidden.shape[1], gated.shape[1] // 2)
    return np.empty(widest, np.float32), room_for((ends - starts).max() * group, head_dim)


@compiled(
    "void(int64, int64[:, :, ::1], int64[:, ::1], int64, float32, float32, float32[:, ::1], float32[:, ::1],"
    " float32[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[:, ::1], float32[:, :, ::1],"
    " float32[:, :, ::1], float32[:, ::1], uint8[::1], float32[::1], int64[::1], float32[::1],"
    " int64[::1], int64[::1], float32[:, ::1], float32[:, :, ::1], float32[:, ::1])"
)
def compute_llama(
    me,
    turns,
    table,
    num_blocks,
    epsilon,
    scale,
    hidden,
    cos,
    sin,
    tokens,
    firsts,
    starts,
    ends,
    tables,
    states,
    attended,
    gated,
    codes,
    largest,
    heard_at,
    norm,
    output,
    last,
    of_head,
    heard,
    logits,
):
    """WholeLlama.run() says what is taken, and Computed what becomes of it: of_head, heard, logits.

    heard_at: of each layer its place in heard, or -1. output: addresses of Panels, or none.
    Each thread runs this; a stage begins when all of the one before is there (crew.py).
    """
    count, width = hidden.shape
    numbers, room = own_space(hidden, states, attended, gated, starts, ends)
    model, rotary, pieces = (num_blocks, epsilon, scale), (cos, sin), (firsts, starts, ends, tables)
    space = states, attended, gated, codes, largest, numbers, room
    stage = 0
    for number in range(len(table)):
        stage = compute_layer(me, turns, stage, table[number], model, hidden, rotary, tokens, pieces, space)
        if heard_at[number] >= 0:
            row = take(me, turns, stage, count)
            while row < count:
                for i in range(width):  # as a row, numba compiles what it would say of rows that are not alike, too
                    heard[heard_at[number], row, i] = hidden[row, i]
                row = take_next(me, turns, stage, count)
            stage = end_of(me, turns, stage, count)

    row = take(me, turns, stage, count)
    while row < count:
        normed(hidden[row], norm, epsilon, of_head[row])
        row = take_next(me, turns, stage, count)
    stage = end_of(me, turns, stage, count)

    if len(output):
        row = take(me, turns, stage, len(last))
        while row < len(last):
            split_row(row, of_head[last[row]], len(last), codes, largest)
            row = take_next(me, turns, stage, len(last))
        stage = end_of(me, turns, stage, len(last))

        multiply(me, turns, stage, codes, len(last), width, output, largest, logits, False)
