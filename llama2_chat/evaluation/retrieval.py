"""How often the search of documents finds the page that a question is about, and how long indexing takes.

The documents are files, read as the chat reads them. Without any, the questions' own passages are the pages of one
document, among distractors: the language reference that comes with every Python.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.documents.chunks import chunks_of
from llama2_chat.documents.library import MAX_FILE_BYTES, Library
from llama2_chat.documents.meaning import encode_next
from llama2_chat.documents.parsing import ParsedPage
from llama2_chat.documents.search import search
from llama2_chat.documents.store import Document, Shelf
from llama2_chat.documents.texts import shown_name
from llama2_chat.errors import ChatError
from llama2_chat.evaluation.document_questions import DocumentQuestion
from llama2_chat.types import Embedder

OWNER = "evaluation"
DEPTH = 10  # chunks that are looked at for each question; a page that is not among them counts as missed
SHOWN = (1, 3, 5, 10)
LOOK_S = 0.05

Place = tuple[str, int]  # a document's name, and a page of it from 1


@dataclass(frozen=True)
class Collection:
    """Documents that can be searched."""

    shelf: Shelf
    documents: tuple[Document, ...]
    index_s: float

    @property
    def ids(self) -> list[str]:
        return [document.id for document in self.documents]


@dataclass(frozen=True)
class Found:
    """Where a question's page came in the ranking of chunks."""

    question: DocumentQuestion
    right: frozenset[Place]
    places: tuple[Place, ...]  # of the chunks that were found, best first

    @property
    def rank(self) -> int:
        """From 1; 0 if none of the right pages is there."""
        return next((rank for rank, place in enumerate(self.places, 1) if place in self.right), 0)


@dataclass(frozen=True)
class Retrieval:
    documents: int
    pages: int
    found: tuple[Found, ...]  # at least one
    index_s: float
    search_ms: float  # for each question
    encoder: str = ""  # by which they were also found; "" if by their words alone

    def recall(self, k: int) -> float:
        """The share of questions of which the page is among the first k chunks."""
        return sum(0 < each.rank <= k for each in self.found) / len(self.found)

    @property
    def mean_reciprocal_rank(self) -> float:
        return sum(1 / each.rank for each in self.found if each.rank) / len(self.found)


@contextlib.contextmanager
def collected(
    paths: Sequence[Path], questions: Sequence[DocumentQuestion], embedder: Embedder | None = None
) -> Iterator[Collection]:
    """These files, or the questions' passages where there are none. Raises ChatError for what cannot be read.

    embedder: what finds them by their meaning, too; ready.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Library(Path(folder))) as library:
        began = time.perf_counter()
        documents = _read(library, paths) if paths else [_passages(library, questions)]
        shelf = Shelf(library.shelf(OWNER).path, embedder)
        if embedder:
            for document in documents:
                while encode_next(embedder, shelf, document.id):
                    pass
        yield Collection(shelf, tuple(documents), time.perf_counter() - began)


def measure(collection: Collection, questions: Sequence[DocumentQuestion]) -> Retrieval:
    """Raises ChatError for a question whose place is not among the documents."""
    places = Places(collection)
    right = [places.of(question) for question in questions]
    began = time.perf_counter()
    chunks = [search(collection.shelf, question.text, collection.ids, DEPTH) for question in questions]
    seconds = time.perf_counter() - began
    found = [
        Found(question, pages, tuple((chunk.name, chunk.page) for chunk in ranking))
        for question, pages, ranking in zip(questions, right, chunks, strict=True)
    ]
    pages = sum(document.pages for document in collection.documents)
    return Retrieval(
        len(collection.documents),
        pages,
        tuple(found),
        collection.index_s,
        1000 * seconds / len(questions),
        collection.shelf.embedder.name if collection.shelf.embedder else "",
    )


class Places:
    """Which pages say what a question asks."""

    def __init__(self, collection: Collection) -> None:
        self._pages = {document.name: document.pages for document in collection.documents}
        self._texts = {(page.name, page.page): _plain(page.text) for page in collection.shelf.pages(collection.ids)}

    def of(self, question: DocumentQuestion) -> frozenset[Place]:
        """At least one. Raises ChatError, with the question's line."""
        where = f"Line {question.line}: " if question.line else ""
        named = question.file or (next(iter(self._pages)) if len(self._pages) == 1 else "")
        if named and named not in self._pages:
            raise ChatError(f"{where}there is no document {named!r} here, but {', '.join(self._pages):.300}.")
        if question.page:
            if not named:
                raise ChatError(f"{where}page {question.page} needs a file beside it, for there are several documents.")
            if question.page > self._pages[named]:
                raise ChatError(f"{where}{named} has {self._pages[named]:,} pages, and no page {question.page:,}.")
            return frozenset({(named, question.page)})
        words = _plain(question.passage)
        found = {place for place, text in self._texts.items() if words in text and named in ("", place[0])}
        if not found:
            raise ChatError(f"{where}its passage stands on no page of these documents.")
        return frozenset(found)


def _read(library: Library, paths: Sequence[Path]) -> list[Document]:
    names = [shown_name(path.name) for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ChatError(f"Two documents are called {twice}. Rename one of them, so that questions can name it.")
    shelf = library.shelf(OWNER)
    ids: dict[str, str] = {}  # the name of each
    for path, name in zip(paths, names, strict=True):
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ChatError(f"{path} has more than the {MAX_FILE_BYTES / 1e6:g} MB that a document may have.")
            with path.open("rb") as file:
                id = library.add(OWNER, file, name, "user_data").id
        except OSError as error:
            raise ChatError(f"{path} cannot be read ({error.strerror}).") from error
        if id in ids:
            raise ChatError(f"{ids[id]} and {name} are the same document. Leave one of them out.")
        ids[id] = name
    while any(shelf.get(id).state == "waiting" for id in ids):
        time.sleep(LOOK_S)
    documents = [shelf.get(id) for id in ids]
    if failed := next((document for document in documents if document.state == "failed"), None):
        raise ChatError(f"{failed.name} cannot be read: {failed.error}")
    return documents


def _passages(library: Library, questions: Sequence[DocumentQuestion]) -> Document:
    if of_file := next((question for question in questions if question.file or question.page), None):
        raise ChatError(f"Line {of_file.line} is about a document. Name the documents beside the questions.")
    texts = [*dict.fromkeys(question.passage for question in questions), *_distractors()]
    shelf = library.shelf(OWNER)
    id = shelf.add(io.BytesIO(b"passages"), "passages", "user_data").id
    for number, text in enumerate(texts, 1):
        shelf.add_page(id, ParsedPage(number, len(texts), text, tuple(chunks_of([text]))))
    shelf.finish(id)
    return shelf.get(id)


def _distractors() -> list[str]:
    from pydoc_data.topics import topics

    return list(topics.values())


def _plain(text: str) -> str:
    """Without what a line break or a copy may change."""
    return " ".join(text.split()).casefold()
