"""Products of bytes on a CPU that has AVX-512 VNNI, compiled: one row takes as long as reading the weights does.

Weights lie in panels of 64 outputs, and in each as one instruction after the other takes them: four inputs of sixteen
outputs. Sums are whole numbers, so nothing depends on the order in which they are added.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, for_range, for_range_slice, get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from llama2_chat.kernels.compiled import LANES, VECTOR, compiled
from llama2_chat.kernels.crew import end_of, take, take_next, turns_for, with_help
from llama2_chat.kernels.int8 import PANEL, ZERO

IN_LANE = 4  # inputs whose products one instruction adds to the sum of an output
ROWS = 6, 4, 2  # at a time: the sums of six, 64 each, fit into registers beside each other
BYTE, NUMBER, SIZE = ir.IntType(8), ir.IntType(32), ir.IntType(64)
SUMS, BYTES = ir.VectorType(NUMBER, LANES), ir.VectorType(BYTE, LANES * IN_LANE)
VECTOR_BYTES = LANES * IN_LANE
PIECE = 1 << 24  # bytes
SHARED_BYTES = 1 << 24  # multiplied by each row of bytes together, from which on other threads are called


class Panels(NamedTuple):
    """Weights as integers, with what becomes of their products."""

    weights: NDArray[np.int8]  # [out / PANEL, in * PANEL]
    offsets: NDArray[np.int32]  # [out]: what the zero of the rows' bytes adds, with the other sign
    scales: NDArray[np.float32]  # [out]

    @classmethod
    def of(cls, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Panels:
        """codes: [out, in], out a multiple of PANEL and in of IN_LANE."""
        outputs, inputs = codes.shape
        lanes = codes.reshape(outputs // PANEL, PANEL, inputs // IN_LANE, IN_LANE).transpose(0, 2, 1, 3)
        weights = _room.take(codes.size).reshape(outputs // PANEL, -1)
        weights.reshape(lanes.shape)[:] = lanes
        return cls(weights, -ZERO * codes.sum(1, dtype=np.int32), scales)

    @property
    def codes(self) -> NDArray[np.int8]:
        """As of() takes them."""
        lanes = self.weights.reshape(len(self.weights), -1, PANEL, IN_LANE).transpose(0, 2, 1, 3)
        return lanes.reshape(len(self.scales), -1)

    def products(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(rows - ZERO) times the weights, times the scales: [n, out], of rows [n, in], n even."""
        products = np.empty((len(rows), len(self.scales)), np.float32)
        turns = turns_for(1)
        if len(rows) * self.weights.size < SHARED_BYTES:
            multiply(0, turns, rows, *self, products)
        else:
            with_help(multiply, turns, rows, *self, products)
        return products


class _Room:
    """Memory for weights, in pieces that are large enough for huge pages: with small ones a processor spends a third of
    the time on finding out where they are."""

    def __init__(self) -> None:
        self._left = np.empty(0, np.int8)
        self._lock = threading.Lock()

    def take(self, size: int) -> NDArray[np.int8]:
        """[size]"""
        with self._lock:
            if len(self._left) < size:
                self._left = np.empty(max(size, PIECE), np.int8)
            taken, self._left = self._left[:size], self._left[size:]
        return taken


_room = _Room()


@intrinsic
def multiply_panel(
    typing: Any, rows: Any, count: Any, width: Any, weights: Any, offsets: Any, scales: Any, output: Any, apart: Any
) -> Any:
    """Of `count` rows of `width` bytes, times one panel: PANEL numbers of each row, `apart` numbers from those of the
    next one. The others are addresses, as Panels has them. count: even."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, count, width, weights, offsets, scales, output, apart = arguments
        dot = get_or_insert_function(
            builder.module, ir.FunctionType(SUMS, [SUMS, BYTES, BYTES]), "llvm.x86.avx512.vpdpbusd.512"
        )

        def at(address: Any, kind: Any, place: int = 0) -> Any:
            """A vector so many vectors behind an address."""
            return builder.inttoptr(builder.add(address, SIZE(place * VECTOR_BYTES)), kind.as_pointer())

        def in_all_lanes(four: Any) -> Any:
            one = builder.insert_element(SUMS(ir.Undefined), four, NUMBER(0))
            return builder.bitcast(builder.shuffle_vector(one, one, SUMS([0] * LANES)), BYTES)

        def multiply_rows(first: Any, some: int) -> None:
            places = range(PANEL // LANES)
            sums = {(row, place): alloca_once(builder, SUMS) for row in range(some) for place in places}
            for (_, place), kept in sums.items():
                builder.store(builder.load(at(offsets, SUMS, place), align=4), kept)
            start = builder.add(rows, builder.mul(first, width))
            with for_range(builder, builder.udiv(width, SIZE(IN_LANE))) as loop:
                of_panel = builder.add(weights, builder.mul(loop.index, SIZE(PANEL * IN_LANE)))
                factors = [builder.load(at(of_panel, BYTES, place), align=1) for place in places]
                inputs = builder.add(start, builder.mul(loop.index, SIZE(IN_LANE)))
                for row in range(some):
                    of_row = builder.add(inputs, builder.mul(width, SIZE(row)))
                    four = in_all_lanes(builder.load(at(of_row, NUMBER), align=1))
                    for place in places:
                        kept = sums[row, place]
                        builder.store(builder.call(dot, [builder.load(kept), four, factors[place]]), kept)
            for (row, place), kept in sums.items():
                numbers = builder.sitofp(builder.load(kept), VECTOR)
                numbers = builder.fmul(numbers, builder.load(at(scales, VECTOR, place), align=4))
                of_row = builder.mul(builder.mul(builder.add(first, SIZE(row)), apart), SIZE(4))
                builder.store(numbers, at(builder.add(output, of_row), VECTOR, place), align=4)

        done = SIZE(0)
        for some in ROWS:
            left = builder.sub(count, done)
            end = builder.add(done, builder.sub(left, builder.urem(left, SIZE(some))))
            with for_range_slice(builder, done, end, SIZE(some)) as (first, _):
                multiply_rows(first, some)
            done = end
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), build


@compiled("void(int64, int64[:, :, ::1], uint8[:, ::1], int8[:, ::1], int32[::1], float32[::1], float32[:, ::1])")
def multiply(me, turns, rows, weights, offsets, scales, products):
    """Panels.products() says what is taken."""
    count, width = rows.shape
    apart = len(scales)
    panel = take(me, turns, 0, len(weights))
    while panel < len(weights):
        first = panel * PANEL * 4  # bytes
        multiply_panel(
            rows.ctypes.data,
            count,
            width,
            weights.ctypes.data + panel * width * PANEL,
            offsets.ctypes.data + first,
            scales.ctypes.data + first,
            products.ctypes.data + first,
            apart,
        )
        panel = take_next(me, turns, 0, len(weights))
    end_of(me, turns, 0, len(weights))
