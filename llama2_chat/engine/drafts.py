"""Guesses at what an answer says next, and how likely they are: text that comes again, as in quotes, code and lists;
and how long those of a model should be, which draft_model.py makes where nothing comes again.

A guess is only ever a guess: the engine chooses each token as it would without, and keeps a guess where it equals the
choice. A request has `Drafts` of its own, which know its prompt and its answer and nobody else's.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

# Ids that must stand as they stood before, for what came next then to be guessed; guesses behind more than the most are
# counted together.
LEAST_ALIKE, MOST_ALIKE = 2, 8
FIRST_JUDGED = 8  # what is believed at first weighs as much as so many guesses that were seen to come true or not
PLACES = 8  # that are compared, the latest ones
COMPARED = 16  # ids before each
# Of a model's guesses: what is believed of them at first, how much of the past is kept at each step, and after how many
# steps without guesses one is made nevertheless.
FIRST_TRUE, FIRST_MADE, FORGETTING, PAUSE = 1.2, 2.0, 0.98, 24
LEAST_TIMED, TIMED = 4, 16  # steps with a model's guesses, of which the middle one tells what they cost


class Guess(NamedTuple):
    """What may come next, behind the guesses before it."""

    id: int
    chance: float  # that it and all of those come true


class Drafts:
    """Guesses for one request.

    The more ids are alike, the likelier does what came next then come again; how likely, each request finds out for
    itself: all that is said is compared with what came then, whether it was guessed or not.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], list[int]] = {}  # of two ids in a row: where the next one stands
        self._read = 0  # ids that have been looked at
        self._alike, self._place = 0, 0  # of the newest ids: how many stood alike before, and where the next one stands
        # Of what came next where so many were alike: how much was looked at, and how much of it came true.
        self._judged, self._true = [0] * (MOST_ALIKE + 1), [0] * (MOST_ALIKE + 1)
        self.of_model: Confidence | None = Confidence()  # None once a model has failed to guess here

    def look_up(self, ids: Sequence[int], most: int, forced: Sequence[int] = ()) -> list[Guess]:
        """At most so many ids that may come next; often none.

        ids: prompt and answer, which begin with those of the last call. forced: guesses that come before these.
        """
        self._read_on(ids)
        text, alike, place = ids, self._alike, self._place
        if forced:
            text = [*ids, *forced]
            alike, place = self._find(text, len(text))
        if alike < LEAST_ALIKE:
            return []
        guesses, chance, period = [], 1.0, len(text) - place
        for step in range(most):  # each that comes true makes one more alike
            chance *= self._chance(alike + step)
            guesses.append(Guess(text[place + step % period], chance))  # goes round, as lists and rules do
        return guesses

    def _chance(self, alike: int) -> float:
        """That what came next where so many ids were alike comes again."""
        seen = min(alike, MOST_ALIKE)
        return (FIRST_JUDGED * _first_chance(alike) + self._true[seen]) / (FIRST_JUDGED + self._judged[seen])

    def _read_on(self, ids: Sequence[int]) -> None:
        """Remember where each of these stands, and judge what came next then by those that are new."""
        if not self._read:
            for place, pair in enumerate(itertools.pairwise(ids[:-1]), 2):
                self._places.setdefault(pair, []).append(place)
            self._read = max(len(ids), 2)
            self._alike, self._place = self._find(ids, len(ids))
        for place in range(self._read, len(ids)):
            self._places.setdefault((ids[place - 2], ids[place - 1]), []).append(place)
            comes_again = self._alike >= LEAST_ALIKE and ids[place] == ids[self._place]
            self._judged[min(self._alike, MOST_ALIKE)] += 1  # of fewer alike than the least nobody asks
            self._true[min(self._alike, MOST_ALIKE)] += comes_again
            self._alike, self._place = (self._alike + 1, self._place + 1) if comes_again else self._find(ids, place + 1)
        self._read = max(len(ids), 2)

    def _find(self, text: Sequence[int], end: int) -> tuple[int, int]:
        """How many ids before this end stood alike before, and where the next one stands; the latest of the longest."""
        places = self._places.get((text[end - 2], text[end - 1])) if end > 1 else None
        return max((_alike(text, place, end), place) for place in places[-PLACES:]) if places else (0, 0)


