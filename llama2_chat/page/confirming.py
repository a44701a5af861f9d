"""The calls of one answer that wait until its visitor allows them: asked in the agent's thread, answered by a route."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future

from llama2_chat.agent import Call


class Confirming:
    """One call at a time waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: tuple[int, Call, Future[bool]] | None = None
        self._numbers = itertools.count(1)
        self._closed = False

    def __call__(self, call: Call) -> bool:
        """What the visitor says, once they do; no, if the answer ends before."""
        allowed: Future[bool] = Future()
        with self._lock:
            if self._closed:
                return False
            if self._waiting:  # the agent no longer waits for it, but its thread does
                self._waiting[2].set_result(False)
            self._waiting = (next(self._numbers), call, allowed)
        return allowed.result()

    def number(self, call: Call) -> int:
        """Of the call that waits; 0 if it does not."""
        with self._lock:
            return self._waiting[0] if self._waiting and self._waiting[1] is call else 0

    def answer(self, number: int, allowed: bool) -> None:
        """What is said of another call than the one that waits says nothing."""
        with self._lock:
            if self._waiting and self._waiting[0] == number:
                self._waiting[2].set_result(allowed)
                self._waiting = None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._waiting:
                self._waiting[2].set_result(False)
                self._waiting = None
