"""Guesses at what an answer says next: text that comes again, as in quotes, code and lists; and how long those of a
model should be, which draft_model.py makes where nothing comes again.

A guess is only ever a guess: the engine chooses each token as it would without, and keeps a guess where it equals the
choice. A request has `Drafts` of its own, which know its prompt and its answer and nobody else's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

# Ids that must stand as they stood before, for what came next then to be guessed: at first, at least and at most.
ALIKE, LEAST_ALIKE, MOST_ALIKE = 3, 2, 8
LENGTH, LEAST_LENGTH, MOST_LENGTH = 4, 1, 16  # ids of a guess: the same
PLACES = 8  # that are compared, the latest ones
COMPARED = 16  # ids before each
# Of a model's guesses: what is believed of them at first, how much of the past is kept at each step, and after how many
# steps without guesses one is made nevertheless.
FIRST_TRUE, FIRST_MADE, FORGETTING, PAUSE = 1.2, 2.0, 0.98, 24
LEAST_TIMED, TIMED = 4, 16  # steps with a model's guesses, of which the middle one tells what they cost


class Drafts:
    """Guesses for one request. The fewer come true the shorter they get, and the rarer."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], list[int]] = {}  # of two ids in a row: where the next one stands
        self._indexed = 1  # the first place that has not been looked at as that of the second of two
        self._alike, self._length = ALIKE, LENGTH
        self.of_model: Confidence | None = Confidence()  # None once a model has failed to guess here

    def look_up(self, ids: Sequence[int], most: int, forced: Sequence[int] = ()) -> list[int]:
        """At most so many ids that may come next; often none.

        ids: prompt and answer, which begin with those of the last call. forced: guesses that come before these.
        """
        for place in range(self._indexed, len(ids) - 1):  # nothing follows the newest two as yet
            self._places.setdefault((ids[place - 1], ids[place]), []).append(place + 1)
        self._indexed = max(self._indexed, len(ids) - 1)
        text = [*ids, *forced] if forced else ids
        places = self._places.get((text[-2], text[-1]), []) if len(text) > 1 else []
        alike, place = max(((_alike(text, place), place) for place in places[-PLACES:]), default=(0, 0))
        if alike < self._alike:
            return []
        # What came then; past its end the guess goes round, as lists and rules do.
        period = len(text) - place
        return [text[place + step % period] for step in range(min(self._length, most))]

    def judge(self, guessed: int, kept: int) -> None:
        """Of so many ids that were looked up, so many came true."""
        if not guessed:
            return
        if kept == guessed:
            self._length = min(self._length * 2, MOST_LENGTH)
            self._alike = max(self._alike - 1, LEAST_ALIKE)
        elif kept < guessed / 2:
            self._length = max(self._length // 2, LEAST_LENGTH)
            self._alike = min(self._alike + 1, MOST_ALIKE)


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

    def may_guess(self, most: int, cost: float) -> bool:
        """Whether length() would be more than 0."""
        return most > 0 and (self._steps_without >= PAUSE or self._pay(most, cost))

    def _pay(self, most: int, cost: float) -> bool:
        chance, tokens, pay = self._true / self._made, 1.0, False
        for length in range(1, most + 1):
            tokens += chance**length
            pay |= tokens > 1 + cost * length
        return pay

    def judge(self, guessed: int, kept: int) -> None:
        """Of so many guesses in a row the first ones came true, so many."""
        self._true = self._true * FORGETTING + kept
        self._made = self._made * FORGETTING + min(kept + 1, guessed)
        self._steps_without = 0


def _alike(ids: Sequence[int], place: int) -> int:
    """How many ids before this place are those at the end."""
    most = min(place, COMPARED)
    return next((n for n in range(most) if ids[place - 1 - n] != ids[-1 - n]), most)
