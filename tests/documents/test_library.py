"""One owner's documents from upload to the last trace, with the process that reads them and without."""

import functools
import io
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama2_chat import database
from llama2_chat.documents import library as module
from llama2_chat.documents import parsing, store
from llama2_chat.documents.chunks import chunks_of
from llama2_chat.documents.library import Library
from llama2_chat.documents.line import Line
from llama2_chat.documents.parsing import ParsedPage, parse
from llama2_chat.documents.search import MAX_LETTERS, search
from llama2_chat.errors import Busy, ChatError, NoRoom, NotHere
from tests.support.files import pdf
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The lighthouse of Brenzano was built in 1874 from red granite.",
    "Its keeper, Ottavio Ferrandini, wrote a diary about seabirds.",
    "Lebensversicherungsgesellschaften sitzen in der Hauptstadt.",
]


def parsed(*texts, first=1):
    """Pages as the process says them."""
    for number, text in enumerate(texts, first):
        yield ParsedPage(number, len(texts) + first - 1, text, tuple(chunks_of([text])))


def kept(shelf, *texts, name="a.txt"):
    """A document with these pages."""
    document = shelf.add(io.BytesIO("\n".join(texts).encode()), name, "user_data")
    for page in parsed(*texts):
        shelf.add_page(document.id, page)
    shelf.finish(document.id)
    return document.id


@pytest.fixture
def library(tmp_path):
    library = Library(tmp_path / "documents")
    yield library
    library.close()


@pytest.fixture
def shelf(library):
    return library.shelf("login anna")


def pages_found(shelf, query, *ids):
    return [chunk.page for chunk in search(shelf, query, ids)]


def test_a_page_is_found_by_other_forms_of_its_words_by_parts_of_them_and_without_accents(shelf):
    id = kept(shelf, *TEXTS)
    assert pages_found(shelf, "Who was keeping a diary?", id)[0] == 2
    assert pages_found(shelf, "Versicherungen", id) == [3]
    assert pages_found(shelf, "Brénzano", id)[0] == 1


@pytest.mark.parametrize("query", ['"', "AND OR NOT", "text:*", "a" * 100_000, "x " * 10_000, "", "?!", "\x00", "漢字"])
def test_whatever_is_searched_for_is_words_and_no_query_language(shelf, query):
    pages_found(shelf, query, kept(shelf, *TEXTS))


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("東京の人口は千四百万人である。", "東京の人口を教えてください"),
        ("那座灯塔建于一八七四年。", "灯塔建于哪一年？"),
        ("首都是北京。", "北京"),
        ("ประภาคารสร้างขึ้นด้วยหินแกรนิต", "สร้างขึ้นเมื่อไร"),
    ],
    ids=["japanese", "chinese", "two letters", "thai"],
)
def test_sentences_without_blanks_are_found(shelf, text, query):
    id = kept(shelf, *TEXTS, text)
    assert pages_found(shelf, query, id) == [4]


@pytest.mark.parametrize("query", ["b" * 1_000_000, " ".join(f"{n:05}" * 8 for n in range(60)), "漢字" * 500_000])
def test_only_so_many_letters_of_a_query_are_searched_for(shelf, query, monkeypatch):
    asked = []
    monkeypatch.setattr("llama2_chat.documents.search._ranking", lambda _, index, terms, ids: asked.append(terms) or [])
    pages_found(shelf, query, kept(shelf, *TEXTS))
    assert len(asked) == 2
    assert all(sum(map(len, terms)) <= MAX_LETTERS for terms in asked)
    assert max(len(term) for terms in asked for term in terms) <= 40


def test_only_the_documents_that_are_named_are_searched(shelf):
    one, other = kept(shelf, TEXTS[0]), kept(shelf, TEXTS[1])
    assert [chunk.document for chunk in search(shelf, "keeper lighthouse", [other])] == [other]
    assert search(shelf, "keeper", []) == []
    assert {chunk.document for chunk in search(shelf, "keeper lighthouse", [one, other])} == {one, other}


