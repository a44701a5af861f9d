"""PDF files, by PDFium. Runs only in the process that parsing.py starts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, BinaryIO

import pypdfium2
import pypdfium2.raw as pdfium

from llama2_chat.documents.readers import MAX_PAGES, Page, Reading
from llama2_chat.documents.texts import cleaned, paragraphs
from llama2_chat.errors import ChatError

TINY_POINTS = 2.0
WHITE = 250  # of 255, in each colour
LOOK_AT_EVERY = 5  # letters: what is hidden is longer, and a look at each would take longer than reading


def read_pdf(stream: BinaryIO, first: int) -> Reading:
    try:
        document = pypdfium2.PdfDocument(stream)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise ChatError("This PDF is encrypted. Save it without a password.") from error
        raise ChatError("This PDF is broken and cannot be opened.") from error
    if len(document) > MAX_PAGES:
        raise ChatError(f"This PDF has {len(document):,} pages. Up to {MAX_PAGES:,} can be read.")
    return Reading(len(document), _pages(document, first))


def _pages(document: Any, first: int) -> Iterator[Page]:
    for index in range(first - 1, len(document)):
        try:
            page = document[index]
            text_page = page.get_textpage()
        except pypdfium2.PdfiumError:
            yield Page([])  # one broken page spoils no others
            continue
        text = text_page.get_text_range().replace("\ufffe", "").replace("\x02", "")  # where a word is divided
        yield Page([*paragraphs(cleaned(text))], _hides(text_page))
        text_page.close()
        page.close()


def _hides(text_page: Any) -> bool:
    """Whether there are letters in white, or too small to be read."""
    box = pdfium.FS_RECTF()
    colour = [ctypes.c_uint() for _ in range(4)]
    for index in range(0, text_page.count_chars(), LOOK_AT_EVERY):
        if pdfium.FPDFText_GetUnicode(text_page, index) in (0, 10, 13, 32, 160):
            continue
        if pdfium.FPDFText_GetLooseCharBox(text_page, index, box) and 0 < abs(box.top - box.bottom) < TINY_POINTS:
            return True
        if pdfium.FPDFText_GetFillColor(text_page, index, *colour) and all(each.value >= WHITE for each in colour[:3]):
            return True
    return False
