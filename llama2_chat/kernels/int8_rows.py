"""What is computed on the CPU between products in 8 bits (int8.py), compiled: rows become the bytes that are
multiplied, products become rows again, and what a Llama's layer does meanwhile is done while a row is in the cache.

Each row becomes integers of 15 bits and a sign, with a scale of its own, as two bytes: a high and a low one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range, for_range_slice
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from llama2_chat.kernels.compiled import LANES, VECTOR, bits_of, compiled, exp, float_of, part, row_sum

ZERO = 128  # of bytes without a sign, of which alone oneDNN has fast products where there is no AMX
WHOLE = 127 * 128  # the largest number of two bytes
LEAST = np.float32(1e-30)  # by which a row is divided
FEW_BYTES = 16  # rows of bytes: up to 8 tokens
PADDING = 32  # oneDNN keeps a program for each number of rows it has met, so above that it shall meet few


@part
def split(row, high, low):
    """Write a row as whole numbers up to WHOLE, each as a high byte and a low one; returns its largest number.

    Of bits without a sign the larger are those of the larger number, and NaN is above all numbers.
    """
    bits = np.uint32(0)
    for i in range(len(row)):
        each = bits_of(row[i]) & np.uint32(0x7FFFFFFF)
        bits = each if each > bits else bits
    largest = float_of(np.uint32(bits))
    largest = LEAST if largest < LEAST else largest
    factor = np.float32(WHOLE) / largest
    for i in range(len(row)):
        whole = np.int32(np.rint(row[i] * factor))
        upper = np.int32((whole + 64) >> 7)
        high[i] = np.uint8(upper + ZERO)
        low[i] = np.uint8(whole - (upper << 7) + ZERO)
    return largest


@part
def normed(row, weight, epsilon, output):
    """RMSNorm of one row. Source: LlamaRMSNorm of transformers, here in float32 throughout."""
    factor = np.float32(1) / np.sqrt(sum_of_squares(row) / np.float32(len(row)) + epsilon)
    for i in range(len(row)):
        output[i] = row[i] * weight[i] * factor


@row_sum
def sum_of_squares(row):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return total


@part
def joined(high, low, largest):
    """The number of which `split` made two bytes, multiplied."""
    return (high * np.float32(128) + low) * largest


@part
def join_row(high, low, largest, output):
    """Write the numbers of a row of which `split` made two bytes each, multiplied."""
    for i in range(len(output)):
        output[i] = joined(high[i], low[i], largest)


@part
def add_row(high, low, largest, output):
    """The same, added."""
    for i in range(len(output)):
        output[i] += joined(high[i], low[i], largest)


@part
def gate_row(row, output):
    """SiLU of the first half of a row, times the second."""
    width = len(output)
    for i in range(width):
        output[i] = row[i] / (np.float32(1) + exp(-row[i])) * row[width + i]


@compiled("void(float32[:, ::1], uint8[:, ::1], float32[::1])")
def split_rows(rows, codes, largest):
    """rows: [n, width]. codes: [2 n or more, width], the high bytes of all rows and then the low ones. largest: [n]."""
    for row in range(len(rows)):
        largest[row] = split(rows[row], codes[row], codes[len(rows) + row])


@compiled("void(float32[:, ::1], float32[::1], float32[:, ::1])")
def join_rows(products, largest, output):
    """products: [2 n or more, width], of the codes of n rows. output: [n, width]."""
    for row in range(len(output)):
        join_row(products[row], products[len(output) + row], largest[row], output[row])


@compiled("void(float32[:, ::1], float32[::1], float32[:, ::1])")
def add_rows(products, largest, hidden):
    """The same, added to hidden, [n, width]."""
    for row in range(len(hidden)):
        add_row(products[row], products[len(hidden) + row], largest[row], hidden[row])


@compiled("void(float32[:, ::1], float32[::1], float32, float32[:, ::1], uint8[:, ::1], float32[::1])")
def norm_rows(hidden, weight, epsilon, rows, codes, largest):
    """RMSNorm of hidden, [n, width]: as rows, and as split_rows() writes them."""
    for row in range(len(hidden)):
        normed(hidden[row], weight, epsilon, rows[row])
        largest[row] = split(rows[row], codes[row], codes[len(hidden) + row])


@intrinsic
def turn(typing: Any, states: Any, heads: Any, cos: Any, sin: Any) -> Any:
    """Give the first heads of states, [heads or more, head_dim], rotary positions. cos, sin: [head_dim].

    For so few numbers LLVM would ask longer whether they overlap than it would compute.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = zip(signature.args, arguments, strict=True)
        states, cos, sin = (
            context.make_array(kind)(context, builder, argument) for kind, argument in kinds if kind != types.int64
        )
        head_dim = builder.extract_value(states.shape, 1)
        half = builder.udiv(head_dim, head_dim.type(2))
        of_vectors = builder.and_(half, half.type(-LANES))

        def turn_some(kind: Any, head: Any, at: Any) -> None:
            def places(start: Any) -> list[Any]:
                each = (builder.gep(start, [place]) for place in (at, builder.add(at, half)))
                return [builder.bitcast(place, kind.as_pointer()) for place in each]

            of_state = places(builder.gep(states.data, [builder.mul(head, head_dim)]))
            (a, b), x, y = (
                [builder.load(place, align=4) for place in each]
                for each in (of_state, places(cos.data), places(sin.data))
            )
            turned = builder.fsub(builder.fmul(a, x[0]), builder.fmul(b, y[0]))
            builder.store(turned, of_state[0], align=4)
            turned = builder.fadd(builder.fmul(b, x[1]), builder.fmul(a, y[1]))
            builder.store(turned, of_state[1], align=4)

        with for_range(builder, arguments[1]) as loop:
            with for_range_slice(builder, half.type(0), of_vectors, half.type(LANES)) as (at, _):
                turn_some(VECTOR, loop.index, at)
            with for_range_slice(builder, of_vectors, half, half.type(1)) as (at, _):
                turn_some(ir.FloatType(), loop.index, at)
        return context.get_dummy_value()

    return types.void(states, heads, cos, sin), build