def test_owners_see_nothing_of_each_other(library, shelf):
    """A visitor of other programs was shown everybody's files."""
    id = kept(shelf, *TEXTS)
    other = library.shelf("login bob")
    assert other.all() == []
    assert search(other, "lighthouse", [id]) == []
    assert other.pages([id]) == []
    for look in (other.get, other.delete, lambda id: other.page(id, 1), lambda id: list(other.original(id))):
        with pytest.raises(NotHere):
            look(id)
    assert shelf.get(id).state == "ready"


def test_the_same_bytes_are_one_document_with_one_set_of_chunks(shelf):
    """Others embedded duplicates twice."""
    assert kept(shelf, *TEXTS) == kept(shelf, *TEXTS, name="b.txt")
    with shelf.reading() as db:
        assert db.execute("SELECT count(*) FROM chunks").fetchone() == (3,)
    assert [document.name for document in shelf.all()] == ["a.txt"]


def test_nothing_of_a_deleted_document_is_left_in_any_file(library, shelf):
    """Others answered from documents that had been deleted."""
    kept(shelf, "This stays: the harbour of Zenoria.")
    id = kept(shelf, "Quetzalcoatlus flew here. " * 300, *TEXTS, name="secret-name.txt")
    shelf.delete(id)
    content = b"".join(path.read_bytes() for path in library.folder.iterdir()).lower()
    for word in (b"quetzalcoatlus", b"uetzal", b"ferrandini", b"secret-name", b"brenzano", id.encode()):
        assert word not in content
    assert b"zenoria" in content
    with closing(sqlite3.connect(shelf.path)) as db:
        for index in ("words", "trigrams"):
            db.execute(f"CREATE VIRTUAL TABLE temp.terms_{index} USING fts5vocab(main, {index}, row)")
            terms = {term for (term,) in db.execute(f"SELECT term FROM temp.terms_{index}")}
            assert terms
            assert not terms & {"quetzalcoatlu", "quetzalcoatlus", "quetz", "que", "uet", "ferrandini"}
    with pytest.raises(NotHere):
        shelf.get(id)


def test_a_document_that_is_deleted_while_it_is_read_stays_deleted(shelf):
    document = shelf.add(io.BytesIO(b"x"), "a.txt", "user_data")
    first, second = parsed(*TEXTS[:2])
    shelf.add_page(document.id, first)
    shelf.delete(document.id)
    with pytest.raises(NotHere):
        shelf.add_page(document.id, second)
    assert search(shelf, "lighthouse", [document.id]) == []


def test_a_full_disk_is_said_and_what_was_there_stays(shelf, monkeypatch):
    id = kept(shelf, *TEXTS)
    with shelf.reading() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    connect = sqlite3.connect

    def small(*args, **kwargs):
        db = connect(*args, **kwargs)
        db.execute(f"PRAGMA max_page_count = {pages + 10}")
        return db

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(NoRoom, match="disk"):
        shelf.add(io.BytesIO(b"x" * 500_000), "b.txt", "user_data")
    assert [document.id for document in shelf.all()] == [id]


def test_a_file_is_read_in_the_background_and_a_broken_one_says_why(library, shelf):
    good = library.add("login anna", io.BytesIO(pdf(TEXTS[0], "", TEXTS[1])), "a.pdf", "user_data").id
    bad = library.add("login anna", io.BytesIO(b"%PDF-1.4 and nothing"), "b.pdf", "user_data").id
    until(lambda: all(document.state != "waiting" for document in shelf.all()))
    assert (shelf.get(good).state, shelf.get(good).pages, shelf.get(good).notes) == (
        "ready",
        3,
        ["No text on 1 of 3 pages."],
    )
    assert (shelf.get(bad).state, shelf.get(bad).error) == ("failed", "This PDF is broken and cannot be opened.")
    assert pages_found(shelf, "keeper", good) == [3]
    assert b"".join(shelf.original(good)) == pdf(TEXTS[0], "", TEXTS[1])


def test_reading_goes_on_after_the_last_page_that_was_kept(library, shelf, monkeypatch):
    document = shelf.add(io.BytesIO(b"x"), "a.txt", "user_data")
    shelf.add_page(document.id, next(parsed(*TEXTS)))
    monkeypatch.setattr(module, "parse", lambda file, name, first: parsed(*TEXTS[first - 1 :], first=first))
    library.start()
    until(lambda: shelf.get(document.id).state == "ready")
    assert [chunk.page for chunk in shelf.pages([document.id])] == [1, 2, 3]
    assert sorted(pages_found(shelf, "the lighthouse keeper Hauptstadt", document.id)) == [1, 2, 3]


