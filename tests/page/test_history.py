"""A login's conversations on the server: kept once, told to every browser, erased for good, apart from others'."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from llama2_chat import database
from llama2_chat.errors import NoRoom
from llama2_chat.page import history as module
from llama2_chat.page.history import Change, Histories
from tests.support.histories import HistoryClient

ROOT = Path(__file__).parents[2]


@pytest.fixture
def histories(tmp_path):
    return Histories(tmp_path / "history")


@pytest.fixture
def history(histories):
    return histories.of("login anna")


def id_of(name):
    return name.encode().hex().ljust(32, "0")


def talk(name, base=0, **fields):
    return Change(id_of(name), "conversation", id_of(name), base, json.dumps({"id": id_of(name), **fields}))


def said(conversation, name, text, base=0):
    return Change(id_of(name), "message", id_of(conversation), base, json.dumps({"text": text}))


def gone(change, base):
    return replace(change, base=base, body=None)


def put(history, *changes):
    """The revisions of what was kept, by name."""
    kept = history.put(changes, "").kept
    return {bytes.fromhex(id).rstrip(b"\0").decode(): revision for id, revision in kept.items()}


def all_of(history, revision=0):
    page = history.after(history.after("", 0).epoch, revision)
    return {bytes.fromhex(record.id).rstrip(b"\0").decode(): record for record in page.records}


def test_a_browser_hears_of_what_is_newer_than_it_has_seen(history):
    assert history.after("", 0).records == []
    assert put(history, talk("a"), said("a", "hello", "Hello")) == {"a": 1, "hello": 2}
    assert put(history, said("a", "more", "More")) == {"more": 3}
    assert set(all_of(history)) == {"a", "hello", "more"}
    # With the conversation of each message, which may be older.
    assert set(all_of(history, 2)) == {"a", "more"}
    assert all_of(history, 3) == {}
    assert not list(history.path.parent.glob("*.new"))


def test_what_another_browser_has_changed_meanwhile_is_not_overwritten(history):
    put(history, talk("a", title="Old"))
    assert put(history, talk("a", 1, title="From the phone")) == {"a": 2}
    saved = history.put([talk("a", 1, title="From the computer")], "")
    assert saved.kept == {}
    assert [json.loads(record.body)["title"] for record in saved.others] == ["From the phone"]
    assert json.loads(all_of(history)["a"].body)["title"] == "From the phone"
    assert put(history, talk("a", 2, title="From both")) == {"a": 3}


def test_what_is_sent_twice_is_there_once(history):
    changes = (talk("a"), said("a", "hello", "Hello"))
    assert put(history, *changes) == put(history, *changes) == {"a": 1, "hello": 2}


def test_a_deleted_conversation_takes_its_messages_along_and_no_browser_brings_it_back_unknowingly(history):
    put(history, talk("a"), said("a", "hello", "Hello"), talk("b"))
    assert put(history, gone(talk("a"), 1)) == {"a": 4}
    assert {name: record.body for name, record in all_of(history).items() if name != "b"} == {"a": None}
    saved = history.put([said("a", "late", "Late"), talk("a", 1)], "")
    assert saved.kept == {}
    assert [(record.id, record.body) for record in saved.others] == [(id_of("a"), None)]
    assert put(history, gone(talk("a"), 1), gone(talk("never"), 0)) == {"a": 4, "never": 0}
    # Who has seen that it is gone may undo it.
    assert put(history, talk("a", 4), said("a", "hello", "Hello")) == {"a": 5, "hello": 6}


def test_nothing_of_a_deleted_conversation_is_left_in_any_file(history):
    put(history, talk("a", title="Quetzalcoatlus"), talk("b", title="Zenoria"))
    put(history, *(said("a", f"{n}", f"Ferrandini {n} " * 200) for n in range(20)))
    put(history, gone(talk("a"), 1))
    content = b"".join(path.read_bytes() for path in history.path.parent.iterdir())
    assert b"Zenoria" in content
    assert b"Quetzal" not in content
    assert b"Ferrandini" not in content


def test_much_comes_in_pages_and_nothing_of_it_is_left_out(history, monkeypatch):
    monkeypatch.setattr(module, "PAGE_RECORDS", 7)
    put(history, talk("a"), *(said("a", f"m{n}", "x") for n in range(30)), talk("b"))
    epoch, revision, seen, is_last = "", 0, set(), False
    while not is_last:
        page = history.after(epoch, revision)
        epoch, revision, is_last = page.epoch, page.revision, page.is_last
        seen |= {record.id for record in page.records}
    assert len(seen) == 32
    assert history.after(epoch, revision).records == []


def test_a_browser_that_knows_another_file_begins_again(histories, history):
    put(history, talk("a"))
    other = histories.of("login other")
    put(other, talk("a"), talk("b"))
    epoch = other.after("", 0).epoch
    page = history.after(epoch, 2)
    assert (page.after, page.revision, len(page.records)) == (0, 1, 1)
    assert history.after(page.epoch, 5).after == 0  # from a copy that was kept before the file was put back
    saved = history.put([talk("a", 1, title="x")], epoch)
    assert (saved.epoch, saved.kept) == (page.epoch, {})


def test_a_login_has_so_much_room_and_may_always_delete(history, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 3_000)
    put(history, talk("a"), said("a", "hello", "x" * 2_000))
    with pytest.raises(NoRoom, match="stay in this browser"):
        put(history, said("a", "more", "y" * 1_000))
    assert set(all_of(history)) == {"a", "hello"}
    monkeypatch.setattr(database.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(NoRoom, match="disk of this server is full"):
        put(history, said("a", "little", "z"))
    assert put(history, gone(said("a", "hello", ""), 2)) == {"hello": 3}
    monkeypatch.undo()
    with closing(sqlite3.connect(history.path)) as db:
        (used,) = db.execute("SELECT bytes FROM state").fetchone()
        bodies = db.execute("SELECT body FROM records").fetchall()
    assert used == sum(module._size(body) for (body,) in bodies)


def test_a_folder_that_cannot_be_written_is_a_sentence_for_the_visitor_and_a_reason_for_the_log(tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(NoRoom, match="cannot keep conversations") as caught:
        put(Histories(tmp_path / "a file").of("login anna"), talk("a"))
    assert "a file" in caught.value.detail


@pytest.mark.slow
def test_thirty_two_writers_at_once_lose_nothing(history):
    put(history, talk("a"))

    with ThreadPoolExecutor(32) as pool:
        kept = list(pool.map(lambda writer: put(history, said("a", f"{writer}", "x")), range(32)))
    assert sorted(revision for each in kept for revision in each.values()) == list(range(2, 34))
    assert len(all_of(history)) == 33


WRITERS = """
import sys, threading
from pathlib import Path
from llama2_chat.page.history import Change, Histories
from tests.support.histories import HistoryClient