@compiled("void(float32[:, ::1], float32[::1], float32[:, ::1], float32[:, ::1], int64, float32[:, :, ::1])")
def turn_rows(products, largest, cos, sin, turned, states):
    """The joined products, states [n, heads, head_dim], of which the first `turned` heads get their rotary positions.

    cos, sin: [n, head_dim].
    """
    join_rows(products, largest, states.reshape(len(states), -1))
    for row in range(len(states)):
        turn(states[row], turned, cos[row], sin[row])


@compiled("void(float32[:, ::1], float32[::1], float32[:, ::1], uint8[:, ::1], float32[::1])")
def gate_rows(products, largest, rows, codes, codes_largest):
    """gate_row() of each row, joined: as rows, [n, width], and as split_rows() writes them."""
    count, numbers = len(rows), np.empty(products.shape[1], np.float32)
    for row in range(count):
        join_row(products[row], products[count + row], largest[row], numbers)
        gate_row(numbers, rows[row])
        codes_largest[row] = split(rows[row], codes[row], codes[count + row])


class Codes(NamedTuple):
    """Rows and the bytes that stand for them.

    products, below: of these bytes and a layer's weights, float32 [rows of bytes, out], as Int8Linear.products() says.
    """

    rows: NDArray[np.float32]  # [n, width]
    bytes: NDArray[np.uint8]  # [2 n or more, width]: ZERO more than the high bytes of all rows, then than the low ones
    largest: NDArray[np.float32]  # [n], of each row without its sign

    @classmethod
    def empty(cls, rows: NDArray[np.float32]) -> Codes:
        count, width = rows.shape
        padding = -2 * count % PADDING if 2 * count > FEW_BYTES else 0
        return cls(rows, np.empty((2 * count + padding, width), np.uint8), np.empty(count, np.float32))

    @classmethod
    def of(cls, rows: NDArray[np.float32]) -> Codes:
        """Of rows [n, width]."""
        codes = cls.empty(rows)
        split_rows(*codes)
        return codes

    @classmethod
    def normed(cls, hidden: NDArray[np.float32], weight: NDArray[np.float32], epsilon: float) -> Codes:
        """Of RMSNorm of hidden [n, width]; weight: [width]."""
        codes = cls.empty(np.empty_like(hidden))
        norm_rows(hidden, weight, epsilon, *codes)
        return codes

    def gated(self, products: Tensor) -> Codes:
        """Of SiLU of the first half of what these codes were multiplied to, times the second half."""
        codes = self.empty(np.empty((len(self.rows), products.shape[1] // 2), np.float32))
        gate_rows(products.numpy(), self.largest, *codes)
        return codes

    def turned(
        self, products: Tensor, cos: NDArray[np.float32], sin: NDArray[np.float32], heads: int
    ) -> NDArray[np.float32]:
        """What these codes were multiplied to, [n, all heads, head_dim], with rotary positions in the first heads.

        cos, sin: [n, head_dim].
        """
        count, head_dim = cos.shape
        states = np.empty((count, products.shape[1] // head_dim, head_dim), np.float32)
        turn_rows(products.numpy(), self.largest, cos, sin, heads, states)
        return states

    def joined(self, products: Tensor) -> NDArray[np.float32]:
        """What these codes were multiplied to, [n, out]."""
        rows = np.empty((len(self.rows), products.shape[1]), np.float32)
        join_rows(products.numpy(), self.largest, rows)
        return rows

    def add_to(self, hidden: NDArray[np.float32], products: Tensor) -> None:
        """The same, added to hidden [n, out]."""
        add_rows(products.numpy(), self.largest, hidden)

    def add_to_products(self, products: Tensor, added: Tensor) -> None:
        """Let what joins be as much more, [n, out]."""
        count = len(self.rows)
        products[count : 2 * count] += added / torch.from_numpy(self.largest)[:, None]
