"""The line of passwords that are to be checked, which takes some tenths of a second each.

Whoever guesses shall neither slow the server down nor keep others out: a wrong guess makes the next one wait, and those
who were wrong the least come first. Used from the event loop alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable

from llama2_chat.errors import Busy
from llama2_chat.server.limits import counted

MOST, MOST_OF_ADDRESS, MOST_OF_NAME = 200, 10, 3  # in line; MOST_OF_NAME: for one name from one address
# Wrong guesses after which each further one waits: a second, then two, four, and so on up to LONGEST_S.
FREE_OF_ADDRESS, FREE_OF_NAME = 20, 5
LONGEST_S = 30.0
FORGOTTEN_S = 900.0  # after the last wrong one
REMEMBERED = 10_000  # addresses, and names by address


class Guesses:
    """Whether a password fits, as `check` says, for so many at once as the line takes."""

    def __init__(self, check: Callable[[str, str], Awaitable[bool]]) -> None:
        self._check = check
        self._wrong = _Recent()  # guesses, by address and by address and name
        self._known = _Recent()  # address and name of those who were let in
        self._here: Counter[str] = Counter()
        self._busy = False
        self._line: list[tuple[tuple[int, int, int], asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    async def fits(self, address: str, name: str, password: str) -> bool:
        """Raises Busy where too many wait already. Cancelled, it leaves the line."""
        limits = (("all", MOST), (address, MOST_OF_ADDRESS), (f"{address} {name}", MOST_OF_NAME))
        if any(self._here[counted_as] >= most for counted_as, most in limits):
            raise Busy("Too many attempts at once. Please wait a minute and try again.")
        with counted(self._here, "all"), counted(self._here, address), counted(self._here, f"{address} {name}"):
            await asyncio.sleep(self._delay_s(address, name))
            async with self._turn(address, name):
                fits = await self._check(name, password)
        self._note(address, name, fits)
        return fits

    def _delay_s(self, address: str, name: str) -> float:
        """Whoever was let in before with this name from here does not wait for what others guess from here."""
        of_address = 0.0 if self._known[address, name] else _backoff_s(self._wrong[address] - FREE_OF_ADDRESS)
        return max(of_address, _backoff_s(self._wrong[address, name] - FREE_OF_NAME))

    def _note(self, address: str, name: str, fits: bool) -> None:
        if fits:
            self._known.add((address, name))
            self._wrong.forget((address, name))
        else:
            self._wrong.add(address)
            self._wrong.add((address, name))

    @contextlib.asynccontextmanager
    async def _turn(self, address: str, name: str) -> AsyncIterator[None]:
        """One at a time; of those in line, whoever guessed wrong the least is the next."""
        if self._busy:
            waiting = asyncio.get_running_loop().create_future()
            rank = (self._wrong[address, name], self._wrong[address], next(self._numbers))
            heapq.heappush(self._line, (rank, waiting))
            try:
                await waiting
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled():
                    self._next()  # it was its turn just now
                raise
        self._busy = True
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        while self._line:
            _, waiting = heapq.heappop(self._line)
            if not waiting.done():
                waiting.set_result(None)
                return
        self._busy = False


def _backoff_s(wrong: int) -> float:
    return min(2.0 ** min(wrong, 10), LONGEST_S) if wrong >= 0 else 0.0


class _Recent:
    """How often something has happened, until it has not for a while; the oldest is forgotten for what is new."""

    def __init__(self) -> None:
        self._counts: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()

    def __getitem__(self, name: Hashable) -> int:
        count, last = self._counts.get(name, (0, 0.0))
        return count if time.monotonic() - last < FORGOTTEN_S else 0

    def add(self, name: Hashable) -> None:
        self._counts[name] = self[name] + 1, time.monotonic()
        self._counts.move_to_end(name)
        if len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)

    def forget(self, name: Hashable) -> None:
        self._counts.pop(name, None)
