"""The guesses of an EagleHead on a CPU in one compiled call, which threads compute together: what it reads first, and
one guess after the other, as long as they are likely.

What is computed is what kernels/eagle.py computes, in float32 between the products.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama2_chat.kernels.block_attention import BLOCK, widened
from llama2_chat.kernels.compiled import compiled, part
from llama2_chat.kernels.cpu_sampling import PART, best_of
from llama2_chat.kernels.crew import end_of, take, take_next, turns_for, with_help
from llama2_chat.kernels.int8_rows import normed
from llama2_chat.kernels.llama_layers import (
    STAGES,
    Kept,
    Layers,
    Numbers,
    addresses,
    compute_layer,
    multiply,
    own_space,
    split_row,
)
from llama2_chat.kernels.panels import Panels

FUSING_STAGES, OTHER_STAGES = 2, 6  # before the first guess, and of each guess beside those of its layers
EVENING = np.finfo(np.float32).eps  # epsilon of the norms of what was computed behind layers


class Joining(NamedTuple):
    """A linear layer."""

    panels: Panels
    bias: Numbers  # [outputs]


class HeadArrays(NamedTuple):
    """What a head has beside its layers."""

    embeddings: NDArray[np.uint16]  # [V, width], bfloat16
    embedding_scale: float
    fuse: Joining | None
    fc: Joining
    norm: Numbers  # [width]; [0] for none
    epsilon: float
    output: Panels
    ids: NDArray[np.int64]  # [v], of the outputs


class Read(NamedTuple):
    """Tokens of N requests that a head reads, T in all, and where they are. As attend_in_blocks() takes them: tokens,
    pieces."""

    ids: NDArray[np.int64]  # [T]
    behind: Numbers  # [T, n * width], of the token before each: what the model computed behind layers, and at last
    turns: tuple[Numbers, Numbers]  # cosines and sines, [T, head_dim]
    tokens: NDArray[np.int64]
    pieces: tuple[NDArray[np.int64], ...]


class Wanted(NamedTuple):
    """Guesses behind what is read, up to G of each request."""

    last: NDArray[np.int64]  # [N], the token behind which they come
    lengths: NDArray[np.int64]  # [N], how many at most
    least: Numbers  # [N], how likely those so far must all come true for another one
    seen: NDArray[np.bool_]  # [N, v], as LikelyTokens has them; changes
    repetition: Numbers  # [N, 1]
    turns: tuple[Numbers, Numbers]  # of all guesses but the last of each, [G - 1, N, head_dim]
    positions: NDArray[np.int64]  # [N], of the first guess
    tables: NDArray[np.int64]  # [N, B], the blocks of each request


class LlamaHead:
    """A head as compiled functions find it."""

    def __init__(self, layers: Layers, arrays: HeadArrays) -> None:
        self._layers, self._arrays = layers, arrays
        self._fuse = _addresses(arrays.fuse.panels if arrays.fuse else None)
        self._fc, self._output = _addresses(arrays.fc.panels), _addresses(arrays.output)

    def read(self, read: Read, kept: Kept, wanted: Wanted | None) -> tuple[NDArray[np.int64], Numbers]:
        """Write keys and values of what is read, and guess behind it: ids [G, N], and how likely it is that each of
        them and those before it come true. What is below `lengths` counts, up to the first that is not above `least`.

        kept: of each layer its keys and values, as attend_in_blocks() takes them. Raises ValueError if what may have
        been seen is of another vocabulary.
        """
        arrays, count, wide = self._arrays, *read.behind.shape
        width = arrays.embeddings.shape[1]
        _, _, head_dim, _, epsilon, scale = self._layers.sizes
        table = self._layers.table(kept)
        if wanted is None:
            nobody, of_none = np.empty(0, np.int64), np.empty((0, 0, head_dim), np.float32)
            nothing = np.empty((0, 0), np.bool_), np.empty((0, 0), np.float32)
            wanted = Wanted(
                nobody, nobody, arrays.norm[:0], *nothing, (of_none, of_none), nobody, np.empty((0, 0), np.int64)
            )
        if wanted.seen.shape[1] != len(arrays.ids) and len(wanted.lengths):  # compiled code looks at no bounds
            raise ValueError(f"{len(arrays.ids)} tokens can be guessed, and {wanted.seen.shape[1]} may have been seen")
        guesses, requests = int(wanted.lengths.max(initial=0)), len(wanted.lengths)
        made = np.empty((guesses, requests), np.int64), np.empty((guesses, requests), np.float32)
        stages = FUSING_STAGES + max(1, guesses) * (OTHER_STAGES + STAGES * len(table))
        with_help(
            compute_guesses,
            *(turns_for(stages), table, len(kept[0][0]), np.float32(epsilon), np.float32(scale)),
            *(arrays.embeddings, np.float32(arrays.embedding_scale), self._fuse, self._fc, self._output),
            *(arrays.fuse.bias if arrays.fuse else arrays.norm[:0], arrays.fc.bias),
            *(arrays.norm, np.float32(arrays.epsilon), arrays.ids),
            *(read.ids, read.behind, *read.turns, read.tokens, *read.pieces),
            *(wanted.last, wanted.lengths, wanted.least, wanted.seen, wanted.repetition),
            *(*wanted.turns, wanted.positions, wanted.tables),
            *self._layers.room(count, max(wide, 2 * width)),
            *(np.empty((count, width), np.float32), np.empty((count, width), np.float32)),
            *(np.empty((requests, len(arrays.ids)), np.float32), *made),
        )
        return made


def _addresses(panels: Panels | None) -> NDArray[np.int64]:
    return np.array(addresses(panels) if panels else [], np.int64)


@part
def fuse_row(behind, ones, numbers):
    """Write what `fuse` takes: what was computed behind layers normalised, and then what was computed at last."""
    width = len(ones)
    last = len(behind) - width
    for at in range(0, last, width):
        normed(behind[at : at + width], ones, EVENING, numbers[at : at + width])
    for i in range(last, len(behind)):
        numbers[i] = behind[i]


@part
def join_features(embedding, scale, features, numbers):
    """Write what `fc` takes."""
    width = len(embedding)
    for i in range(width):
        numbers[i] = widened(embedding[i]) * scale
        numbers[width + i] = features[i]


@part
def add(row, output):
    for i in range(len(row)):
        output[i] += row[i]


@compiled(
    "void(int64, int64[:, :, ::1], int64[:, ::1], int64, float32, float32, uint16[:, ::1], float32, int64[::1],"
    " int64[::1], int64[::1], float32[::1], float32[::1], float32[::1], float32, int64[::1], int64[::1],"
    " float32[:, ::1], float32[:, ::1], float32[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[:, ::1],"
    " int64[::1], int64[::1], float32[::1], boolean[:, ::1], float32[:, ::1], float32[:, :, ::1], float32[:, :, ::1],"
    " int64[::1], int64[:, ::1], float32[:, :, ::1], float32[:, :, ::1], float32[:, ::1], uint8[::1], float32[::1],"
    " float32[:, ::1], float32[:, ::1], float32[:, ::1], int64[:, ::1], float32[:, ::1])"
)
def compute_guesses(
    me,
    turns,
    table,
    num_blocks,
    epsilon,
    scale,
    embeddings,
    embedding_scale,
    fuse,
    fc,
    output,
    fuse_bias,
    fc_bias,
    norm,
    norm_epsilon,
    vocabulary,
    ids,
    behind,
    cos,
    sin,
    tokens,
    firsts,
    starts,
    ends,
    tables,
    last,
    lengths,
    least,
    seen,
    repetition,
    later_cos,
    later_sin,
    positions,
    own_tables,
    states,
    attended,
    gated,
    codes,
    largest,
    hidden,
    features,
    logits,
    made,
    chances,
):
    """LlamaHead.read() says what is taken; made and chances are what it returns.

    Each thread runs this and finds out by itself who is guessed for: what tells it is written once.
    """
    (count, wide), width = behind.shape, hidden.shape[1]
    numbers, room = own_space(hidden, states, attended, gated, starts, ends)
    joined, ones = np.empty(max(wide, 2 * width), np.float32), np.ones(width, np.float32)
    orders = np.empty(len(vocabulary), np.int32)
    highest = np.empty((len(vocabulary) + PART - 1) // PART, np.int32)
    model, space = (num_blocks, epsilon, scale), (states, attended, gated, codes, largest, numbers, room)
    stage = 0

    if len(fuse):
        row = take(me, turns, stage, count)
        while row < count:
            fuse_row(behind[row], ones, joined[:wide])
            split_row(row, joined[:wide], count, codes, largest)
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)
        stage = multiply(me, turns, stage, codes, count, wide, fuse, largest, features, False)

    going = at = np.arange(len(lengths))  # who is guessed for, and where the features of their newest guesses are
    guess = 0
    while True:
        row = take(me, turns, stage, count)
        while row < count:
            if guess:
                join_features(
                    embeddings[made[guess - 1, going[row]]], embedding_scale, features[at[row]], joined[: 2 * width]
                )
            else:
                if len(fuse):
                    add(fuse_bias, features[row])
                else:
                    features[row] = behind[row]
                join_features(embeddings[ids[row]], embedding_scale, features[row], joined[: 2 * width])
            split_row(row, joined[: 2 * width], count, codes, largest)
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)
        stage = multiply(me, turns, stage, codes, count, 2 * width, fc, largest, hidden, False)

        row = take(me, turns, stage, count)
        while row < count:
            add(fc_bias, hidden[row])
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)

        rotary, pieces = (cos, sin), (firsts, starts, ends, tables)
        for number in range(len(table)):
            stage = compute_layer(me, turns, stage, table[number], model, hidden[:count], rotary, tokens, pieces, space)
        if not len(going):
            return
        count = len(going)

        row = take(me, turns, stage, count)
        while row < count:
            newest = row if guess else last[row]
            if len(norm):
                normed(hidden[newest], norm, norm_epsilon, features[row])
            else:
                features[row] = hidden[newest]
            split_row(row, features[row], count, codes, largest)
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)
        stage = multiply(me, turns, stage, codes, count, width, output, largest, logits, False)

        row = take(me, turns, stage, count)
        while row < count:
            n = going[row]
            best, chance = best_of(logits[row], seen[n], repetition[n, 0], orders, highest)
            made[guess, n] = vocabulary[best]
            chances[guess, n] = chance * (chances[guess - 1, n] if guess else np.float32(1))
            row = take_next(me, turns, stage, count)
        stage = end_of(me, turns, stage, count)

        guess += 1
        likely = np.empty(count, np.int64)
        count = 0
        for row in range(len(going)):
            n = going[row]
            if lengths[n] > guess and chances[guess - 1, n] > least[n]:
                likely[count] = row
                count += 1
        if not count:
            return
        at = likely[:count]
        going = going[at]
        cos, sin = np.empty((count, cos.shape[1]), np.float32), np.empty((count, cos.shape[1]), np.float32)
        tokens, firsts, starts, ends = np.empty(count, np.int64), np.arange(count), positions[going], positions[going]
        tables = np.empty((count, own_tables.shape[1]), np.int64)
        for row in range(count):
            n = going[row]
            cos[row], sin[row], tables[row] = later_cos[guess - 1, n], later_sin[guess - 1, n], own_tables[n]
            starts[row] += guess - 1
            ends[row] += guess
            tokens[row] = tables[row, starts[row] // BLOCK] * BLOCK + starts[row] % BLOCK
