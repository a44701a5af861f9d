"""Threads that share the work of one call: on time, late, or never there."""

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch

from llama2_chat.kernels import crew
from llama2_chat.kernels.compiled import OPTIONS
from llama2_chat.kernels.crew import end_of, take, take_next, turns_for, with_help

STAGES = 200


@numba.njit("void(int64, int64[:, :, ::1], int64[:, ::1])", **OPTIONS)
def add_neighbours(me, turns, numbers):
    """Row after row of numbers, each from the one before it, of which a thread needs what others have computed."""
    width, stage = numbers.shape[1], 0
    while stage < len(numbers) - 1:
        before, row = numbers[stage], numbers[stage + 1]
        share = take(me, turns, stage, width)
        while share < width:
            row[share] = (before[share] + before[width - 1 - share]) % 1_000_003 + share
            share = take_next(me, turns, stage, width)
        stage = end_of(me, turns, stage, width)


def computed(width):
    numbers = np.zeros((STAGES + 1, width), np.int64)
    numbers[0] = np.arange(width)
    with_help(add_neighbours, turns_for(STAGES), numbers)
    return numbers.tolist()


def expected(width):
    rows = [np.arange(width)]
    for _ in range(STAGES):
        rows.append((rows[-1] + rows[-1][::-1]) % 1_000_003 + np.arange(width))
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("width", [1, 2, 7, 100])
@pytest.mark.parametrize("threads", [1, 2, 3, 40])
def test_each_stage_begins_when_all_of_the_one_before_it_is_there(threads, width, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for _ in range(5):
        assert computed(width) == expected(width)


class LateThreads(ThreadPoolExecutor):
    """Each comes when much of the work is done, or all."""

    def submit(self, function, *arguments):
        def begin_late():
            time.sleep(self.late)
            function(*arguments)

        return super().submit(begin_late)


@pytest.mark.parametrize("late", [0.0001, 0.001, 0.05])
def test_threads_that_come_late_find_what_is_done_and_do_it_no_second_time(late, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with LateThreads(3) as threads:
        threads.late = late
        monkeypatch.setattr(crew, "_helpers", lambda: threads)
        for _ in range(3):
            assert computed(300) == expected(300)


def test_nobody_waits_for_threads_that_never_come(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with ThreadPoolExecutor(1) as busy:
        hanging = busy.submit(time.sleep, 0.5)
        monkeypatch.setattr(crew, "_helpers", lambda: busy)
        assert computed(30) == expected(30)
        assert not hanging.done()
