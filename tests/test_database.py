"""One owner's SQLite file, whatever is in it: brought up to date, and never half."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama2_chat.database import Database
from llama2_chat.errors import ChatError


class Notes(Database):
    versions = ("CREATE TABLE notes (text TEXT);",)
    what = "notes"


class Dated(Notes):
    versions = (*Notes.versions, "ALTER TABLE notes ADD COLUMN day TEXT;\nUPDATE notes SET day = 'unknown';\n")


@pytest.fixture
def path(tmp_path):
    with Notes(tmp_path / "login-x.sqlite").writing() as db:
        db.execute("INSERT INTO notes VALUES ('old')")
    return tmp_path / "login-x.sqlite"


def rows(database):
    with database.reading() as db:
        return db.execute("SELECT * FROM notes").fetchall()


def test_a_file_of_an_earlier_version_is_brought_up_to_date_once_whoever_comes_first(path):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: rows(Dated(path)), range(8))) == [[("old", "unknown")]] * 8


def test_a_new_file_has_the_newest_version_and_one_that_is_not_there_looks_empty(tmp_path):
    new = Dated(tmp_path / "login-y.sqlite")
    assert rows(new) == []
    assert not new.path.exists()
    with new.writing() as db:
        db.execute("INSERT INTO notes VALUES ('new', 'today')")
    assert rows(new) == [("new", "today")]


def test_a_version_that_cannot_be_reached_leaves_the_file_as_it_was(path):
    class Broken(Notes):
        versions = (*Notes.versions, "ALTER TABLE notes ADD COLUMN day TEXT;\nUPDATE nothing SET day = 1;\n")

    with pytest.raises(sqlite3.OperationalError):
        rows(Broken(path))
    assert rows(Notes(path)) == [("old",)]


def test_a_file_of_a_later_version_is_left_alone_with_a_sentence(path):
    rows(Dated(path))
    with pytest.raises(ChatError, match="newer version of this program has kept notes"):
        rows(Notes(path))
