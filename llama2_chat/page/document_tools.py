"""What an agent may do with the documents that a conversation is about: search them, and open a page.

A visitor's question comes with excerpts anyway; with these a model looks for what they do not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from llama2_chat.agent import Example, Tool
from llama2_chat.documents.search import search
from llama2_chat.documents.store import Document, Shelf
from llama2_chat.errors import ChatError

LONGEST_RESULT = 1_900  # letters, of the 2,000 that are read of a tool's result
LONGEST_PART = 1_600  # of a page
MOST_FOUND = 5
MOST_NAMED = 10  # documents, in a sentence


def document_tools(shelf: Shelf, ids: Sequence[str]) -> tuple[Tool, ...]:
    return SearchDocuments(shelf, ids), OpenPage(shelf, ids)


class SearchDocuments:
    name = "search_documents"
    description = "finds passages in the user's documents"
    input_schema: ClassVar = {"type": "string", "minLength": 1, "maxLength": 200}
    examples = (
        Example(
            "What does my contract say about notice?",
            "contract notice period",
            "contract.pdf, page 4:\nEither party may end it with three months' notice.",
            "It can be ended with three months' notice (contract.pdf, page 4).",
        ),
    )
    timeout_s = 30.0

    def __init__(self, shelf: Shelf, ids: Sequence[str]) -> None:
        self._shelf, self._ids = shelf, ids

    def run(self, input: Any) -> str:
        found = search(self._shelf, input, self._ids, MOST_FOUND)
        passages = [f"{chunk.name}, page {chunk.page}:\n{chunk.text}" for chunk in found]
        while len(result := "\n\n".join(passages)) > LONGEST_RESULT and len(passages) > 1:
            passages.pop()
        return result[:LONGEST_RESULT] or "No passage matches."


class OpenPage:
    name = "open_page"
    description = "reads a page of one of the user's documents"
    input_schema: ClassVar = {
        "type": "object",
        "properties": {
            "document": {"type": "string", "minLength": 1, "maxLength": 200},
            "page": {"type": "integer", "minimum": 1, "maximum": 1_000_000},
            "part": {"type": "integer", "minimum": 1, "maximum": 1_000_000},
        },
        "required": ["document", "page"],
        "additionalProperties": False,
    }
    examples = (
        Example(
            "What stands on page 2 of contract.pdf?",
            {"document": "contract.pdf", "page": 2},
            "contract.pdf, page 2:\nThe rent is due on the first day of each month.",
            "The rent is due on the first day of each month.",
        ),
    )
    timeout_s = 30.0

    def __init__(self, shelf: Shelf, ids: Sequence[str]) -> None:
        self._shelf, self._ids = shelf, ids

    def run(self, input: Any) -> str:
        document, number, part = self._named(input["document"]), input["page"], input.get("part", 1)
        text = self._shelf.page(document.id, number)
        parts = [text[start : start + LONGEST_PART] for start in range(0, len(text), LONGEST_PART)] or [""]
        if part > len(parts):
            raise ChatError(f"This page has {len(parts)} parts.")
        place = f"{document.name}, page {number}" + (f", part {part} of {len(parts)}" if len(parts) > 1 else "")
        return f"{place}:\n{parts[part - 1]}"

    def _named(self, name: str) -> Document:
        documents = [self._shelf.get(id) for id in self._ids]
        if found := next((each for each in documents if each.name.casefold() == name.casefold()), None):
            return found
        names = ", ".join(each.name for each in documents[:MOST_NAMED])
        raise ChatError(f"There is no document of this name; there are {names:.1000}.")
