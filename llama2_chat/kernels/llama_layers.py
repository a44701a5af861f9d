"""A Llama's layers on a CPU in one compiled call, which threads compute together: between them lies no Python, for
which a token of a small model would wait as long as for its products.

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

from llama2_chat.kernels.block_attention import BLOCK, attend_piece, room_for, write_row
from llama2_chat.kernels.compiled import compiled, part
from llama2_chat.kernels.crew import end_of, take, take_next, turns_for, with_help
from llama2_chat.kernels.int8_rows import add_row, gate_row, join_row, normed, split, turn
from llama2_chat.kernels.panels import PANEL, Panels, multiply_panel

STAGES = 11  # of a layer
# Where the addresses of what a layer has stand in its row of a table; of a product those of its Panels, one by one.
NORM_BEFORE_ATTENTION, NORM_BEFORE_MLP, KEYS, VALUES, QKV, OUT, GATE_UP, DOWN = 0, 1, 2, 3, 4, 7, 10, 13
COLUMNS = 16

Numbers = NDArray[np.float32]


class LayerArrays(NamedTuple):
    """What a layer has."""

    norm_before_attention: Numbers  # [width]
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


class Layers:
    """Layers of a Llama, as compiled functions find them."""

    def __init__(self, layers: Sequence[LayerArrays], sizes: LayerSizes) -> None:
        self._layers, self._sizes = layers, sizes  # keeps alive what addresses tell of
        self._table = np.zeros((len(layers), COLUMNS), np.int64)
        for row, layer in zip(self._table, layers, strict=True):
            row[NORM_BEFORE_ATTENTION] = layer.norm_before_attention.ctypes.data
            row[NORM_BEFORE_MLP] = layer.norm_before_mlp.ctypes.data
            for at, panels in zip((QKV, OUT, GATE_UP, DOWN), layer[2:], strict=True):
                row[at : at + len(panels)] = [array.ctypes.data for array in panels]
        self._latest: tuple[Any, Any] = None, None  # keys and values, and the table with their addresses

    def run(
        self,
        first: int,
        end: int,
        hidden: Numbers,
        turns: tuple[Numbers, Numbers],
        tokens: NDArray[np.int64],
        pieces: tuple[NDArray[np.int64], ...],
        kept: Sequence[tuple[NDArray[np.uint16], NDArray[np.uint16]]],
    ) -> None:
        """Let hidden, [T, width], go through the layers from `first` to before `end`; it changes.

        turns: cosines and sines, [T, head_dim]. tokens, pieces: as attend_in_blocks() takes them. kept: of each layer
        its keys and values, as it takes them, too.
        """
        before, table = self._latest
        if before is not kept:  # in a table of its own: another engine may be computing with the one before
            table = self._table.copy()
            table[:, [KEYS, VALUES]] = [[array.ctypes.data for array in layer] for layer in kept]
            self._latest = kept, table
        heads, kv_heads, head_dim, intermediate, epsilon, scale = self._sizes
        count, width = hidden.shape
        widest = max(width, heads * head_dim, intermediate)
        with_help(
            compute_layers,
            *(turns_for(STAGES * (end - first)), table[first:end], len(kept[0][0])),
            *(np.float32(epsilon), np.float32(scale), hidden, *turns, tokens, *pieces),
            np.empty((count, heads + 2 * kv_heads, head_dim), np.float32),
            np.empty((count, heads, head_dim), np.float32),
            np.empty((count, intermediate), np.float32),
            np.empty(2 * count * widest, np.uint8),
            np.empty(count, np.float32),
            np.empty(2 * count * max(width, (heads + 2 * kv_heads) * head_dim, 2 * intermediate), np.float32),
        )


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@part
def multiply(me, turns, stage, codes, count, width, panels, products, outputs):
    """The stage of a product: codes [2 * count, width] times panels, addresses, in products [2 * count, outputs].

    Returns the next stage."""
    shares = outputs // PANEL
    panel = take(me, turns, stage, shares)
    while panel < shares:
        first = panel * PANEL * 4  # bytes
        multiply_panel(
            codes.ctypes.data,
            2 * count,
            width,
            panels[0] + panel * width * PANEL,
            panels[1] + first,
            panels[2] + first,
            products.ctypes.data + first,
            outputs,
        )
        panel = take_next(me, turns, stage, shares)
    return end_of(me, turns, stage, shares)


@part
def split_row(row, numbers, count, codes, largest):
    """Write the bytes of one of `count` rows to codes, [2 * count, width]."""
    width = len(numbers)
    low = (count + row) * width
    largest[row] = split(numbers, codes[row * width : (row + 1) * width], codes[low : low + width])


@compiled(
    "void(int64, int64[:, :, ::1], int64[:, ::1], int64, float32, float32, float32[:, ::1], float32[:, ::1],"
    " float32[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[:, ::1], float32[:, :, ::1],"
    " float32[:, :, ::1], float32[:, ::1], uint8[::1], float32[::1], float32[::1])"
)
def compute_layers(
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
    products,
):
    """Layers.run() says what is taken. states, attended, gated, codes, largest, products: room for what is computed.

    Each thread runs this; a stage begins when all of the one before is there (crew.py).
    """
    count, width = hidden.shape
    all_heads, head_dim = states.shape[1:]
    heads, intermediate = attended.shape[1], gated.shape[1]
    kv_heads = (all_heads - heads) // 2
    room = room_for((ends - starts).max() * (heads // kv_heads), head_dim)
    numbers = np.empty(width, np.float32)
    stage = 0
    for layer in table:
        keys = carray(pointer(layer[KEYS]), (num_blocks, kv_heads, head_dim, BLOCK), np.uint16)
        values = carray(pointer(layer[VALUES]), (num_blocks, kv_heads, BLOCK, head_dim), np.uint16)

        weight = carray(pointer(layer[NORM_BEFORE_ATTENTION]), (width,), np.float32)
        row = take(me, turns, stage, count)
        while row < count:
            normed(hidden[row], weight, epsilon, numbers)
            split_row(row, numbers, count, codes, largest)
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)

        outputs = all_heads * head_dim
        stage = multiply(me, turns, stage, codes, count, width, layer[QKV:], products, outputs)

        row = take(me, turns, stage, count)
        while row < count:
            high, low = products[row * outputs :], products[(count + row) * outputs :]
            join_row(high, low, largest[row], states[row].reshape(outputs))
            turn(states[row], heads + kv_heads, cos[row], sin[row])
            write_row(states[row], tokens[row], keys, values)
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)

        shares = len(firsts) * kv_heads
        share = take(me, turns, stage, shares)
        while share < shares:
            n, head = share // kv_heads, share % kv_heads
            attend_piece(states, firsts[n], starts[n], ends[n], tables[n], head, keys, values, scale, attended, room)
            share = take_next(me, turns, stage, shares)
        stage = end_of(me, turns, stage, shares)

        row = take(me, turns, stage, count)
        while row < count:
            split_row(row, attended[row].reshape(heads * head_dim), count, codes, largest)
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)

        stage = multiply(me, turns, stage, codes, count, heads * head_dim, layer[OUT:], products, width)

        weight = carray(pointer(layer[NORM_BEFORE_MLP]), (width,), np.float32)
        row = take(me, turns, stage, count)
        while row < count:
            add_row(products[row * width :], products[(count + row) * width :], largest[row], hidden[row])
            normed(hidden[row], weight, epsilon, numbers)
            split_row(row, numbers, count, codes, largest)
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)

        stage = multiply(me, turns, stage, codes, count, width, layer[GATE_UP:], products, 2 * intermediate)

        row = take(me, turns, stage, count)
        while row < count:
            high, low = products[2 * row * intermediate :], products[2 * (count + row) * intermediate :]
            gate_row(high, low, largest[row], gated[row])
            split_row(row, gated[row], count, codes, largest)
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)

        stage = multiply(me, turns, stage, codes, count, intermediate, layer[DOWN:], products, width)

        row = take(me, turns, stage, count)
        while row < count:
            add_row(products[row * width :], products[(count + row) * width :], largest[row], hidden[row])
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)