class GuessCost:
    """What a model's guess costs, where a step that checks guesses costs 1, by the clock.

    On a GPU a guess takes what launching it takes, of which its weights tell nothing. assumed: until it is known.
    """

    def __init__(self, assumed: float) -> None:
        self._assumed = assumed
        self._guesses, self._steps = deque[float](maxlen=TIMED), deque[float](maxlen=TIMED)  # seconds
        self._ended: float | None = None  # when the latest guesses were there
        self._computed = 0  # steps since then

    def made(self, started: float, ended: float, guesses: int) -> None:
        """So many in a row were made between these times, or none; then comes a step that checks them."""
        only_one = self._computed == 1  # where guesses are rare there are many, and nobody knows how long one took
        self._computed = 0
        if not guesses:
            self._ended = None
            return
        if self._ended is not None and only_one:
            self._steps.append(started - self._ended)
        self._guesses.append((ended - started) / guesses)
        self._ended = ended

    def computed(self) -> None:
        """A step, with guesses or without."""
        self._computed += 1

    @property
    def cost(self) -> float:
        if len(self._steps) < LEAST_TIMED:
            return self._assumed
        return median(self._guesses) / median(self._steps)


class Confidence:
    """How often a model's guesses come true, and so how many of them pay."""

    def __init__(self) -> None:
        self._true, self._made = FIRST_TRUE, FIRST_MADE  # guesses lately, those after a wrong one left out
        self._steps_without = 0

    def length(self, most: int, cost: float) -> int:
        """How many guesses may be made: all, of which the model makes as many as it is sure of, if as many as pay make
        the answer come faster; else none, but for a single one now and then.

        cost: of making a guess and checking it, for a token of each answer costs 1 without.
        """
        pay = self._pay(most, cost)
        self._steps_without = 0 if pay else self._steps_without + 1
        return most if pay else min(1, most) if self._steps_without > PAUSE else 0

    @property
    def chance(self) -> float:
        """That the next guess comes true."""
        return self._true / self._made

    def least(self, cost: float) -> float:
        """How likely it must be that all guesses so far come true, for another one behind them to pay: then it comes
        true as often as it costs. cost: as length() takes it."""
        return cost / self.chance

    def may_guess(self, most: int, cost: float) -> bool:
        """Whether length() would be more than 0."""
        return most > 0 and (self._steps_without >= PAUSE or self._pay(most, cost))

    def _pay(self, most: int, cost: float) -> bool:
        chance, tokens, pay = self.chance, 1.0, False
        for length in range(1, most + 1):
            tokens += chance**length
            pay |= tokens > 1 + cost * length
        return pay

    def judge(self, guessed: int, kept: float) -> None:
        """Of so many guesses in a row the first ones came true, so many, or as many as is believed of a single one."""
        self._true = self._true * FORGETTING + kept
        self._made = self._made * FORGETTING + min(kept + 1, guessed)
        self._steps_without = 0


def _first_chance(alike: int) -> float:
    """That what came next where so many ids were alike comes again, before anything has been seen of an answer.

    In answers of the small model it did so 0.33 · 0.42 · 0.54 · 0.66 · 0.71 · 0.82 of the times behind 2 to 7.
    """
    return (alike - 1) / (alike + 1)


def _alike(ids: Sequence[int], place: int, end: int) -> int:
    """How many ids before this place are those before the end."""
    most = min(place, COMPARED)
    return next((n for n in range(most) if ids[place - 1 - n] != ids[end - 1 - n]), most)
