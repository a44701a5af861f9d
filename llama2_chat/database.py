"""What one owner keeps, in one SQLite file: read in one state, written in transactions, and erased to the last byte.

Any number of threads and processes may use a file at the same time. SQLite zeroes what it frees, and truncate_log()
empties the write-ahead log, where what was deleted stands as well. What is in a file, whoever extends Database says.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from llama2_chat.errors import DISK_FULL, Busy, ChatError, NoRoom

BUSY_S = 30.0
FREE_BYTES = 500_000_000  # that the disk keeps free


def path_of(folder: Path, owner: str) -> Path:
    """The file of an owner: a kind and a name, such as "login anna", of which only the kind can be read in it."""
    digest = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / f"{owner.partition(' ')[0]}-{digest[:40]}.sqlite"


def check_folder(folder: Path) -> None:
    """Raises OSError or sqlite3.Error if a database could not be made there, as on a disk that has no locks. Makes
    nothing that stays."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    with (
        tempfile.TemporaryDirectory(dir=existing) as place,
        contextlib.closing(sqlite3.connect(Path(place, "tried.sqlite"))) as db,
    ):
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE tried (it)")


def room_in(folder: Path, size: int) -> int:
    """The bytes that may be written to its disk, before these. Raises NoRoom if there are fewer."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(existing).free - FREE_BYTES
    if free < size:
        raise NoRoom(DISK_FULL)
    return free


class Database:
    """One owner's file, which is made when there is something to keep."""

    versions: ClassVar[Sequence[str]]  # SQL: the first makes the tables, each later one changes those of before
    what: ClassVar[str]  # is kept, for sentences
    # NORMAL may lose the last transactions when the computer crashes, and FULL waits for the disk; neither loses one
    # when the program is killed.
    synchronous: ClassVar[str] = "FULL"

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state of the file; an empty one where nothing is kept yet."""
        if not self.path.exists():
            with contextlib.closing(sqlite3.connect(":memory:")) as empty:
                for version in self.versions:
                    empty.executescript(version)
                yield empty
            return
        with self._open() as db:
            db.execute("BEGIN")
            yield db

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in one transaction, which is kept whole or not at all. Raises NoRoom if the disk takes none."""
        with self._open() as db, self._sentences(), _transaction(db):
            yield db

    def truncate_log(self) -> None:
        """What was deleted stands in the log as well, until nobody reads there any more."""
        give_up_at = time.monotonic() + BUSY_S
        with self._open() as db:
            while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] and time.monotonic() < give_up_at:
                time.sleep(0.05)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._sentences():
            if not self.path.exists():
                self._create()
            db = self._connect(self.path)
        with contextlib.closing(db):
            with self._sentences():
                self._migrate(db)
            yield db

    def _connect(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA secure_delete = ON")
        db.execute(f"PRAGMA synchronous = {self.synchronous}")
        return db

    def _create(self) -> None:
        """Make it aside and whole: other threads and processes may want it at the same moment."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.path.with_suffix(f".{secrets.token_hex(8)}.new")
        try:
            new.touch(mode=0o600)
            with contextlib.closing(self._connect(new)) as db:
                db.execute("PRAGMA auto_vacuum = FULL")
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(self.versions[0])
                self._migrate(db)
            with contextlib.suppress(FileExistsError):
                os.link(new, self.path)
        finally:
            new.unlink(missing_ok=True)

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Bring a file of an earlier version up to date, whole or not at all. Raises ChatError for a later one's."""
        newest = len(self.versions) - 1
        if (found := _version(db)) == newest:
            return
        if found > newest:
            raise ChatError(f"A newer version of this program has kept {self.what} here. Update this one.")
        with _transaction(db):
            for number in range(_version(db) + 1, newest + 1):  # another process may have done some meanwhile
                for statement in _statements(self.versions[number]):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        """What SQLite may fail at, for visitors."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "unable to open" in str(error) or "readonly" in str(error):
                raise NoRoom(f"This server cannot keep {self.what} at the moment.", str(error)) from error
            if "full" in str(error) or "disk I/O" in str(error):
                raise NoRoom(DISK_FULL, str(error)) from error
            if "locked" in str(error):
                raise Busy(f"Your {self.what} are being changed. Please try again in a minute.") from error
            raise
        except OSError as error:
            raise NoRoom(f"This server cannot keep {self.what} at the moment.", str(error)) from error


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if db.in_transaction:  # SQLite itself has ended it where the disk is full
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _statements(script: str) -> Iterator[str]:
    """One by one: executescript() would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
