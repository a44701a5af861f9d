"""All documents of this server: a folder with one database for each owner, and the thread that reads what is new.

An owner is a text that the caller vouches for, such as "login anna"; the file is named by its hash. Reading goes one
document at a time, the owners in turn, and goes on after the last page that was kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock

from llama2_chat.database import path_of, room_in
from llama2_chat.documents.line import Line
from llama2_chat.documents.meaning import Encoding
from llama2_chat.documents.parsing import BROKEN, NICE, Interrupted, parse
from llama2_chat.documents.store import Document, Shelf
from llama2_chat.errors import Busy, ChatError, NoRoom, NotHere
from llama2_chat.types import Embedder

log = logging.getLogger("llama2_chat")

MAX_FILE_BYTES = 50_000_000
COOKIES_SHARE = 1 / 2  # of the disk's room, for all whom only a cookie tells apart: anyone may have any number of them
TURN_S = 10.0  # that one owner's document is read while others wait
RETRY_S = 10.0  # after a lock or a full disk, which pass
MOST_INTERRUPTIONS = 3  # of the process that reads a document: it may be that document that takes all memory
VISITOR_S = 31 * 24 * 3600  # that documents of a browser's cookie are kept after its last upload
SURE_S = 24 * 3600.0  # after a start that found them older for the first time: its clock may have been wrong


class Library:
    """Nothing is made in the folder before the first document, and nothing read there before start() or add()."""

    def __init__(self, folder: Path, embedder: Embedder | None = None) -> None:
        """embedder: what finds documents by their meaning, too; started and closed by whoever made it."""
        self.folder = folder
        self._embedder = embedder
        self._encoding = Encoding(embedder, folder) if embedder else None
        self._line = Line()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._interruptions: Counter[str] = Counter()  # of documents that are not whole yet
        self._speed: dict[str, float] = {}  # of the document that is being read: seconds a page

    def shelf(self, owner: str) -> Shelf:
        """owner: a kind and a name, such as "login anna"."""
        return Shelf(path_of(self.folder, owner), self._embedder)

    def start(self) -> None:
        """Go on with what an earlier process left unread, and forget visitors whose cookie has expired."""
        if self.folder.is_dir():
            self._start_thread()

    def _look_around(self) -> None:
        for path in sorted(self.folder.glob("*.sqlite")):
            try:
                if path.name.startswith("cookie-") and _is_forgotten(path):
                    _remove(path)
                    continue
                for document in Shelf(path).all():
                    if document.state == "waiting":
                        self._line.put(Shelf(path), document.id)
            except (ChatError, OSError, sqlite3.Error):
                log.exception("The documents in %s cannot be read", path.name)

    def add(self, owner: str, file: IO[bytes], name: str, purpose: str) -> Document:
        """Keep a file, and have it read. Raises NoRoom."""
        size = file.seek(0, os.SEEK_END)
        self._check_disk(3 * size, owner)  # the file, the log that it goes through, and the indexes
        shelf = self.shelf(owner)
        document = shelf.add(file, name, purpose)
        if document.state == "waiting":
            self._read_later(shelf, document.id)
        return document

    def seconds_left(self, document: Document) -> float | None:
        """Until it is read; None while nobody knows."""
        seconds = self._speed.get(document.id)
        return None if seconds is None else seconds * (document.pages - document.pages_done)

    def close(self) -> None:
        """What is being read is gone on with after the next start()."""
        self._closing.set()
        self._line.close()
        if self._encoding:
            self._encoding.close()
        if self._thread is not None:
            self._thread.join(5)

    def _check_disk(self, size: int, owner: str) -> None:
        free = room_in(self.folder, size)
        used = sum(map(_size, self.folder.glob("cookie-*"))) if owner.startswith("cookie ") else 0
        if owner.startswith("cookie ") and used + size > COOKIES_SHARE * (free + used):
            raise NoRoom("This server has no room for more documents of visitors who have not logged in.")

    def _read_later(self, shelf: Shelf, id: str) -> None:
        self._start_thread()
        self._line.put(shelf, id)

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="documents", daemon=True)
                self._thread.start()
                if self._encoding:
                    self._encoding.start()

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        self._look_around()
        while (job := self._line.take()) is not None:
            try:
                with FileLock(self.folder / "reading.lock"):  # other processes on this folder wait as well
                    self._read(*job)
            except NotHere:
                pass  # deleted meanwhile
            except (Busy, NoRoom, OSError) as error:
                log.warning("A document is read later: %s", error)
                self._line.put(*job)
                self._closing.wait(RETRY_S)
            except Exception:
                log.exception("A document could not be indexed")
                self._give_up(*job)

    def _give_up(self, shelf: Shelf, id: str) -> None:
        try:
            shelf.finish(id, "This file could not be read.")
        except (ChatError, OSError, sqlite3.Error):
            log.exception("A document stays unread until the next start")

    def _read(self, shelf: Shelf, id: str) -> None:
        document = shelf.get(id)
        if document.state != "waiting":
            return
        error, is_whole = "", True
        try:
            with self._original(shelf, id) as file:
                is_whole = self._read_pages(shelf, document, file)
        except Interrupted:
            self._interruptions[id] += 1
            if self._interruptions[id] < MOST_INTERRUPTIONS:
                raise
            error = BROKEN
        except (NotHere, Busy, NoRoom):
            raise
        except ChatError as problem:
            error = str(problem)
        finally:
            self._speed.pop(id, None)
        if is_whole:
            self._interruptions.pop(id, None)
            shelf.finish(id, error or _without_text(shelf.get(id)))
            if self._encoding:
                self._encoding.put(shelf, id)
        else:
            self._line.put_back(shelf, id)

    def _read_pages(self, shelf: Shelf, document: Document, file: IO[bytes]) -> bool:
        """Whether all of them are read; else it is somebody else's turn, or the end."""
        started, first = time.monotonic(), document.pages_done + 1
        with contextlib.closing(parse(file, document.name, first)) as pages:
            for page in pages:
                shelf.add_page(document.id, page)
                seconds = time.monotonic() - started
                self._speed[document.id] = seconds / (page.number - first + 1)
                is_over = seconds > TURN_S and self._line.others_wait(shelf)
                if (is_over and page.number < page.pages) or self._closing.is_set():
                    return False
        return True

    @contextlib.contextmanager
    def _original(self, shelf: Shelf, id: str) -> Iterator[IO[bytes]]:
        """A file without a name, which is gone even if this process is killed."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for piece in shelf.original(id):
                file.write(piece)
            file.flush()
            yield file


def _without_text(document: Document) -> str:
    if document.pages_done > document.without_text:
        return ""
    return "There is no text in this file. Scanned pages must go through text recognition (OCR) first."


def _is_forgotten(path: Path) -> bool:
    """Whether its visitor's cookie has expired, and had when a start a day ago looked: a clock that is wrong for once
    would empty the folder."""
    mark, now = path.with_name(f"{path.name}-expired"), time.time()
    if now - _used(path) <= VISITOR_S:
        mark.unlink(missing_ok=True)
    elif not mark.exists():
        mark.touch()
        os.utime(mark, (now, now))
    else:
        return now - mark.stat().st_mtime > SURE_S
    return False


def _used(path: Path) -> float:
    """When it was last changed, in seconds since 1970."""
    return max(each.stat().st_mtime for each in (path, *path.parent.glob(f"{path.name}-wal")))


def _size(path: Path) -> int:
    """In bytes; 0 of a file that is gone meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove(path: Path) -> None:
    for each in (*path.parent.glob(f"{path.name}-*"), path):
        each.unlink(missing_ok=True)