history = Histories(Path(sys.argv[1])).of("login anna")
a = "a" * 32
history.put([Change(a, "conversation", a, 0, "{}")], "")

def write(writer):
    for turn in range(10_000):
        id = f"{writer:016x}{turn:016x}"
        history.put([Change(id, "message", a, 0, '{"text": "' + "word " * 50 + '"}')], "")
        sys.stdout.write(id + "\\n")
        sys.stdout.flush()

for writer in range(32):
    threading.Thread(target=write, args=(writer,)).start()
"""


@pytest.mark.slow
def test_a_server_that_is_killed_amid_32_writers_has_lost_no_turn_that_it_had_kept(tmp_path):
    command = [sys.executable, "-c", WRITERS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        told = [process.stdout.readline().strip() for _ in range(200)]
        os.kill(process.pid, signal.SIGKILL)
        told += [line.strip() for line in process.stdout if line.endswith("\n")]
    history = Histories(tmp_path).of("login anna")
    with closing(sqlite3.connect(history.path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        kept = {id for (id,) in db.execute("SELECT id FROM records WHERE body IS NOT NULL")}
    assert set(told) <= kept
    assert history.put([Change("b" * 32, "message", "a" * 32, 0, "{}")], "").kept


# ---- over HTTP


@pytest.fixture
def anna_and_bert(histories):
    return [HistoryClient(histories, name) for name in ("änna", "bert")]


def sent(change):
    record = None if change.body is None else json.loads(change.body)
    return {**vars(change), "record": record} | {"body": None}


def put_over(http, *changes, **headers):
    records = [{name: value for name, value in sent(change).items() if name != "body"} for change in changes]
    return http.put("/page/history", json={"epoch": "", "records": records}, headers=headers)


def test_two_logins_never_meet(anna_and_bert):
    anna, bert = anna_and_bert
    assert put_over(anna, talk("a", title="Anna's secret")).json()["kept"] == {id_of("a"): 1}
    assert bert.get("/page/history").json()["records"] == []
    assert put_over(bert, said("a", "into", "hers")).json()["kept"] == {}
    assert put_over(bert, gone(talk("a"), 1)).json()["kept"] == {id_of("a"): 0}  # there is none of his
    (record,) = anna.get("/page/history").json()["records"]
    assert record["record"]["title"] == "Anna's secret"
    assert anna.get("/page/state").json()["history"]


def test_a_page_of_one_login_sends_and_reads_nothing_under_anothers_cookie(anna_and_bert):
    """Two tabs of one browser: somebody else has logged in in the other."""
    anna, bert = anna_and_bert
    for wrong in ({"X-Login": quote("änna")}, {"X-Login": ""}):
        for answer in (put_over(bert, talk("b"), **wrong), bert.get("/page/history", headers=wrong)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "other_login")
    for answer in (put_over(anna, talk("b"), Cookie=""), anna.get("/page/history", headers={"Cookie": ""})):
        assert answer.status_code == 401


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "../../etc/passwd"},
        {"kind": "user"},
        {"base": -1},
        {"base": 2**70},
        {"record": []},
        {"conversation": None},
        {"more": 1},
        {"record": {"text": "x" * 4_000_001}},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_no_record_gets_a_sentence_and_changes_nothing(anna_and_bert, wrong):
    _, bert = anna_and_bert
    record = {"id": id_of("c"), "kind": "conversation", "conversation": id_of("c"), "base": 0, "record": {}, **wrong}
    answer = bert.put("/page/history", json={"epoch": "", "records": [record]})
    assert answer.status_code in (400, 413)
    assert answer.json()["error"]["message"].endswith(".")
    assert bert.get("/page/history").json()["records"] == []
