"""From a page to the pieces of text that are searched and quoted.

A chunk is about 200 tokens, ends where a sentence does, begins with the end of the one before it, and never crosses a
page. Rows of a table stand under their header in every chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

CHUNK_SIZE = 900  # letters: about 200 tokens of English with Llama 2's tokenizer, and 250 of German
OVERLAP = 100
LONGEST_HEADER = CHUNK_SIZE // 3  # a longer one would leave no room for what stands under it
WIDE = 4  # letters of the Latin alphabet that cost as many tokens as one Chinese character

SENTENCE_END = re.compile(r"(?<=[.!?…:;])[\"'”’)\]]*\s+|(?<=[。！？])|\n{2,}|\n(?=[-*•#\d])")


@dataclass(frozen=True)
class Table:
    header: str
    rows: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join([self.header, *self.rows])


Block = str | Table


def page_text(blocks: Iterable[Block]) -> str:
    return "\n\n".join(block.text if isinstance(block, Table) else block for block in blocks)


def chunks_of(blocks: Iterable[Block]) -> list[str]:
    """The chunks of one page, none of them empty."""
    chunks: list[str] = []
    prose: list[str] = []
    for block in blocks:
        if isinstance(block, Table):
            chunks += _prose_chunks("\n\n".join(prose))
            chunks += _table_chunks(block)
            prose = []
        else:
            prose.append(block)
    return chunks + _prose_chunks("\n\n".join(prose))


def size(text: str) -> int:
    """How long a text is for a model, in letters of the Latin alphabet."""
    return len(text) if text.isascii() else sum(WIDE if ord(letter) >= 0x2E80 else 1 for letter in text)


def _prose_chunks(text: str) -> list[str]:
    chunks, current = [], ""
    for sentence in _sentences(text):
        if current.strip() and size(current) + size(sentence) > CHUNK_SIZE:
            chunks.append(current.strip())
            current = _tail(current)
        current += sentence
    return [*chunks, current.strip()] if current.strip() else chunks


def _sentences(text: str) -> Iterator[str]:
    """All of the text in order, cut after sentences, and where these are too long after words."""
    start = 0
    for end in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
        yield from _cut(text[start:end], CHUNK_SIZE - OVERLAP)
        start = end


def _cut(text: str, longest: int) -> Iterator[str]:
    """The text in pieces of at most this size, cut after words where it has any."""
    start = 0
    while size(text[start : start + longest + 1]) > longest:
        letters = longest if size(text[start : start + longest]) <= longest else longest // WIDE
        space = text.rfind(" ", start + letters // 2, start + letters) + 1
        end = space or start + letters
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _tail(text: str) -> str:
    """Its last words, at most OVERLAP letters with the space after them."""
    text = text.rstrip()
    tail = text[1 - (OVERLAP // WIDE if size(text) > 2 * len(text) else OVERLAP) :]
    if len(tail) < len(text) and " " in tail:
        tail = tail.partition(" ")[2]
    return tail + " "


def _table_chunks(table: Table) -> list[str]:
    header = next(_cut(table.header, LONGEST_HEADER), "")
    chunks: list[str] = []
    current = header
    for row in table.rows:
        for piece in _cut(row, CHUNK_SIZE - LONGEST_HEADER):
            if current != header and size(current) + size(piece) > CHUNK_SIZE:
                chunks.append(current)
                current = header
            current += "\n" + piece
    return [*chunks, current] if current.strip() else chunks
