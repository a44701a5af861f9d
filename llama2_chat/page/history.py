"""Conversations that a login keeps on the server, so that each of its browsers has them: a SQLite file for each login.

A record is a conversation without its messages, or a message, as JSON that only browsers read (static/syncing.js). Each
write gives its record the next revision, so a browser asks for what is newer than it has seen. It writes on top of a
revision that it names: what another browser has changed since is not overwritten, but told, and merged in the browser.
Of what was deleted only the id stays, so that no browser brings it back.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama2_chat.database import Database, path_of, room_in
from llama2_chat.errors import NoRoom

Kind = Literal["conversation", "message"]

MAX_BYTES = 200_000_000  # of one login
ROW_BYTES = 200  # that a record takes beside its body
PAGE_BYTES = 1_000_000  # of bodies in one answer, and one body more
PAGE_RECORDS = 1_000

SCHEMA = """
CREATE TABLE state (epoch TEXT, revision INTEGER, bytes INTEGER);
INSERT INTO state VALUES (lower(hex(randomblob(16))), 0, 0);
CREATE TABLE records (revision INTEGER PRIMARY KEY, id TEXT UNIQUE, kind TEXT, conversation TEXT, body TEXT);
CREATE INDEX records_of_conversation ON records (conversation);
"""
FIELDS = "revision, id, kind, conversation, body"


@dataclass(frozen=True)
class Record:
    revision: int
    id: str
    kind: Kind
    conversation: str  # its id; that of the record where it is one
    body: str | None  # JSON; None of what was deleted


@dataclass(frozen=True)
class Change:
    """What a browser wants to be kept. body: None deletes, a conversation with all its messages."""

    id: str
    kind: Kind
    conversation: str
    base: int  # the revision that the browser has seen of it; 0 for none
    body: str | None


@dataclass(frozen=True)
class Saved:
    epoch: str
    kept: dict[str, int]  # the revisions of what is there now as the browser has it, by id
    others: list[Record]  # what is there of the rest, and of its conversations: changed by another browser, or deleted


@dataclass(frozen=True)
class Page:
    """Records after a revision, the oldest first, and the conversations of their messages."""

    epoch: str  # of the file: another one has other revisions; "" where nothing is kept yet
    after: int  # 0 where the browser asked for more than there is: it has to begin again
    revision: int  # up to which they go
    is_last: bool
    records: list[Record]


class History(Database):
    """One login's conversations. The file is made when there is something to keep."""

    versions = (SCHEMA,)
    what = "conversations"

    def after(self, epoch: str, revision: int) -> Page:
        """What has changed since; all there is where the epoch is another one."""
        if not self.path.exists():
            return Page("", 0, 0, True, [])
        with self.reading() as db:
            own_epoch, newest, _ = _state(db)
            after = revision if epoch == own_epoch and revision <= newest else 0
            rows = db.execute(f"SELECT {FIELDS} FROM records WHERE revision > ? ORDER BY revision", (after,))
            records = _first_of(Record(*row) for row in rows)
            until = records[-1].revision if records else newest
            return Page(own_epoch, after, until, until == newest, [*_conversations_of(db, records, records), *records])

    def put(self, changes: Sequence[Change], epoch: str) -> Saved:
        """Keep what nobody else has changed meanwhile; whole or not at all, and on the disk when this returns.

        A message is kept only where its conversation is. Raises NoRoom.
        """
        if any(change.body is not None for change in changes):  # else it gives room
            room_in(self.path.parent, sum(_size(change.body) for change in changes))
        with self.writing() as db:
            own_epoch, revision, used = _state(db)
            kept: dict[str, int] = {}
            if epoch in ("", own_epoch):
                before = used
                for change in changes:
                    is_kept, revision, used = _put(db, change, revision, used)
                    if is_kept is not None:
                        kept[change.id] = is_kept
                if used > MAX_BYTES and used > before:
                    raise NoRoom(
                        f"Your conversations have filled the {MAX_BYTES / 1e6:g} MB that this server keeps for you. "
                        "New ones stay in this browser until you delete some."
                    )
                db.execute("UPDATE state SET revision = ?, bytes = ?", (revision, used))
            others = [record for change in changes if change.id not in kept for record in _records(db, change.id)]
            others += _conversations_of(db, [change for change in changes if change.id not in kept], others)
        if any(change.body is None for change in changes):
            self.truncate_log()
        return Saved(own_epoch, kept, others)


class Histories:
    """All logins' conversations. Nothing is made in the folder before the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, owner: str) -> History:
        """owner: a kind and a name, such as "login anna"."""
        return History(path_of(self._folder, owner))


def _put(db: sqlite3.Connection, change: Change, revision: int, used: int) -> tuple[int | None, int, int]:
    """The revision of what is kept as the browser has it, or None; then the newest revision, and the bytes used."""
    there = next(iter(_records(db, change.id)), None)
    if there and (there.kind, there.conversation) != (change.kind, change.conversation):
        return None, revision, used
    if (there.body if there else None) == change.body:
        return (there.revision if there else 0), revision, used  # such as what is sent again: the answer was lost
    if (there.revision if there else 0) != change.base:
        return None, revision, used
    if change.kind == "message" and not _is_there(db, change.conversation):
        return None, revision, used
    if change.kind == "conversation" and change.body is None:
        used -= sum(_erase(db, "conversation = ?", change.id))
    else:
        used -= sum(_erase(db, "id = ?", change.id))
    revision += 1
    values = (revision, change.id, change.kind, change.conversation, change.body)
    db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?)", values)
    return revision, revision, used + _size(change.body)


def _erase(db: sqlite3.Connection, which: str, id: str) -> list[int]:
    """The bytes of each of them."""
    erased = db.execute(f"DELETE FROM records WHERE {which} RETURNING body", (id,)).fetchall()
    return [_size(body) for (body,) in erased]


def _is_there(db: sqlite3.Connection, conversation: str) -> bool:
    row = db.execute("SELECT body IS NOT NULL FROM records WHERE id = ?", (conversation,)).fetchone()
    return bool(row and row[0])


def _state(db: sqlite3.Connection) -> tuple[str, int, int]:
    row: tuple[str, int, int] = db.execute("SELECT epoch, revision, bytes FROM state").fetchone()
    return row


def _size(body: str | None) -> int:
    return ROW_BYTES + len((body or "").encode())


def _first_of(records: Iterable[Record]) -> list[Record]:
    """As many as go into one answer."""
    first: list[Record] = []
    size = 0
    for record in records:
        first.append(record)
        size += _size(record.body)
        if size >= PAGE_BYTES or len(first) == PAGE_RECORDS:
            break
    return first


def _conversations_of(
    db: sqlite3.Connection, messages: Sequence[Record | Change], told: Sequence[Record]
) -> list[Record]:
    """Those that are not told anyway: a browser keeps no message without its conversation."""
    missing = {message.conversation for message in messages} - {record.id for record in told}
    return [record for id in sorted(missing) for record in _records(db, id)]


def _records(db: sqlite3.Connection, id: str) -> list[Record]:
    """The one with this id, or none."""
    return [Record(*row) for row in db.execute(f"SELECT {FIELDS} FROM records WHERE id = ?", (id,))]
