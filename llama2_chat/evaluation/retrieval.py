"""How often the search of documents finds the page that a question is about, and how long indexing takes.

The passages are pages of one document, among distractors: the language reference that comes with every Python.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.documents.chunks import chunks_of
from llama2_chat.documents.library import Library
from llama2_chat.documents.parsing import ParsedPage
from llama2_chat.documents.search import search
from llama2_chat.errors import ChatError

OWNER = "evaluation"


@dataclass(frozen=True)
class Passage:
    text: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Retrieval:
    """recall_at_5, mean_reciprocal_rank: of all questions; a page that is not among the first five counts as 0."""

    pages: int
    questions: int
    recall_at_5: float
    mean_reciprocal_rank: float
    index_s: float
    search_ms: float


def read_passages(path: Path) -> list[Passage]:
    """A JSON list of objects with a text and questions, as XQuAD's passages are. Raises ChatError."""
    try:
        return [Passage(each["text"], tuple(each["questions"])) for each in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChatError(f"{path} is no JSON list of objects with a text and questions: {error}.") from error


def distractors() -> list[str]:
    from pydoc_data.topics import topics

    return list(topics.values())


def measure(passages: list[Passage], others: list[str]) -> Retrieval:
    texts = [*(passage.text for passage in passages), *others]
    with tempfile.TemporaryDirectory() as folder:
        shelf = Library(Path(folder)).shelf(OWNER)
        began = time.perf_counter()
        id = shelf.add(io.BytesIO(b"passages"), "passages.txt", "user_data").id
        for number, text in enumerate(texts, 1):
            shelf.add_page(id, ParsedPage(number, len(texts), text, tuple(chunks_of([text]))))
        indexed = time.perf_counter()
        ranks = [
            _rank(number, [chunk.page for chunk in search(shelf, question, [id])])
            for number, passage in enumerate(passages, 1)
            for question in passage.questions
        ]
        searched = time.perf_counter()
    found = [rank for rank in ranks if rank]
    return Retrieval(
        pages=len(texts),
        questions=len(ranks),
        recall_at_5=len(found) / len(ranks),
        mean_reciprocal_rank=sum(1 / rank for rank in found) / len(ranks),
        index_s=indexed - began,
        search_ms=1000 * (searched - indexed) / len(ranks),
    )


def _rank(page: int, pages: list[int]) -> int:
    """From 1; 0 if it is not there."""
    return pages.index(page) + 1 if page in pages else 0
