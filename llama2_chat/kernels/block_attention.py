"""Attention of a Llama on the CPU over the blocks of a KV pool, compiled: each token's comes out the same, bit for bit,
whoever shares the step and in whatever chunks a prompt is read.

A token goes through its keys block after block, and keeps what it has found so far beside the largest score. Four rows
of queries at a time are multiplied with a block, each as it would be alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, for_range, get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from llama2_chat.kernels.compiled import (
    FETCHED,
    LANES,
    VECTOR,
    bits_of,
    compiled,
    exp,
    fetch,
    float_of,
    in_all_lanes,
    of_ordinal,
    ordinal,
    part,
)
from llama2_chat.kernels.crew import end_of, take, take_next, turns_for, with_help

BLOCK = 64  # tokens of a block of the pool, BLOCK_SIZE there, and dimensions of a head that are computed together
MANY_TOKENS = 64  # of a step: for fewer, calling other threads takes longer than it saves
ROWS = 4  # of queries that are multiplied at once
FEW_ROWS = 32  # for fewer, widening a block beforehand takes longer than widening it for each ROWS
TILE = BLOCK if torch.backends.cpu.get_cpu_capability() == "AVX512" else LANES  # columns whose sums fit into registers
SIZE = ir.IntType(64)


@intrinsic
def add_product(typing: Any, left: Any, right: Any, n: Any, width: Any, output: Any, ahead: Any) -> Any:
    """output [ROWS, BLOCK] += left [ROWS, :n] @ right [:n, :BLOCK], each as one row of numbers.

    right: float32, or bfloat16 as uint16; its rows are `width` apart. Of the latter, what stands `ahead` of it
    is fetched meanwhile. A sum stays in a register until all of its n products are added, by fma, from the first on.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left_array, right, output = (
            context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 1, 4)
        )
        n, width, ahead = arguments[2], arguments[3], arguments[5]
        in_bits = signature.args[1].dtype != types.float32
        in_row = builder.udiv(builder.extract_value(left_array.shape, 0), SIZE(ROWS))
        left, right, output = left_array.data, right.data, output.data
        fma = get_or_insert_function(builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), "llvm.fma.v16f32")

        def vector(start: Any, at: Any) -> Any:
            at = SIZE(at) if isinstance(at, int) else at
            return builder.bitcast(builder.gep(start, [at]), VECTOR.as_pointer())

        def numbers(start: Any, at: int) -> Any:
            if not in_bits:
                return builder.load(vector(start, at), align=4)
            halves, wholes = (ir.VectorType(ir.IntType(bits), LANES) for bits in (16, 32))
            place = builder.bitcast(builder.gep(start, [SIZE(at)]), halves.as_pointer())
            bits = builder.zext(builder.load(place, align=2), wholes)
            return builder.bitcast(builder.shl(bits, wholes([16] * LANES)), VECTOR)

        for first in range(0, BLOCK, TILE):
            columns = range(first, first + TILE, LANES)
            sums = {(row, column): alloca_once(builder, VECTOR) for row in range(ROWS) for column in columns}
            for (row, column), kept in sums.items():
                builder.store(builder.load(vector(output, row * BLOCK + column), align=4), kept)
            with for_range(builder, n) as loop:
                of_right = builder.gep(right, [builder.mul(loop.index, width)])
                factors = {column: numbers(of_right, column) for column in columns}
                if in_bits:
                    for column in range(first, first + TILE, FETCHED // 2):
                        fetch(builder, vector(of_right, builder.add(ahead, SIZE(column))))
                for row in range(ROWS):
                    of_left = builder.gep(left, [builder.add(builder.mul(in_row, SIZE(row)), loop.index)])
                    number = in_all_lanes(builder, builder.load(of_left))
                    for column in columns:
                        kept = sums[row, column]
                        builder.store(builder.call(fma, [number, factors[column], builder.load(kept)]), kept)
            for (row, column), kept in sums.items():
                builder.store(builder.load(kept), vector(output, row * BLOCK + column), align=4)
        return context.get_dummy_value()

    return types.void(left, right, types.intp, types.intp, output, types.intp), build


@part
def turn_into_shares(scores, seen, before, totals):
    """Let the scores of a row in one block become its shares there; totals are those of the row so far.

    before: the highest score of the row so far. Returns the highest now, and by what earlier shares shrink.
    """
    for j in range(seen, BLOCK):
        scores[j] = -np.inf
    order = ordinal(before)
    for j in range(BLOCK):
        each = ordinal(scores[j])
        order = each if each > order else order
    highest = of_ordinal(order)
    shrink = exp(before - highest)
    for j in range(BLOCK):
        scores[j] = exp(scores[j] - highest) if j < seen else np.float32(0)
        totals[j] = totals[j] * shrink + scores[j]
    return highest, shrink


@part
def whole_sum(numbers):
    """Of BLOCK numbers, which change, in pairs."""
    width = BLOCK // 2
    while width:
        for j in range(width):
            numbers[j] += numbers[width + j]
        width //= 2
    return numbers[0]


@part
def widened(bits):
    """float32 of a bfloat16's bits."""
    return float_of(np.uint32(np.uint32(bits) << np.uint32(16)))


@part
def rounded(number):
    """The bits of the bfloat16 that is nearest, the even one of two."""
    bits = bits_of(number)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@part
def widen_keys(block, held, key_block):
    """The first `held` tokens of a block, and zeros: what lies behind them may be anything, and 0 * NaN is NaN."""
    for d in range(len(block)):
        row, bits = key_block[d * BLOCK : (d + 1) * BLOCK], block[d]
        for token in range(held):
            row[token] = widened(bits[token])
        for token in range(held, BLOCK):
            row[token] = 0


@part
def widen_values(block, held, value_block):
    """The same."""
    for token in range(held):
        bits = block[token]
        for panel in range(len(value_block)):
            row, at = value_block[panel, token * BLOCK : (token + 1) * BLOCK], panel * BLOCK
            for d in range(min(BLOCK, len(bits) - at)):
                row[d] = widened(bits[at + d])
    value_block[:, held * BLOCK :] = 0


@part
def write_row(state, token, keys, values):
    """Write the keys and values of one token, state [heads + 2 * kv_heads, head_dim]."""
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    heads = len(state) - 2 * kv_heads
    block, place = token // BLOCK, token % BLOCK
    for head in range(kv_heads):
        key, value = state[heads + head], state[heads + kv_heads + head]
        for d in range(head_dim):
            keys[block, head, d, place] = rounded(key[d])
            values[block, head, place, d] = rounded(value[d])


@part
def room_for(rows, head_dim):
    """What a thread needs to compute so many rows of queries at once."""
    panels = (head_dim + BLOCK - 1) // BLOCK
    rows += ROWS
    return (
        np.zeros(rows * head_dim, np.float32),  # queries
        np.zeros((panels, rows * BLOCK), np.float32),  # values, mixed
        np.zeros((rows, BLOCK), np.float32),  # totals
        np.zeros(rows, np.float32),  # highest scores
        np.zeros(ROWS * BLOCK, np.float32),  # scores
        np.zeros(head_dim * BLOCK, np.float32),  # a block's keys
        np.zeros((panels, BLOCK * BLOCK), np.float32),  # and values
    )


@part
def attend_piece(states, first, start, end, table, head, then, keys, values, scale, output, room):
    """Let each token of one piece attend to its request so far, with the queries of one of the kv_heads.

    then: what is read after this piece, block * kv_heads + head. room: of room_for(), for all rows of the piece.
    attend_in_blocks() says what else is taken.
    """
    queries, mixed, totals, highest, scores, key_block, value_block = room
    heads, head_dim = output.shape[1], output.shape[2]
    kv_heads, panels = keys.shape[1], len(mixed)
    group = heads // kv_heads
    count = (end - start) * group
    direct = count <= FEW_ROWS and head_dim % BLOCK == 0  # the block is multiplied as it is kept
    for token in range(end - start):
        for member in range(group):
            query = states[first + token, head * group + member]
            at = (token * group + member) * head_dim
            for d in range(head_dim):
                queries[at + d] = query[d] * scale
    mixed[:] = 0
    totals[:] = 0
    highest[:] = -np.inf
    blocks = (end + BLOCK - 1) // BLOCK
    for index in range(blocks):
        held = min(BLOCK, end - index * BLOCK)
        following = table[index + 1] * kv_heads + head if index + 1 < blocks else then
        ahead = (following - table[index] * kv_heads - head) * head_dim * BLOCK
        key_bits, value_bits = keys[table[index], head], values[table[index], head]
        if not direct:
            widen_keys(key_bits, held, key_block)
            widen_values(value_bits, held, value_block)
        for at in range(max(0, index * BLOCK - start) * group, count, ROWS):  # the rows that see this block
            scores[:] = 0
            some = queries[at * head_dim : (at + ROWS) * head_dim]
            if direct:
                add_product(some, key_bits.reshape(-1), head_dim, BLOCK, scores, ahead)
            else:
                add_product(some, key_block, head_dim, BLOCK, scores, 0)
            for row in range(at, min(at + ROWS, count)):
                seen = min(BLOCK, start + row // group + 1 - index * BLOCK)
                shares = scores[(row - at) * BLOCK : (row - at + 1) * BLOCK]
                highest[row], shrink = turn_into_shares(shares, seen, highest[row], totals[row])
                for panel in range(panels):
                    shrunk = mixed[panel, row * BLOCK : (row + 1) * BLOCK]
                    for d in range(BLOCK):
                        shrunk[d] *= shrink
            for panel in range(panels):
                found_so_far = mixed[panel, at * BLOCK : (at + ROWS) * BLOCK]
                if direct:
                    add_product(scores, value_bits.reshape(-1)[panel * BLOCK :], held, head_dim, found_so_far, ahead)
                else:
                    add_product(scores, value_block[panel], BLOCK, BLOCK, found_so_far, 0)
    for row in range(count):
        total, found = whole_sum(totals[row]), output[first + row // group, head * group + row % group]
        for panel in range(panels):
            at = panel * BLOCK
            for d in range(min(BLOCK, head_dim - at)):
                found[at + d] = mixed[panel, row * BLOCK + d] / total


@part
def attend_all(me, turns, stage, states, pieces, keys, values, scale, output, room):
    """The stage in which each token attends to its request so far; attend_in_blocks() says what is taken. Returns the
    next stage. room: of room_for(), for all rows of any piece."""
    firsts, starts, ends, tables = pieces
    kv_heads = keys.shape[1]
    shares = len(firsts) * kv_heads
    share = take(me, turns, stage, shares)
    while share < shares:
        n, head = share // kv_heads, share % kv_heads
        later = min(share + 1, shares - 1)
        then = tables[later // kv_heads, 0] * kv_heads + later % kv_heads
        attend_piece(states, firsts[n], starts[n], ends[n], tables[n], head, then, keys, values, scale, output, room)
        share = take_next(me, turns, stage, shares)
    return end_of(me, turns, stage, shares)


@compiled("void(float32[:, :, ::1], int64[::1], uint16[:, :, :, ::1], uint16[:, :, :, ::1])")
def write_rows(states, tokens, keys, values):
    """Write keys and values to their places; attend_in_blocks() says what is taken."""
    for row in range(len(states)):
        write_row(states[row], tokens[row], keys, values)


@compiled(
    "void(int64, int64[:, :, ::1], float32[:, :, ::1], int64[::1], int64[::1], int64[::1], int64[:, ::1],"
    " uint16[:, :, :, ::1], uint16[:, :, :, ::1], float32, float32[:, :, ::1])"
)
def attend_pieces(me, turns, states, firsts, starts, ends, tables, keys, values, scale, output):
    """Let each token of N pieces attend to its request so far; attend_in_blocks() says what is taken."""
    room = room_for((ends - starts).max() * (output.shape[1] // keys.shape[1]), output.shape[2])
    attend_all(me, turns, 0, states, (firsts, starts, ends, tables), keys, values, scale, output, room)


def attend_in_blocks(
    states: NDArray[np.float32],
    tokens: NDArray[np.int64],
    pieces: tuple[NDArray[np.int64], ...],
    keys: NDArray[np.uint16],
    values: NDArray[np.uint16],
    scale: float,
) -> NDArray[np.float32]:
    """Write the keys and values of some tokens into their blocks, and let each token attend to its request so far.

    states: [T, heads + 2 * kv_heads, head_dim], of query, key and value. tokens: [T], of each block * BLOCK + its place
    in the block. pieces: N of requests: [N], the first token of each; [N] and [N], its position and that behind the
    last; [N, B], the request's blocks. keys: bfloat16 as uint16, [num_blocks, kv_heads, head_dim, BLOCK]; values: the
    same, [num_blocks, kv_heads, BLOCK, head_dim]. Returns [T, heads, head_dim].
    """
    count, all_heads, head_dim = states.shape
    output = np.empty((count, all_heads - 2 * keys.shape[1], head_dim), np.float32)
    write_rows(states, tokens, keys, values)
    turns, arguments = turns_for(1), (states, *pieces, keys, values, scale, output)
    if count < MANY_TOKENS:
        attend_pieces(0, turns, *arguments)
    else:
        with_help(attend_pieces, turns, *arguments)
    return output
