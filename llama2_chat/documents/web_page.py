"""HTML files as a reader sees them: no scripts, no styles, tables in rows. Runs only in the process of parsing.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

from llama2_chat.documents.chunks import Block, Table
from llama2_chat.documents.readers import Page
from llama2_chat.documents.texts import paginated

UNSEEN = {"script", "style", "template", "noscript", "iframe", "object", "svg", "canvas", "select"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
INLINE = {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "em", "font", "i", "kbd", "mark", "q", "s", "small", "span"}
INLINE |= {"strong", "sub", "sup", "time", "u", "var", "wbr", "img", "label", "ins", "del"}
# What an element ends that was not closed, as browsers have it; only while these are hidden does it matter here.
ENDS: dict[str, set[str]] = {"li": {"li"}, "dt": {"dt", "dd"}, "dd": {"dt", "dd"}}
ENDS |= {"td": {"td", "th"}, "th": {"td", "th"}, "tr": {"tr", "td", "th"}}
UNCLOSED = {"p"}.union(*ENDS.values())
ENDS_P = {"address", "article", "aside", "blockquote", "details", "div", "dl", "fieldset", "figure", "footer", "form"}
ENDS_P |= {"h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "main", "menu", "nav", "ol", "p", "pre", "section"}
ENDS_P |= {"table", "ul"}
NOT_SHOWN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden")
HARDLY_SHOWN = re.compile(
    r"(?<![\w-])color\s*:\s*(white|#fff(fff)?)\b|font-size\s*:\s*0*[01](\.\d+)?(px|pt)|opacity\s*:\s*0(\.0\d*)?\s*(;|$)"
)


def read_html(text: str) -> Iterator[Page]:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    reader.end_tables()
    reader.end_paragraph()
    for blocks in paginated(reader.blocks):
        yield Page(blocks, reader.hidden)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.hidden = False
        self._text: list[str] = []
        self._rows: list[str] | None = None  # of the table that is open
        self._outer: list[tuple[list[str], list[str]]] = []  # rows and text so far of the tables around it
        self._unseen: list[str] = []  # open elements from the first on that is not shown

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end_unclosed(tag)
        style = next((value or "" for name, value in attrs if name == "style"), "").lower()
        if self._unseen or tag in UNSEEN or any(name == "hidden" for name, _ in attrs) or NOT_SHOWN.search(style):
            if tag not in VOID:
                self._unseen.append(tag)
            return
        self.hidden = self.hidden or bool(HARDLY_SHOWN.search(style))
        if tag == "table":
            self._start_table()
        elif tag == "tr":
            self._end_row()
        elif self._rows is not None and tag in ("td", "th"):
            self._text.append(" | " if "".join(self._text).strip() else "")
        elif tag not in INLINE and self._rows is None:
            self.end_paragraph()
        else:
            self._text.append(" " if tag not in INLINE else "")

    def handle_endtag(self, tag: str) -> None:
        if self._unseen:
            if tag in self._unseen:  # what was not closed in it closes with it
                while self._unseen.pop() != tag:
                    pass
            elif self._ends_around(tag):
                self._unseen.clear()
                self.handle_endtag(tag)
        elif tag == "table":
            self._end_table()
        elif tag == "tr":
            self._end_row()
        elif tag not in INLINE and self._rows is None:
            self.end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self._text.append(data)

    def end_tables(self) -> None:
        while self._rows is not None:
            self._end_table()

    def _ends_around(self, tag: str) -> bool:
        """Whether it ends what is around the hidden elements, none of which needs an end of its own."""
        if tag in INLINE | VOID | UNCLOSED - {"tr"} or self._unseen[0] not in UNCLOSED:
            return False
        return (UNCLOSED | INLINE).issuperset(self._unseen)

    def _end_unclosed(self, tag: str) -> None:
        """End the hidden elements that this one begins after."""
        ended = ENDS.get(tag, set()) | ({"p"} if tag in ENDS_P else set())
        end = len(self._unseen)
        for place in reversed(range(len(self._unseen))):
            if self._unseen[place] in ended:
                end = place
            elif self._unseen[place] not in INLINE | {"p"}:
                break
        del self._unseen[end:]

    def _start_table(self) -> None:
        if self._rows is None:
            self.end_paragraph()
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

    def end_paragraph(self) -> None:
        if text := self._taken():
            self.blocks.append(text)

    def _taken(self) -> str:
        text, self._text = " ".join("".join(self._text).split()), []
        return text
