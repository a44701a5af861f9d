"""What stands in a file: PDF, DOCX, HTML, CSV, Markdown or plain text, as pages of paragraphs and tables.

Runs only in the process that parsing.py starts: what is read here comes from strangers. Raises ChatError with a
sentence for what cannot be read; a broken file may raise anything else.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from llama2_chat.documents.chunks import Block, Table
from llama2_chat.documents.texts import NOT_TEXT, cleaned, decoded, paginated, paragraphs, web_encoding
from llama2_chat.errors import ChatError

MAX_PAGES = 2000
MAX_COLUMNS = 1000
MAX_XML_BYTES = 40_000_000  # of a DOCX once it is unpacked; what lxml makes of it is ten times larger
MAX_UNPACKED_BYTES = 200_000_000  # with its pictures
OLD_OFFICE = b"\xd0\xcf\x11\xe0"
DELIMITERS = ",;\t|"
WEB_PAGES = ("html", "htm", "xhtml")


@dataclass(frozen=True)
class Page:
    blocks: list[Block]
    hidden: bool = False  # something on it can hardly be seen


@dataclass
class Reading:
    """How many pages a file has, and its pages in order from `first` on, which are read one by one."""

    pages: int
    read: Iterator[Page] = field(repr=False)


def read(stream: BinaryIO, name: str, first: int) -> Reading:
    """The pages of a file. stream: seekable; first: the number of the page to begin with, from 1."""
    head = stream.read(1024)
    stream.seek(0)
    ending = name.rpartition(".")[2].lower()
    if not head:
        raise ChatError("This file is empty.")
    if b"%PDF-" in head:
        from llama2_chat.documents.pdf import read_pdf  # a library that others do not need

        return read_pdf(stream, first)
    if head.startswith(b"PK\x03\x04"):
        return _listed(_docx_pages(stream), first)
    if head.startswith(OLD_OFFICE):
        raise ChatError("This is a file of an old Word, or an encrypted one. Save it as DOCX without a password.")
    raw = stream.read()
    text = decoded(raw, web_encoding(raw)) if ending in WEB_PAGES else decoded(raw)
    return _listed(list(_text_pages(text, ending)), first)


def _listed(pages: list[Page], first: int) -> Reading:
    if len(pages) > MAX_PAGES:
        raise ChatError(f"This file has {len(pages):,} pages. Up to {MAX_PAGES:,} can be read.")
    return Reading(len(pages), iter(pages[first - 1 :]))


def _text_pages(text: str, ending: str) -> Iterator[Page]:
    match ending:
        case _ if ending in WEB_PAGES:
            from llama2_chat.documents.web_page import read_html

            yield from read_html(text)
        case "csv" | "tsv":
            yield from (Page(blocks) for blocks in paginated([_csv_table(text)]))
        case "md" | "markdown":
            yield from (Page(blocks) for blocks in paginated(map(_markdown_block, paragraphs(text))))
        case _:
            yield from (Page(blocks) for blocks in paginated(paragraphs(text)))


def _markdown_block(paragraph: str) -> Block:
    """A paragraph, or a table if its second line rules it off from its header."""
    lines = paragraph.splitlines()
    if len(lines) > 2 and "|" in lines[0] and re.fullmatch(r"[\s|:-]*-[\s|:-]*", lines[1]):
        return Table(f"{lines[0]}\n{lines[1]}", tuple(lines[2:]))
    return paragraph


def _csv_table(text: str) -> Table:
    first = text.partition("\n")[0]
    rows = csv.reader(text.splitlines(), delimiter=max(DELIMITERS, key=first.count))
    try:
        written = [_row(row) for row in rows if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ChatError(f"This table cannot be read: {error}.") from error
    return Table(written[0], tuple(written[1:])) if written else Table("", ())


def _row(cells: list[str]) -> str:
    if len(cells) > MAX_COLUMNS:
        raise ChatError(f"This table has {len(cells):,} columns. Up to {MAX_COLUMNS:,} can be read.")
    return " | ".join(" ".join(cell.split()) for cell in cells)


# ---- DOCX ----


def _docx_pages(stream: BinaryIO) -> list[Page]:
    _check_zip(stream)
    from docx import Document

    body = Document(stream).element.body
    pages: list[Page] = []
    blocks: list[Block] = []
    hidden, has_breaks = False, False
    for element in body.iterchildren():
        if _breaks(element):
            has_breaks = True
            pages.append(Page(blocks, hidden))
            blocks, hidden = [], False
        hidden = hidden or _hides(element)
        if block := _docx_block(element):
            blocks.append(block)
    pages.append(Page(blocks, hidden))
    if has_breaks:
        return pages
    return [Page(each, pages[0].hidden) for each in paginated(pages[0].blocks)]


def _check_zip(stream: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ChatError("This file is broken: it begins as a DOCX, and does not go on as one.") from error
    if not any(entry.filename == "word/document.xml" for entry in entries):
        raise ChatError(NOT_TEXT)
    if any(entry.flag_bits & 1 for entry in entries):
        raise ChatError("This file is encrypted. Save it without a password.")
    xml = sum(entry.file_size for entry in entries if entry.filename.endswith((".xml", ".rels")))
    if xml > MAX_XML_BYTES or sum(entry.file_size for entry in entries) > MAX_UNPACKED_BYTES or len(entries) > 10_000:
        raise ChatError("This file is far larger once it is unpacked than a document may be.")
    stream.seek(0)


W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


def _breaks(element) -> bool:  # type: ignore[no-untyped-def]  # of lxml, which publishes no types
    """Whether a page begins in it."""
    return next(element.iter(f"{W}lastRenderedPageBreak"), None) is not None or any(
        each.get(f"{W}type") == "page" for each in element.iter(f"{W}br")
    )


def _hides(element) -> bool:  # type: ignore[no-untyped-def]
    """Whether something in it is white, tiny or marked as hidden."""
    return (
        any(each.get(f"{W}val", "").upper() == "FFFFFF" for each in element.iter(f"{W}color"))
        or any(each.get(f"{W}val", "99") in ("1", "2", "3", "4") for each in element.iter(f"{W}sz"))  # half points
        or any(each.get(f"{W}val") not in ("0", "false") for each in element.iter(f"{W}vanish"))
    )


def _docx_block(element) -> Block | None:  # type: ignore[no-untyped-def]
    if element.tag == f"{W}tbl":
        rows = [_row([_docx_text(cell) for cell in row.iter(f"{W}tc")]) for row in element.iter(f"{W}tr")]
        return Table(rows[0], tuple(rows[1:])) if rows else None
    return _docx_text(element) or None


def _docx_text(element) -> str:  # type: ignore[no-untyped-def]
    pieces = []
    for each in element.iter(f"{W}t", f"{W}tab", f"{W}br", f"{W}p"):
        pieces.append({f"{W}t": each.text or "", f"{W}tab": "\t"}.get(each.tag, "\n"))
    return cleaned("".join(pieces)).strip()
