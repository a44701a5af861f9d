"""The documents of one owner: one SQLite file with the original bytes, the pages, the chunks and what finds them.

Deleting is one transaction over all of it, after which none of a document's words is in any file of the folder:
SQLite zeroes what it frees, both indexes are merged so that they keep no entry of a deleted chunk, and the write-ahead
log is truncated. Any number of threads and processes may use a database at the same time.
"""

from __future__ import annotations

import array
import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from llama2_chat.database import Database
from llama2_chat.documents.parsing import ParsedPage
from llama2_chat.errors import NoRoom, NotHere
from llama2_chat.types import Embedder

State = Literal["waiting", "ready", "failed"]

PIECE = 2**20
MAX_DOCUMENTS = 500  # of one owner
MAX_BYTES = 10**9  # of all of their originals

# words finds stems as Porter makes them; trigrams finds parts of words in any language.
SCHEMA = """
CREATE TABLE documents (
    id TEXT PRIMARY KEY, name TEXT, bytes INTEGER, sha256 TEXT UNIQUE, purpose TEXT, created INTEGER,
    state TEXT, error TEXT, pages INTEGER, pages_done INTEGER, without_text INTEGER, hidden TEXT
);
CREATE TABLE originals (document TEXT PRIMARY KEY, content BLOB);
CREATE TABLE pages (document TEXT, page INTEGER, text TEXT, PRIMARY KEY (document, page));
CREATE TABLE chunks (id INTEGER PRIMARY KEY, document TEXT, page INTEGER, text TEXT);
CREATE INDEX chunks_of_document ON chunks (document);
CREATE VIRTUAL TABLE words USING fts5(
    text, content='chunks', content_rowid='id', tokenize='porter unicode61 remove_diacritics 2'
);
CREATE VIRTUAL TABLE trigrams USING fts5(text, content='chunks', content_rowid='id', tokenize='trigram');
"""
# A row has the vectors of some chunks that follow each other up to the last: their numbers as int64, and float16.
VECTORS = """
CREATE TABLE vectors (
    document TEXT, encoder TEXT, last INTEGER, chunks BLOB, vectors BLOB, PRIMARY KEY (document, encoder, last)
);
"""
INDEXES = ("words", "trigrams")
FIELDS = "id, name, bytes, purpose, created, state, error, pages, pages_done, without_text, hidden"


@dataclass(frozen=True)
class Document:
    id: str
    name: str
    bytes: int
    purpose: str
    created: int  # seconds since 1970
    state: State
    error: str  # a sentence for the visitor, of one that failed
    pages: int  # 0 while nobody knows
    pages_done: int
    without_text: int  # pages, such as scans
    hidden: tuple[int, ...]  # pages with text that can hardly be seen

    @property
    def notes(self) -> list[str]:
        """What a visitor should know of it."""
        notes = []
        if self.without_text and self.pages_done:
            of = f"{self.without_text} of {self.pages_done} pages"
            notes.append(f"No text on {of}." if self.pages_done > 1 else "There is no text in it.")
        if self.hidden:
            pages = ", ".join(map(str, self.hidden[:5])) + (" and others" if len(self.hidden) > 5 else "")
            notes.append(f"Text that can hardly be seen (white or tiny) stands on page {pages}.")
        return notes


@dataclass(frozen=True)
class Chunk:
    id: int
    document: str
    name: str  # of the document
    page: int
    text: str


