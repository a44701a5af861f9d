"""From bytes to text, from a file's name to one that can be shown, and from a long text to pages."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator

from llama2_chat.documents.chunks import Block, Table
from llama2_chat.errors import ChatError
from llama2_chat.text import valid_unicode

PAGE_SIZE = 3000  # letters, of what has no pages of its own
LONGEST_NAME = 200
OLD_ENCODING = "cp1252"  # of a file in none of Unicode's that names none
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Control characters and half surrogates; tabs, line feeds and form feeds are layout.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
MAX_CHARACTERS = 10_000_000  # of a file's text
TOO_MUCH_TEXT = f"This file holds more text than the {MAX_CHARACTERS:,} characters that can be searched."
NOT_TEXT = "This file is no text, and neither PDF nor DOCX. Those, TXT, Markdown, CSV and HTML can be read."


# What the web means by names of encodings, where Python means something else, or nothing.
WEB_ENCODINGS = {
    **{"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252", "iso-8859-9": "cp1254"},
    **{"shift_jis": "cp932", "shift-jis": "cp932", "x-sjis": "cp932", "euc-kr": "cp949", "ks_c_5601-1987": "cp949"},
    **{"windows-874": "cp874", "gb2312": "gb18030", "gbk": "gb18030"},
}
OTHER_ENCODINGS = re.compile(r"windows-125[0-8]|iso-8859-(?:[2-8]|1[03-6])|koi8-[ru]|euc-jp|gb18030|big5(?:-hkscs)?")
CHARSET = re.compile(rb"""<(?:meta\b[^>]*?\bcharset|\?xml\b[^>]*?\bencoding)\s*=\s*["']?\s*([\w-]+)""", re.IGNORECASE)
HEAD_BYTES = 4096  # of a web page, in which it names its encoding; browsers look at 1,024


def web_encoding(raw: bytes) -> str:
    """The encoding that a web page names, as Python calls it; Windows-1252 if it names none that is known."""
    found = CHARSET.search(raw[:HEAD_BYTES])
    name = found[1].decode("ascii", "replace").lower() if found else ""
    return WEB_ENCODINGS.get(name) or (name if OTHER_ENCODINGS.fullmatch(name) else OLD_ENCODING)


def decoded(raw: bytes, old: str = OLD_ENCODING) -> str:
    """The text of a file in UTF-8, UTF-16, UTF-32 or an old encoding. Raises ChatError for what is no text."""
    encoding = next((name for bom, name in BOMS if raw.startswith(bom)), None) or _without_bom(raw)
    try:
        text = raw.decode(encoding, "strict" if encoding == "utf-8" else "replace")
    except UnicodeDecodeError:
        text = raw.decode(old, "replace")
    if len(text) > MAX_CHARACTERS:
        raise ChatError(TOO_MUCH_TEXT)
    if len(UNPRINTABLE.findall(text)) > len(text) / 100 + 10:
        raise ChatError(NOT_TEXT)
    return cleaned(text)


def _without_bom(raw: bytes) -> str:
    """UTF-16 where nearly every second byte is zero, as it is in European languages."""
    start = raw[:4096]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if odd > len(start) / 4 and even < odd / 4:
        return "utf-16-le"
    return "utf-16-be" if even > len(start) / 4 and odd < even / 4 else "utf-8"


def cleaned(text: str) -> str:
    """Without what cannot be printed, and with line feeds only."""
    text = valid_unicode(text.replace("\r\n", "\n").replace("\r", "\n"))
    return UNPRINTABLE.sub(" ", text)


def shown_name(name: str) -> str:
    """A file's name for people, which is never used as a path: without folders, controls and marks of direction."""
    last = re.split(r"[/\\]", valid_unicode(name))[-1]
    letters = "".join(" " if letter.isspace() else letter for letter in last)
    printable = "".join(letter for letter in letters if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co"))
    name = " ".join(printable.split()).strip(". ") or "document"
    stem, dot, ending = name.rpartition(".")
    if len(name) <= LONGEST_NAME or not dot or len(ending) > 10:
        return name[:LONGEST_NAME]
    return f"{stem[: LONGEST_NAME - len(ending) - 1]}.{ending}"


def paragraphs(text: str) -> list[str]:
    return [paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def paginated(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Pages of about PAGE_SIZE letters; a form feed begins one, too."""
    page: list[Block] = []
    length = 0
    for block in _small(blocks):
        if page and (length + _length(block) > PAGE_SIZE or block == "\f"):
            yield page
            page, length = [], 0
        if block != "\f":
            page.append(block)
            length += _length(block)
    if page:
        yield page


def _small(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same in blocks that fit on a page."""
    for block in blocks:
        if isinstance(block, Table):
            yield from _small_tables(block)
            continue
        for number, part in enumerate(block.split("\f")):
            if number:
                yield "\f"
            yield from _pieces(part)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PAGE_SIZE:
        least, most = start + PAGE_SIZE // 2, start + PAGE_SIZE
        end = max(text.rfind(mark, least, most) for mark in "\n. ") + 1 or most
        yield text[start:end]
        start = end
    if text[start:].strip():
        yield text[start:]


def _small_tables(table: Table) -> Iterator[Table]:
    rows: list[str] = []
    length = len(table.header)
    for row in table.rows:
        if rows and length + len(row) > PAGE_SIZE:
            yield Table(table.header, tuple(rows))
            rows, length = [], len(table.header)
        rows.append(row)
        length += len(row)
    yield Table(table.header, tuple(rows))


def _length(block: Block) -> int:
    return len(block.text) if isinstance(block, Table) else len(block)
