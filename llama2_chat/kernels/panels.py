"""Products of bytes on a CPU that has AVX-512 VNNI, compiled: one row takes as long as reading the weights does.

Weights lie in panels of 32 outputs, and in each as one instruction after the other takes them: four inputs of sixteen
outputs. Sums are whole numbers, so nothing depends on the order in which they are added. While many rows are
multiplied by a panel, the next one is fetched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, for_range, for_range_slice, get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from llama2_chat.kernels.compiled import LANES, VECTOR, compiled, fetch, in_all_lanes
from llama2_chat.kernels.crew import end_of, take, take_next, turns_for, with_help
from llama2_chat.kernels.int8 import PANEL, ZERO

IN_LANE = 4  # inputs whose products one instruction adds to the sum of an output
ROWS = 8  # of bytes at a time, at most: their sums, PANEL each, fit into registers beside each other
BYTE, NUMBER, SIZE = ir.IntType(8), ir.IntType(32), ir.IntType(64)
SUMS, BYTES = ir.VectorType(NUMBER, LANES), ir.VectorType(BYTE, LANES * IN_LANE)
VECTOR_BYTES = LANES * IN_LANE
PLACES = range(PANEL // LANES)  # vectors of a panel
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


class _Panel:
    """The code that multiplies rows of bytes by one panel. The arguments are addresses, as Panels has them."""

    def __init__(self, builder: Any, width: Any, weights: Any, offsets: Any, scales: Any) -> None:
        self._builder, self._width = builder, width
        self._weights, self._offsets, self._scales = weights, offsets, scales
        kind = ir.FunctionType(SUMS, [SUMS, BYTES, BYTES])
        self._dot = get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")

    def at(self, address: Any, kind: Any, place: int = 0) -> Any:
        """A vector so many vectors behind an address."""
        builder = self._builder
        return builder.inttoptr(builder.add(address, SIZE(place * VECTOR_BYTES)), kind.as_pointer())

    def products(self, rows: Sequence[Any]) -> list[list[Any]]:
        """PANEL numbers of each row, in vectors. rows: addresses, up to ROWS of them."""
        builder = self._builder
        sums = [[alloca_once(builder, SUMS) for _ in PLACES] for _ in rows]
        for of_row in sums:
            for place in PLACES:
                builder.store(builder.load(self.at(self._offsets, SUMS, place), align=4), of_row[place])
        with for_range(builder, builder.udiv(self._width, SIZE(IN_LANE))) as loop:
            of_panel = builder.add(self._weights, builder.mul(loop.index, SIZE(PANEL * IN_LANE)))
            factors = [builder.load(self.at(of_panel, BYTES, place), align=1) for place in PLACES]
            if len(rows) == ROWS:  # fewer take so little time that the processor reads far enough ahead by itself
                of_next = builder.add(of_panel, builder.mul(self._width, SIZE(PANEL)))
                for place in PLACES:
                    fetch(builder, self.at(of_next, BYTE, place))
            for row, of_row in zip(rows, sums, strict=True):
                inputs = builder.add(row, builder.mul(loop.index, SIZE(IN_LANE)))
                four = in_all_lanes(builder, builder.load(self.at(inputs, NUMBER), align=1))
                four = builder.bitcast(four, BYTES)
                for kept, factor in zip(of_row, factors, strict=True):
                    builder.store(builder.call(self._dot, [builder.load(kept), four, factor]), kept)
        return [[self._scaled(builder.load(kept), place) for place, kept in enumerate(of_row)] for of_row in sums]

    def _scaled(self, sums: Any, place: int) -> Any:
        numbers = self._builder.sitofp(sums, VECTOR)
        return self._builder.fmul(numbers, self._builder.load(self.at(self._scales, VECTOR, place), align=4))


def _by_few(builder: Any, count: Any, sizes: Sequence[int], compute: Callable[[Any, int], None]) -> None:
    """Code for `count` of something: what compute() writes for so many from one on, as many at a time as possible."""
    done = SIZE(0)
    for some in sizes:
        left = builder.sub(count, done)
        end = builder.add(done, builder.sub(left, builder.urem(left, SIZE(some))))
        with for_range_slice(builder, done, end, SIZE(some)) as (first, _):
            compute(first, some)
        done = end


@intrinsic
def multiply_panel(
    typing: Any, rows: Any, count: Any, width: Any, weights: Any, offsets: Any, scales: Any, output: Any, apart: Any
) -> Any:
    """Of `count` rows of `width` bytes, times one panel: PANEL numbers of each row, `apart` numbers from those of the
    next one. The others are addresses, as Panels has them. count: even."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, count, width, weights, offsets, scales, output, apart = arguments
        panel = _Panel(builder, width, weights, offsets, scales)

        def multiply_rows(first: Any, some: int) -> None:
            numbers = [builder.add(first, SIZE(row)) for row in range(some)]
            products = panel.products([builder.add(rows, builder.mul(number, width)) for number in numbers])
            for number, of_row in zip(numbers, products, strict=True):
                target = builder.add(output, builder.mul(builder.mul(number, apart), SIZE(4)))
                for place in PLACES:
                    builder.store(of_row[place], panel.at(target, VECTOR, place), align=4)

        _by_few(builder, count, range(ROWS, 0, -2), multiply_rows)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), build


@intrinsic
def join_panel(
    typing: Any,
    codes: Any,
    count: Any,
    width: Any,
    weights: Any,
    offsets: Any,
    scales: Any,
    largest: Any,
    output: Any,
    apart: Any,
    added: Any,
) -> Any:
    """The same of `count` rows, of which int8_rows.split() made two rows of bytes each, `count` rows apart: joined, and
    added to what is there if `added`. largest: the address of what split() returned of each."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, count, width, weights, offsets, scales, largest, output, apart, added = arguments
        panel = _Panel(builder, width, weights, offsets, scales)

        def multiply_rows(first: Any, some: int) -> None:
            numbers = [builder.add(first, SIZE(row)) for row in range(some)]
            both = numbers + [builder.add(number, count) for number in numbers]  # high bytes, and low ones
            products = panel.products([builder.add(codes, builder.mul(number, width)) for number in both])
            for row, number in enumerate(numbers):
                factor = builder.load(panel.at(builder.add(largest, builder.mul(number, SIZE(4))), ir.FloatType()))
                factor = in_all_lanes(builder, factor)
                target = builder.add(output, builder.mul(builder.mul(number, apart), SIZE(4)))
                for place in PLACES:
                    at = panel.at(target, VECTOR, place)
                    high = builder.fmul(products[row][place], VECTOR([128.0] * LANES))
                    joined = builder.fmul(builder.fadd(high, products[some + row][place]), factor)  # as joined() there
                    more = builder.fadd(builder.load(at, align=4), joined)
                    builder.store(builder.select(added, more, joined), at, align=4)

        _by_few(builder, count, range(ROWS // 2, 0, -1), multiply_rows)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, types.boolean), build


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