class Shelf(Database):
    """One owner's documents. The file is made when there is something to keep."""

    versions = (SCHEMA, VECTORS)
    what = "documents"
    synchronous = "NORMAL"  # a page that is lost is read again

    def __init__(self, path: Path, embedder: Embedder | None = None) -> None:
        """embedder: of questions, for whoever searches here."""
        super().__init__(path)
        self.embedder = embedder

    # ---- documents ----

    def add(self, file: IO[bytes], name: str, purpose: str) -> Document:
        """Keep a file. The same bytes twice are one document, under its first name; one that failed is tried again.

        Raises NoRoom if there is no room.
        """
        digest, size = _digest(file)
        with self.writing() as db:
            if known := db.execute("SELECT id FROM documents WHERE sha256 = ?", (digest,)).fetchone():
                db.execute(
                    "UPDATE documents SET state = 'waiting', error = '' WHERE id = ? AND state = 'failed'", known
                )
                return _one(db, known[0])
            count, total = db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM documents").fetchone()
            if count >= MAX_DOCUMENTS or total + size > MAX_BYTES:
                most = f"{MAX_DOCUMENTS:,} documents and {MAX_BYTES / 1e9:g} GB"
                raise NoRoom(f"You may keep {most}. Delete some of your documents first.")
            id = f"file-{secrets.token_hex(12)}"
            values = (id, name, size, digest, purpose, int(time.time()))
            db.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, 'waiting', '', 0, 0, 0, '[]')",
                values,
            )
            row = db.execute("INSERT INTO originals VALUES (?, zeroblob(?))", (id, size)).lastrowid
            with db.blobopen("originals", "content", row or 0) as blob:
                file.seek(0)
                while piece := file.read(PIECE):
                    blob.write(piece)
            return _one(db, id)

    def all(self) -> list[Document]:
        """Newest last."""
        with self.reading() as db:
            return [_document(row) for row in db.execute(f"SELECT {FIELDS} FROM documents ORDER BY created, rowid")]

    def get(self, id: str) -> Document:
        """Raises NotHere."""
        with self.reading() as db:
            return _one(db, id)

    def original(self, id: str) -> Iterator[bytes]:
        """Its bytes, piece by piece. Raises NotHere, at the next piece if it is deleted meanwhile."""
        offset = 0
        while piece := self._piece(id, offset):
            yield piece
            offset += len(piece)

    def _piece(self, id: str, offset: int) -> bytes:
        """Each in a moment of its own: while somebody reads, what is deleted stays in the log."""
        with self.reading() as db:
            _one(db, id)
            (row,) = db.execute("SELECT rowid FROM originals WHERE document = ?", (id,)).fetchone()
            with db.blobopen("originals", "content", row, readonly=True) as blob:
                blob.seek(offset)
                return blob.read(PIECE)

    def delete(self, id: str) -> None:
        """Raises NotHere."""
        with self.writing() as db:
            _one(db, id)
            for index in INDEXES:
                stored = "SELECT 'delete', id, text FROM chunks WHERE document = ?"
                db.execute(f"INSERT INTO {index}({index}, rowid, text) {stored}", (id,))
                # Only what is merged into one segment keeps nothing of what was deleted from it.
                db.execute(f"INSERT INTO {index}({index}) VALUES ('optimize')")
            for table in ("chunks", "vectors", "pages", "originals"):
                db.execute(f"DELETE FROM {table} WHERE document = ?", (id,))
            db.execute("DELETE FROM documents WHERE id = ?", (id,))
        self.truncate_log()

    # ---- indexing ----

    def add_page(self, id: str, page: ParsedPage) -> None:
        """The next page of a document, with its chunks; one that is there already changes nothing. Raises NotHere."""
        with self.writing() as db:
            document = _one(db, id)
            if page.number <= document.pages_done:
                return
            db.execute("INSERT INTO pages VALUES (?, ?, ?)", (id, page.number, page.text))
            for text in page.chunks:
                values = (id, page.number, text)
                row = db.execute("INSERT INTO chunks (document, page, text) VALUES (?, ?, ?)", values).lastrowid
                for index in INDEXES:
                    db.execute(f"INSERT INTO {index}(rowid, text) VALUES (?, ?)", (row, text))
            hidden = [*document.hidden, page.number] if page.hidden else document.hidden
            db.execute(
                "UPDATE documents SET pages = ?, pages_done = ?, without_text = without_text + ?, hidden = ? "
                "WHERE id = ?",
                (page.pages, page.number, not page.text.strip(), json.dumps(hidden), id),
            )

    def finish(self, id: str, error: str = "") -> None:
        """All pages are there, or as many as could be read. Raises NotHere."""
        with self.writing() as db:
            _one(db, id)
            db.execute(
                "UPDATE documents SET state = ?, error = ? WHERE id = ?", ("failed" if error else "ready", error, id)
            )

    def without_vectors(self, id: str, encoder: str, most: int) -> list[tuple[int, str]]:
        """The first chunks that have no vectors of this encoder, numbers and texts. Raises NotHere."""
        with self.reading() as db:
            _one(db, id)
            query = "SELECT id, text FROM chunks WHERE document = ? AND id > ? ORDER BY id LIMIT ?"
            return db.execute(query, (id, _last_with_vector(db, id, encoder), most)).fetchall()

    def add_vectors(self, id: str, encoder: str, chunks: list[int], vectors: bytes) -> None:
        """Those of the next chunks; what is there already changes nothing. Another encoder's are removed.

        vectors: as many as chunks, all of one length, in float16. Raises NotHere.
        """
        with self.writing() as db:
            _one(db, id)
            if chunks[0] <= _last_with_vector(db, id, encoder):
                return
            db.execute("DELETE FROM vectors WHERE document = ? AND encoder != ?", (id, encoder))
            numbers = array.array("q", chunks).tobytes()
            db.execute("INSERT INTO vectors VALUES (?, ?, ?, ?, ?)", (id, encoder, chunks[-1], numbers, vectors))

    # ---- what stands in them ----

    def page(self, id: str, page: int) -> str:
        """Raises NotHere."""
        with self.reading() as db:
            found = db.execute("SELECT text FROM pages WHERE document = ? AND page = ?", (id, page)).fetchone()
        if found is None:
            raise NotHere("There is no such page here.")
        return found[0]

    def pages(self, ids: Sequence[str], letters: int | None = None) -> list[Chunk]:
        """All pages with text, in the order of the documents; none if there are more letters in them."""
        query = "SELECT p.rowid, document, name, page, text FROM pages p JOIN documents d ON d.id = document"
        with self.reading() as db:
            if letters is not None:
                total = "SELECT coalesce(sum(length(text)), 0) FROM pages WHERE document = ?"
                if sum(db.execute(total, (id,)).fetchone()[0] for id in ids) > letters:
                    return []
            rows = [row for id in ids for row in db.execute(f"{query} WHERE document = ? ORDER BY page", (id,))]
        return [Chunk(*row) for row in rows if row[-1].strip()]


def _digest(file: IO[bytes]) -> tuple[str, int]:
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while piece := file.read(PIECE):
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size


def _one(db: sqlite3.Connection, id: str) -> Document:
    row = db.execute(f"SELECT {FIELDS} FROM documents WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise NotHere(f"There is no document {id!r:.60} here.")
    return _document(row)


def _last_with_vector(db: sqlite3.Connection, id: str, encoder: str) -> int:
    """The number of a chunk; 0 if there is none. They get them in the order of their numbers."""
    query = "SELECT coalesce(max(last), 0) FROM vectors WHERE document = ? AND encoder = ?"
    return int(db.execute(query, (id, encoder)).fetchone()[0])


def _document(row: tuple[Any, ...]) -> Document:
    fields = dict(zip(FIELDS.split(", "), row, strict=True))
    return Document(**fields | {"hidden": tuple(json.loads(fields["hidden"]))})