def test_a_document_waits_for_a_lock_or_a_full_disk_to_pass(library, shelf, monkeypatch):
    faults = [Busy("Locked."), NoRoom("Full."), OSError("No such thing.")]
    add_page = type(shelf).add_page

    def faulty(*args):
        if faults:
            raise faults.pop()
        return add_page(*args)

    monkeypatch.setattr(type(shelf), "add_page", faulty)
    monkeypatch.setattr(module, "RETRY_S", 0)
    monkeypatch.setattr(module, "parse", lambda file, name, first: parsed(*TEXTS))
    id = library.add("login anna", io.BytesIO(b"x"), "a.txt", "user_data").id
    until(lambda: shelf.get(id).state != "waiting")
    assert (faults, shelf.get(id).state, shelf.get(id).pages_done) == ([], "ready", 3)


def test_whatever_goes_wrong_a_document_does_not_stay_unread(library, shelf, monkeypatch):
    monkeypatch.setattr(module, "parse", lambda *_: {}["no such key"])
    id = library.add("login anna", io.BytesIO(b"x"), "a.txt", "user_data").id
    until(lambda: shelf.get(id).state != "waiting")
    assert (shelf.get(id).state, shelf.get(id).error) == ("failed", "This file could not be read.")


@pytest.mark.parametrize(("killed", "state"), [(2, "ready"), (3, "failed")])
def test_a_document_whose_reading_is_killed_is_read_again_before_it_counts_as_broken(
    library, shelf, monkeypatch, killed, state
):
    # A computer without memory for a moment: a sound file was "broken, or too large" for good.
    start, tries = subprocess.Popen, []

    def start_and_kill(*args, **kwargs):
        tries.append(start(*args, **kwargs))
        if len(tries) <= killed:
            tries[-1].kill()
        return tries[-1]

    monkeypatch.setattr(parsing.subprocess, "Popen", start_and_kill)
    monkeypatch.setattr(module, "RETRY_S", 0)
    id = library.add("login anna", io.BytesIO(b"The lighthouse."), "a.txt", "user_data").id
    until(lambda: shelf.get(id).state != "waiting")
    assert (shelf.get(id).state, len(tries)) == (state, 3)


def test_the_process_that_reads_a_file_knows_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.setenv("API_KEY", "sesame")
    started = {}

    def start(*args, **kwargs):
        started.update(kwargs)
        raise NotHere

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(NotHere):
        next(parsing.parse(io.BytesIO(b"x"), "a.txt"))
    assert "sesame" not in started["env"].values()
    assert started["env"]["PATH"] == os.environ["PATH"]


def test_only_whoever_runs_the_server_may_read_its_files(library, shelf):
    kept(shelf, *TEXTS)
    assert library.folder.stat().st_mode & 0o777 == 0o700
    assert shelf.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_process_that_computes_for_too_long_is_ended(tmp_path):
    wide = tmp_path / "wide.html"
    wide.write_bytes(b"<table><tr>" + b"<td>x" * 1_900_000)
    with wide.open("rb") as file, pytest.raises(ChatError, match="too long"):
        list(parse(file, "wide.html"))


KILLED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from llama2_chat.documents import library as module
from llama2_chat.documents.library import Library
from llama2_chat.documents.line import Line

def killed_at_50(*args):
    for page in parse(*args):
        yield page
        if page.number == 50:
            module.os.kill(module.os.getpid(), 9)

