"""The line of passwords: who guesses waits longer and longer, and nobody else waits for them."""

import asyncio
import threading

import pytest

from llama2_chat.errors import Busy
from llama2_chat.server import guesses
from llama2_chat.server.guesses import Guesses


@pytest.fixture
def slept(monkeypatch):
    """Seconds that were waited for, and are not. Servers of other tests sleep on in their threads."""
    slept, sleep, here = [], asyncio.sleep, threading.current_thread()

    async def sleep_at_once(seconds):
        mine = threading.current_thread() is here
        slept.extend([seconds] * mine)
        await sleep(0 if mine else seconds)

    monkeypatch.setattr(guesses.asyncio, "sleep", sleep_at_once)
    return slept


class Checker:
    """Takes as long as a test likes. `checked` are the names in the order in which they were."""

    def __init__(self):
        self.checked, self.free = [], asyncio.Event()

    async def __call__(self, name, password):
        self.checked.append(name)
        await self.free.wait()
        return password == "right"


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_wrong_guesses_of_a_name_wait_twice_as_long_each_time_and_no_longer_than_half_a_minute(slept):
    async def guess():
        checker = Checker()
        checker.free.set()
        line = Guesses(checker)
        for _ in range(12):
            assert not await line.fits("a", "anna", "wrong")
        assert slept == [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 30, 30]
        await line.fits("b", "anna", "wrong")  # from elsewhere
        assert slept[-1] == 0

    asyncio.run(guess())


def test_an_address_that_tries_many_names_waits_and_whoever_was_let_in_from_there_does_not(slept):
    async def guess():
        checker = Checker()
        checker.free.set()
        line = Guesses(checker)
        assert await line.fits("a", "anna", "right")
        for n in range(22):
            await line.fits("a", f"name {n}", "wrong")
        assert slept[-1] == 2
        assert await line.fits("a", "anna", "right")
        assert slept[-1] == 0

    asyncio.run(guess())


def test_the_right_password_waits_for_one_of_a_hundred_guesses_of_those_who_were_wrong_before():
    # It waited two minutes behind them.
    async def guess():
        checker = Checker()
        line = Guesses(checker)
        checker.free.set()
        for n in range(100):
            await line.fits(f"address {n}", "anna", "wrong")
        checker.free.clear()
        wrong = [asyncio.create_task(line.fits(f"address {n}", "anna", "wrong")) for n in range(100)]
        await settle()
        right = asyncio.create_task(line.fits("another", "bert", "right"))
        await settle()
        checker.free.set()
        assert await right
        await asyncio.gather(*wrong)
        return checker.checked[100:102]

    assert asyncio.run(guess()) == ["anna", "bert"]


def test_the_line_is_bounded_for_all_for_an_address_and_for_a_name():
    async def guess():
        line = Guesses(Checker())
        waiting = [asyncio.create_task(line.fits("a", "anna", "wrong")) for _ in range(3)]
        waiting += [asyncio.create_task(line.fits("a", f"name {n}", "wrong")) for n in range(7)]
        await settle()
        for address, name in (("a", "anna"), ("a", "bert")):
            with pytest.raises(Busy, match="Too many attempts"):
                await line.fits(address, name, "right")
        waiting.append(asyncio.create_task(line.fits("b", "bert", "right")))
        await settle()
        assert not waiting[-1].done()
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(guess())


def test_who_has_left_is_not_checked_and_holds_up_nobody():
    async def guess():
        checker = Checker()
        line = Guesses(checker)
        tasks = [asyncio.create_task(line.fits("a", name, "right")) for name in ("anna", "bert", "carl")]
        await settle()
        tasks[1].cancel()
        await settle()
        checker.free.set()
        assert [await tasks[0], await tasks[2]] == [True, True]
        assert checker.checked == ["anna", "carl"]
        assert not line._here

    asyncio.run(guess())


def test_whoever_was_wrong_least_is_the_next():
    async def guess():
        checker = Checker()
        line = Guesses(checker)
        checker.free.set()
        await line.fits("a", "anna", "wrong")
        checker.free.clear()
        tasks = [
            asyncio.create_task(line.fits(address, name, "right"))
            for address, name in (("c", "first"), ("a", "anna"), ("a", "bert"), ("b", "anna"))
        ]
        await settle()
        checker.free.set()
        await asyncio.gather(*tasks)
        return checker.checked[1:]

    assert asyncio.run(guess()) == ["first", "anna", "bert", "anna"]
