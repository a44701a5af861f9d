"""Threads that share what one call computes on the CPU, without Python in between.

A compiled function takes `turns` and the number of its thread, and every thread runs all of it: in each stage it takes
one share after the other until none is left, and waits until all are finished before it goes on. A thread that comes
late, or never, finds shares taken and is not missed. So nobody waits for a thread to wake, which takes longer than a
small product.

Shares that lie side by side are one thread's as far as possible: what the processor reads ahead for one thread would
else be another's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from llama2_chat.kernels.compiled import part

APART = 8  # numbers from one that threads write to the next: 64 bytes, which one of them writes at a time
FINISHED = 1  # beside the number of shares that are taken
MOST_THREADS = 8  # of a call: with each one more, the others wait longer for it
PATIENCE = 1024  # looks at a stage before other programs may have the processor


def turns_for(stages: int) -> NDArray[np.int64]:
    """Of a call with so many stages, for PyTorch's number of threads, [stages, threads + 1, APART]: of each stage how
    many shares are taken of each thread's own and how many it has finished, and behind them how many all have."""
    return np.zeros((stages, min(torch.get_num_threads(), MOST_THREADS) + 1, APART), np.int64)


def with_help(function: Callable[..., None], turns: NDArray[np.int64], *arguments: Any) -> None:
    """Call a compiled function that shares its work in this thread, number 0, and in others if they come in time."""
    helping = [_helpers().submit(function, n, turns, *arguments) for n in range(1, turns.shape[1] - 1)]
    function(0, turns, *arguments)
    for each in helping:
        each.cancel()


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS, "shares")


@intrinsic
def _add(typing: Any, turns: Any, at: Any, number: Any) -> Any:
    """What turns, int64 [...], has at a place, counted over all its numbers, before a number is added to it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", builder.gep(array.data, [arguments[1]]), arguments[2], "acq_rel")

    return types.int64(turns, types.intp, types.int64), build


@intrinsic
def _current(typing: Any, turns: Any, at: Any) -> Any:
    """What stands there now, whoever has written it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.load_atomic(builder.gep(array.data, [arguments[1]]), "acquire", 8)

    return types.int64(turns, types.intp), build


@intrinsic
def _give_way(typing: Any) -> Any:
    """Let another program have the processor, if one wants it and the system can."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if os.name == "posix":
            builder.call(get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), build


@part
def take(me, turns, stage, shares):
    """A share of a stage for thread `me`, of its own as long as there are some; none is left where it is not below
    `shares`."""
    threads = turns.shape[1] - 1
    for later in range(threads):
        owner = (me + later) % threads
        first, end = (owner * shares + threads - 1) // threads, ((owner + 1) * shares + threads - 1) // threads
        if first == end:
            continue
        place = place_of(turns, stage, owner)
        if first + _current(turns, place) < end:
            share = first + _add(turns, place, 1)
            if share < end:
                return share
    return shares


@part
def take_next(me, turns, stage, shares):
    """The same, by who has finished one."""
    turns[stage, me, FINISHED] += 1
    return take(me, turns, stage, shares)


@part
def end_of(me, turns, stage, shares):
    """Wait until all shares of a stage are finished. Returns the next stage."""
    of_all = place_of(turns, stage, turns.shape[1] - 1)
    if turns[stage, me, FINISHED]:
        _add(turns, of_all, turns[stage, me, FINISHED])
    looks = 0
    while _current(turns, of_all) < shares:
        looks += 1
        if looks % PATIENCE == 0:
            _give_way()
    return stage + 1


@part
def place_of(turns, stage, column):
    return (stage * turns.shape[1] + column) * APART