parse, module.parse = module.parse, killed_at_50
library = Library(Path(sys.argv[1]))
library.add("login anna", open(sys.argv[2], "rb"), "a.pdf", "user_data")
library._thread.join()
"""


@pytest.mark.slow
def test_a_server_that_is_killed_at_page_50_of_100_goes_on_there(tmp_path, library, shelf):
    file = tmp_path / "a.pdf"
    file.write_bytes(pdf(*(f"Page {number} is about subject{number}x." for number in range(1, 101))))
    killed = subprocess.run([sys.executable, "-c", KILLED, library.folder, file], cwd=ROOT, env=os.environ)
    assert killed.returncode == -9
    (document,) = shelf.all()
    assert (document.state, document.pages_done) == ("waiting", 50)
    library.start()
    until(lambda: shelf.get(document.id).state == "ready", 60)
    assert [page.page for page in shelf.pages([document.id])] == list(range(1, 101))
    with shelf.reading() as db:
        assert db.execute("SELECT count(*), count(DISTINCT page) FROM chunks").fetchone() == (100, 100)
    assert pages_found(shelf, "subject77x", document.id)[0] == 77


def test_owners_have_their_documents_read_in_turn(library):
    line, anna, bob = Line(), library.shelf("login anna"), library.shelf("login bob")
    for shelf, id in ((anna, "a1"), (anna, "a2"), (anna, "a3"), (bob, "b1")):
        line.put(shelf, id)
    order = [line.take()[1] for _ in range(2)]
    line.put_back(bob, "b1")  # it is not read to its end
    assert line.others_wait(bob)
    order += [line.take()[1] for _ in range(3)]
    assert order == ["a1", "b1", "a2", "b1", "a3"]
    assert not line.others_wait(bob)
    line.close()
    assert line.take() is None


def test_a_long_document_lets_others_be_read_in_between(library, monkeypatch):
    anna, bob = library.shelf("login anna"), library.shelf("login bob")
    read = []

    def read_slowly(file, name, first):
        for page in parsed(*TEXTS[first - 1 :], first=first):
            if name == "long.txt" and page.number == 1:
                library._line.put(bob, short)
            read.append((name, page.number))
            yield page

    monkeypatch.setattr(module, "TURN_S", 0)
    monkeypatch.setattr(module, "parse", read_slowly)
    short = bob.add(io.BytesIO(b"x"), "short.txt", "user_data").id
    bob.add_page(short, ParsedPage(1, 3, "x", ()))
    id = library.add("login anna", io.BytesIO(b"y"), "long.txt", "user_data").id
    until(lambda: anna.get(id).state == bob.get(short).state == "ready")
    assert read.index(("short.txt", 2)) < read.index(("long.txt", 2))
    assert [chunk.page for chunk in anna.pages([id])] == [1, 2, 3]


def test_whoever_downloads_a_document_keeps_none_of_its_words_once_it_is_deleted(library, shelf, monkeypatch):
    monkeypatch.setattr(store, "PIECE", 1000)
    monkeypatch.setattr(database, "BUSY_S", 0)
    id = kept(shelf, "Quetzalcoatlus flew here. " * 300)
    download = shelf.original(id)
    next(download)
    shelf.delete(id)
    assert b"quetzalcoatlus" not in b"".join(path.read_bytes() for path in library.folder.iterdir()).lower()
    with pytest.raises(NotHere):
        next(download)


def test_a_visitor_with_a_cookie_is_forgotten_after_a_month_and_not_by_a_clock_that_is_wrong_for_once(
    library, monkeypatch
):
    # A clock a month ahead at one start removed the documents of all who had not logged in.
    day, real = 24 * 3600, time.time
    for owner in ("cookie 1", "login anna"):
        kept(library.shelf(owner), "A page")

    def start_after(days):
        monkeypatch.setattr(time, "time", lambda: real() + days * day)
        library._look_around()
        return sorted(path.name.partition("-")[0] for path in library.folder.glob("*.sqlite"))

    assert start_after(40) == ["cookie", "login"]
    assert start_after(40.5) == ["cookie", "login"]
    assert start_after(0) == ["cookie", "login"]  # the clock is right again
    assert start_after(42) == ["cookie", "login"]
    assert start_after(43.5) == ["login"]
    assert not [path for path in library.folder.iterdir() if path.name.startswith("cookie")]


def test_visitors_with_cookies_alone_take_half_of_the_disk_together(library, monkeypatch):
    add = functools.partial(library.add, file=io.BytesIO(b"x" * 1000), name="a.txt", purpose="user_data")
    monkeypatch.setattr(Library, "_read_later", lambda *_: None)
    add("cookie 1")
    used = sum(path.stat().st_size for path in library.folder.iterdir())
    room = database.FREE_BYTES + used + 3_000
    monkeypatch.setattr(database.shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    with pytest.raises(NoRoom, match="not logged in"):
        add("cookie 2")
    add("login anna")
    add("key 1")
