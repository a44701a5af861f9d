"""The documents that wait to be read: one after another of each owner, and the owners in turn."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path

from llama2_chat.documents.store import Shelf

Job = tuple[Shelf, str]  # whose, and which


class Line:
    """For one reader, and any number of threads that put something in."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owners: dict[Path, deque[Job]] = {}  # in the order of their turns; none is empty
        self._closed = False

    def put(self, shelf: Shelf, id: str) -> None:
        with self._changed:
            self._owners.setdefault(shelf.path, deque()).append((shelf, id))
            self._changed.notify()

    def put_back(self, shelf: Shelf, id: str) -> None:
        """It goes on when its owner has the next turn, which comes after everybody else's."""
        with self._changed:
            jobs = self._owners.pop(shelf.path, deque())
            self._owners[shelf.path] = deque([(shelf, id), *jobs])
            self._changed.notify()

    def take(self) -> Job | None:
        """Waits for one. None once the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._owners or self._closed)
            if self._closed:
                return None
            path = next(iter(self._owners))
            jobs = self._owners.pop(path)
            job = jobs.popleft()
            if jobs:
                self._owners[path] = jobs  # behind all others
            return job

    def others_wait(self, shelf: Shelf) -> bool:
        """Whether it would be somebody else's turn."""
        with self._changed:
            return any(path != shelf.path for path in self._owners)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
