"""HTML files as a reader sees them: no scripts, no styles, tables in rows. Runs only in the process of parsing.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lxml import etree

from llama2_chat.documents.chunks import Block, Table
from llama2_chat.documents.readers import Page
from llama2_chat.documents.texts import paginated

UNSEEN = {"script", "style", "template", "noscript", "iframe", "object", "svg", "canvas", "select"}
INLINE = {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "em", "font", "i", "kbd", "mark", "q", "s", "small", "span"}
INLINE |= {"strong", "sub", "sup", "time", "u", "var", "wbr", "img", "label", "ins", "del"}
NOT_SHOWN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden")
HARDLY_SHOWN = re.compile(
    r"(?<![\w-])color\s*:\s*(white|#fff(fff)?)\b|font-size\s*:\s*0*[01](\.\d+)?(px|pt)|opacity\s*:\s*0(\.0\d*)?\s*(;|$)"
)


def read_html(text: str) -> Iterator[Page]:
    reader = _Reader()
    parser = etree.HTMLParser(target=reader, huge_tree=True)
    parser.feed(text)
    parser.close()
    for blocks in paginated(reader.blocks):
        yield Page(blocks, reader.hidden)


class _Reader:
    """Takes what lxml reads, which ends each element where a browser does."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.hidden = False
        self._text: list[str] = []
        self._rows: list[str] | None = None  # of the table that is open
        self._outer: list[tuple[list[str], list[str]]] = []  # rows and text so far of the tables around it
        self._unseen = 0  # open elements from the first on that is not shown

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        style = attributes.get("style", "").lower()
        if self._unseen or tag in UNSEEN or "hidden" in attributes or NOT_SHOWN.search(style):
            self._unseen += 1
            return
        self.hidden = self.hidden or bool(HARDLY_SHOWN.search(style))
        if tag == "table":
            self._start_table()
        elif tag == "tr":
            self._end_row()
        elif self._rows is not None and tag in ("td", "th"):
            self._text.append(" | " if "".join(self._text).strip() else "")
        elif tag not in INLINE and self._rows is None:
            self._end_paragraph()
        else:
            self._text.append(" " if tag not in INLINE else "")

    def end(self, tag: str) -> None:
        if self._unseen:
            self._unseen -= 1
        elif tag == "table":
            self._end_table()
        elif tag == "tr":
            self._end_row()
        elif tag not in INLINE and self._rows is None:
            self._end_paragraph()

    def data(self, data: str) -> None:
        if not self._unseen:
            self._text.append(data)

    def close(self) -> None:
        self._end_paragraph()

    def _start_table(self) -> None:
        if self._rows is None:
            self._end_paragraph()
        else:
            self._outer.append((self._rows, self._text))
            self._text = []
        self._rows = []

    def _end_table(self) -> None:
        self._end_row()
        if self._rows:
            self.blocks.append(Table(self._rows[0], tuple(self._rows[1:])))
        self._rows = None
        if self._outer:
            self._rows, self._text = self._outer.pop()

    def _end_row(self) -> None:
        if self._rows is not None and (row := self._taken()):
            self._rows.append(row)

    def _end_paragraph(self) -> None:
        if text := self._taken():
            self.blocks.append(text)

    def _taken(self) -> str:
        text, self._text = " ".join("".join(self._text).split()), []
        return text
