"""Documents found by their meaning, with an encoder that knows what a few words mean."""

import io
from contextlib import closing

import numpy as np
import pytest

from llama2_chat.documents import meaning
from llama2_chat.documents.library import Library
from llama2_chat.documents.meaning import Encoding, is_whole
from llama2_chat.documents.search import search
from llama2_chat.documents.store import Shelf
from tests.documents.test_library import TEXTS, kept, pages_found
from tests.support.encoders import WordMeanings
from tests.support.waiting import until


@pytest.fixture
def embedder():
    return WordMeanings()


@pytest.fixture
def shelf(tmp_path, embedder):
    return Library(tmp_path, embedder).shelf("login anna")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(meaning, "RETRY_S", 0.01)


def encoded(shelf, *ids, wait=True):
    """Have the thread encode what has no vectors."""
    with closing(Encoding(shelf.embedder, shelf.path.parent)) as encoding:
        encoding.start()
        until(lambda: all(whole(shelf, id) for id in ids))


def whole(shelf, id):
    with shelf.reading() as db:
        return is_whole(db, id, shelf.embedder.identity)


def rows(shelf):
    """Document, encoder and numbers of chunks of each row of vectors."""
    with shelf.reading() as db:
        found = db.execute("SELECT document, encoder, chunks FROM vectors ORDER BY document, last").fetchall()
    return [(id, encoder, np.frombuffer(chunks, np.int64).tolist()) for id, encoder, chunks in found]


def test_a_page_is_found_that_shares_no_word_with_the_question(shelf):
    id = kept(shelf, *TEXTS)
    assert pages_found(shelf, "Wärter, Möwen?", id) == []
    encoded(shelf, id)
    assert pages_found(shelf, "Wärter, Möwen?", id)[0] == 2
    assert pages_found(shelf, "1874", id)[0] == 1  # a word that means nothing is found as before


def test_a_document_is_encoded_when_it_has_been_read(tmp_path, embedder):
    with closing(Library(tmp_path, embedder)) as library:
        shelf = library.shelf("login anna")
        id = library.add("login anna", io.BytesIO(TEXTS[1].encode()), "a.txt", "user_data").id
        until(lambda: shelf.get(id).state == "ready" and whole(shelf, id))
    assert pages_found(shelf, "Möwen", id) == [1]
    assert embedder.asked == [("document", [TEXTS[1]]), ("question", ["Möwen"])]


def test_words_alone_go_on_where_the_encoder_fails(shelf, embedder):
    id = kept(shelf, *TEXTS)
    encoded(shelf, id)
    embedder.fail("The encoder's server cannot be reached.")
    assert pages_found(shelf, "Möwen", id) == []
    assert pages_found(shelf, "seabirds", id) == [2]


def test_a_document_is_encoded_once_the_encoder_is_back(shelf, embedder):
    id = kept(shelf, *TEXTS)
    embedder.fail("The encoder's server cannot be reached.")
    with closing(Encoding(embedder, shelf.path.parent)) as encoding:
        encoding.start()
        encoding.put(shelf, id)
        assert not whole(shelf, id)
        embedder.state = "ready"
        until(lambda: whole(shelf, id))


def test_a_document_with_some_vectors_only_is_searched_by_its_words(shelf, embedder):
    """Its first pages would be preferred, whatever the others say."""
    id = kept(shelf, *TEXTS)
    ((first, text),) = shelf.without_vectors(id, embedder.identity, 1)
    vectors = embedder.embed([text], "document").vectors.astype(np.float16).tobytes()
    shelf.add_vectors(id, embedder.identity, [first], vectors)
    assert pages_found(shelf, "Leuchtturm", id) == []


def test_encoding_goes_on_after_the_last_vectors_with_none_twice(shelf, embedder, monkeypatch):
    monkeypatch.setattr(meaning, "BATCH", 2)
    id = kept(shelf, *TEXTS, "A fourth page.", "And a fifth.")
    add_vectors, killed = Shelf.add_vectors, []

    def kill(*args):
        add_vectors(*args)
        killed.append(True)
        raise SystemExit

    monkeypatch.setattr(Shelf, "add_vectors", kill)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    encoding = Encoding(embedder, shelf.path.parent)
    encoding.start()
    until(lambda: killed)
    monkeypatch.setattr(Shelf, "add_vectors", add_vectors)
    encoded(shelf, id)
    assert [chunks for _, _, chunks in rows(shelf)] == [[1, 2], [3, 4], [5]]
    assert [len(texts) for purpose, texts in embedder.asked] == [2, 2, 1]
    shelf.add_vectors(id, embedder.identity, [3, 4], b"")  # another process was slower
    assert len(rows(shelf)) == 3


def test_another_encoder_encodes_everything_anew(shelf, embedder):
    one, other = kept(shelf, *TEXTS[:2]), kept(shelf, TEXTS[2])
    encoded(shelf, one, other)
    shelf.embedder = WordMeanings("words 2")
    assert pages_found(shelf, "Möwen", one) == []  # what another one made is not compared
    encoded(shelf, one, other)
    assert pages_found(shelf, "Möwen", one)[0] == 2
    assert {encoder for _, encoder, _ in rows(shelf)} == {"words 2"}


def test_a_server_that_has_another_encoder_now_encodes_everything_anew(shelf, embedder):
    one = kept(shelf, *TEXTS)
    with closing(Encoding(embedder, shelf.path.parent)) as encoding:
        encoding.start()
        until(lambda: whole(shelf, one))
        embedder.identity = "words 2"
        two = kept(shelf, "Gulls.")
        encoding.put(shelf, two)
        until(lambda: whole(shelf, one) and whole(shelf, two))
    assert {encoder for _, encoder, _ in rows(shelf)} == {"words 2"}


def test_nothing_of_a_deleted_documents_vectors_is_left_in_any_file(shelf, embedder):
    id, other = kept(shelf, "The keeper sells insurance for seabirds."), kept(shelf, "A lighthouse.")
    encoded(shelf, id, other)
    vector = embedder.embed(["keeper insurance seabirds"], "document").vectors.astype(np.float16).tobytes()

    def files():
        return b"".join(path.read_bytes() for path in shelf.path.parent.iterdir())

    assert vector in files()
    shelf.delete(id)
    assert vector not in files()
    assert pages_found(shelf, "beacon", other) == [1]


def test_only_the_documents_that_are_named_are_compared(shelf):
    one, other = kept(shelf, *TEXTS), kept(shelf, "Gulls.")
    encoded(shelf, one, other)
    assert [chunk.document for chunk in search(shelf, "Möwen", [other])] == [other]
    assert {chunk.document for chunk in search(shelf, "Möwen", [one, other])} == {one, other}
