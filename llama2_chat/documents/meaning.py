"""Documents by their meaning: the thread that has an encoder turn chunks into vectors, and the search among them.

Vectors are float16 and lie beside the chunks; all of those in question are compared, for which numpy needs
milliseconds. One document after another is encoded, the owners in turn, and goes on after the last vectors kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from llama2_chat.documents.line import Line
from llama2_chat.documents.parsing import NICE
from llama2_chat.documents.store import Shelf
from llama2_chat.errors import ChatError, ModelUnavailable, NotHere
from llama2_chat.types import Embedder

log = logging.getLogger("llama2_chat")

BATCH = 8  # chunks
TURN_S = 10.0  # that one owner's document is encoded while others wait
RETRY_S = 10.0  # after a failure
MOST_CHUNKS = 200_000  # that a question is compared with; more are searched by their words alone
AT_ONCE = 256  # rows of BATCH vectors: in 32 bits they take twice the memory
MAX_LETTERS = 1_000  # of a question
CANDIDATES = 50


def embedded_question(embedder: Embedder | None, question: str) -> tuple[str, np.ndarray] | None:
    """Its vector, and by whom it is; None where there is no encoder now, for words alone go on."""
    if embedder is None or not question.strip():
        return None
    try:
        vector = embedder.embed([question[:MAX_LETTERS]], "question").vectors[0]
    except ChatError as error:
        log.debug("A question is searched by its words alone: %s", error)
        return None
    return embedder.identity, vector


def by_meaning(db: sqlite3.Connection, ids: Sequence[str], encoder: str, vector: np.ndarray) -> list[int]:
    """The chunks that mean most nearly the same, best first; none unless all chunks of these documents have vectors.

    With some only, those would be preferred to the others whatever they say.
    """
    if not all(is_whole(db, id, encoder) for id in ids):
        return []
    numbers, scores = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for id in ids:
        rows = db.execute("SELECT chunks, vectors FROM vectors WHERE document = ? AND encoder = ?", (id, encoder))
        while some := rows.fetchmany(AT_ONCE):
            numbers.append(np.frombuffer(b"".join(chunks for chunks, _ in some), np.int64))
            halves = np.frombuffer(b"".join(vectors for _, vectors in some), np.float16)
            scores.append(halves.reshape(len(numbers[-1]), -1).astype(np.float32) @ vector)
    chunks, score = np.concatenate(numbers), np.concatenate(scores)
    if len(chunks) > MOST_CHUNKS:
        return []
    best = np.argsort(-score, kind="stable")[:CANDIDATES]
    return chunks[best].tolist()


def is_whole(db: sqlite3.Connection, id: str, encoder: str) -> bool:
    """Whether all chunks of a document that has been read have vectors of this encoder."""
    query = (
        "SELECT state != 'waiting' AND (SELECT max(id) FROM chunks WHERE document = :id) IS "
        "(SELECT max(last) FROM vectors WHERE document = :id AND encoder = :encoder) FROM documents WHERE id = :id"
    )
    row = db.execute(query, {"id": id, "encoder": encoder}).fetchone()
    return bool(row and row[0])


def encode_next(embedder: Embedder, shelf: Shelf, id: str) -> bool:
    """Give the next chunks of a document their vectors; False if all have theirs. Raises NotHere, ModelUnavailable."""
    encoder = embedder.identity
    chunks = shelf.without_vectors(id, encoder, BATCH)
    if not chunks:
        return False
    vectors = embedder.embed([text for _, text in chunks], "document").vectors
    if embedder.identity == encoder:
        shelf.add_vectors(id, encoder, [chunk for chunk, _ in chunks], vectors.astype(np.float16).tobytes())
    return True


class Encoding:
    """The thread. Nothing is encoded before start()."""

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        self._embedder, self._folder = embedder, folder
        self._line = Line()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._identity = ""  # of the encoder whose vectors all documents have or wait for

    def put(self, shelf: Shelf, id: str) -> None:
        """A document that has been read."""
        self._line.put(shelf, id)

    def start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="encoding", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """What is being encoded is gone on with after the next start()."""
        self._closing.set()
        self._line.close()
        if self._thread is not None:
            self._thread.join(5)

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._embedder.identity and not self._closing.wait(RETRY_S / 10):
            pass  # nobody knows yet which vectors are still good
        if self._closing.is_set():
            return
        self._look_around()
        while (job := self._line.take()) is not None:
            try:
                with FileLock(self._folder / "encoding.lock"):  # other processes on this folder wait as well
                    is_over = self._encode(*job)
                if not is_over:
                    self._line.put_back(*job)
            except NotHere:
                pass  # deleted meanwhile
            except (ChatError, OSError) as error:
                if not isinstance(error, ModelUnavailable):  # which has said so
                    log.warning("A document is encoded later: %s", error)
                self._line.put_back(*job)
                self._closing.wait(RETRY_S)
            except Exception:
                log.exception("A document is searched by its words alone until the next start")

    def _look_around(self) -> None:
        """Have everything encoded that has no vectors of this encoder."""
        self._identity = self._embedder.identity
        for path in sorted(self._folder.glob("*.sqlite")):
            try:
                shelf = Shelf(path)
                ready = [document.id for document in shelf.all() if document.state == "ready"]
                with shelf.reading() as db:
                    unfinished = [id for id in ready if not is_whole(db, id, self._identity)]
                for id in unfinished:
                    self._line.put(shelf, id)
            except (ChatError, OSError, sqlite3.Error):
                log.exception("The documents in %s cannot be read", path.name)

    def _encode(self, shelf: Shelf, id: str) -> bool:
        """Whether all of it is; else it is somebody else's turn, or the end."""
        started = time.monotonic()
        while not self._closing.is_set():
            if self._embedder.identity != self._identity:  # a server has another model now
                self._look_around()
            if not encode_next(self._embedder, shelf, id):
                return True
            if time.monotonic() - started > TURN_S and self._line.others_wait(shelf):
                return False
        return False
