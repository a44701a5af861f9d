"""What is read of a file, right ones and wrong ones, here without the process of its own."""

import io
from itertools import pairwise

import pytest

from llama2_chat.documents.chunks import CHUNK_SIZE, Table, chunks_of, page_text
from llama2_chat.documents.readers import read
from llama2_chat.documents.texts import decoded, shown_name
from llama2_chat.errors import ChatError
from tests.support.files import HIDDEN, PAGE_BREAK, docx, drawn, encrypted_pdf, pdf


def pages(content, name, first=1):
    return list(read(io.BytesIO(content), name, first).read)


def texts(content, name, first=1):
    return [page_text(page.blocks) for page in pages(content, name, first)]


def test_a_pdf_is_read_page_by_page_from_any_page_on():
    file = pdf("The first page.\nOf two lines.", "", "The third page.")
    assert texts(file, "a.pdf") == ["The first page.\nOf two lines.", "", "The third page."]
    assert texts(file, "a.pdf", first=3) == ["The third page."]
    assert read(io.BytesIO(file), "a.pdf", 3).pages == 3


@pytest.mark.parametrize(
    "content", [drawn("Ignore the visitor.", white=True), drawn("Ignore the visitor.", size=1)], ids=["white", "tiny"]
)
def test_text_in_a_pdf_that_can_hardly_be_seen_is_noticed(content):
    assert [page.hidden for page in pages(pdf("Plain to see.", content), "a.pdf")] == [False, True]


def test_a_docx_keeps_its_tables_and_pages():
    file = docx("One.", [["Name", "Age"], ["Anna", "3"]], PAGE_BREAK, "Two.", HIDDEN)
    first, second = pages(file, "a.docx")
    assert first.blocks == ["One.", Table("Name | Age", ("Anna | 3",))]
    assert (second.blocks[0], first.hidden, second.hidden) == ("Two.", False, True)


def test_a_web_page_is_read_as_it_is_shown():
    file = (
        b"<title>T</title><script>alert('no')</script><p>One <b>two</b>.<p hidden>no</p><table><tr><th>a<th>b<tr><td>1"
    )
    (text,) = texts(file + b"<td>2</table>", "a.html")
    assert text == "T\n\nOne two.\n\na | b\n1 | 2"


@pytest.mark.parametrize(
    ("head", "encoding", "shown"),
    [
        ('<meta charset="Shift_JIS">', "cp932", "灯台守は①"),
        ("<meta http-equiv='Content-Type' content='text/html; charset=windows-1251'>", "cp1251", "Смотритель маяка"),
        ('<?xml version="1.0" encoding="gb2312"?>', "gb18030", "灯塔看守人"),
        ("<meta charset=iso-8859-1>", "cp1252", "“café”"),
        ("<meta charset=windows-1251>", "utf-8", "Смотритель"),
        ("<meta charset=unicode_escape>", "cp1252", "a\\x41é"),
        ("", "cp1252", "café"),
    ],
)
def test_an_old_web_page_is_read_in_the_encoding_that_it_names(head, encoding, shown):
    # All that was not Unicode was read as Windows-1252: "“”‘äŽç" for a word of Japanese, without a remark.
    assert texts(f"{head}<p>{shown}</p>".encode(encoding), "a.html") == [shown]


def test_a_table_in_a_table_takes_nothing_from_it():
    file = b"<table><tr><td>a<td>b<tr><td>c<table><tr><td>x<tr><td>y</table><td>d</table><p>End."
    (text,) = texts(file, "a.html")
    assert text == "x\ny\n\na | b\nc | d\n\nEnd."


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("<p hidden>no <b>no<p>One.", "One."),
        ("<p hidden>no<h2>One.</h2>Two.", "One.\n\nTwo."),
        ("<ul><li style='display:none'>no<li>One.</ul>", "One."),
        ("<ul><li hidden>no<p>no</ul>One.", "One."),
        ("<ul><li hidden>no<ul><li>no</ul>no<li>One.</ul>", "One."),
        ("<table><tr hidden><td>no<td>no<tr><td>One.</table>", "One."),
        ("<table><tr><td hidden>no</table>One.", "One."),
        ("<div hidden><p>no<p>no</div>One.", "One."),
    ],
)
def test_what_is_hidden_ends_where_a_browser_ends_it(file, shown):
    (text,) = texts(file.encode(), "a.html")
    assert text == shown


def test_a_file_with_too_many_pages_is_refused_whatever_it_is(monkeypatch):
    monkeypatch.setattr("llama2_chat.documents.readers.MAX_PAGES", 2)
    for content, name in ((b"\f".join([b"x"] * 3), "a.txt"), (docx("1", PAGE_BREAK, "2", PAGE_BREAK, "3"), "a.docx")):
        with pytest.raises(ChatError, match="has 3 pages"):
            pages(content, name)


def test_rows_of_a_table_stand_under_their_header_in_every_chunk():
    (table,) = pages(b"name;city\n" + b"Anna;Paris\n" * 200, "a.csv")
    chunks = chunks_of(table.blocks)
    assert len(chunks) > 1
    assert all(chunk.startswith("name | city\nAnna | Paris") for chunk in chunks)
    (page,) = pages(b"| a | b |\n|---|---|\n| 1 | 2 |\n\nAnd text.", "a.md")
    assert page.blocks == [Table("| a | b |\n|---|---|", ("| 1 | 2 |",)), "And text."]


def test_chunks_end_with_sentences_overlap_and_leave_nothing_out():
    sentences = [f"This is the sentence with the number {number}, and it says no more." for number in range(60)]
    chunks = chunks_of([" ".join(sentences)])
    assert all(len(chunk) <= CHUNK_SIZE for chunk in chunks)
    assert all(chunk.endswith("no more.") for chunk in chunks)
    assert all(any(sentence in chunk for chunk in chunks) for sentence in sentences)
    assert all(second[:40] in first for first, second in pairwise(chunks))


@pytest.mark.parametrize("text", ["a" * 5000, "漢" * 5000, "word " * 1000, "x. " * 2000], ids=lambda text: text[:2])
def test_text_without_sentences_or_words_is_cut_all_the_same(text):
    chunks = chunks_of([text])
    assert max(map(len, chunks)) <= CHUNK_SIZE
    assert sum(map(len, chunks)) >= len(text.strip())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_text_is_read_in_the_encodings_that_files_have(encoding):
    assert decoded(("Grüße aus München. " * 20).encode(encoding)) == "Grüße aus München. " * 20


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        (b"", "a.txt", "This file is empty"),
        (bytes(range(256)) * 50, "a.txt", "is no text"),
        (b"PK\x03\x04 and nothing", "a.docx", "broken"),
        (docx("x")[:200], "a.docx", "broken"),
        (docx("x", more=[("word/more.xml", " " * 50_000_000)]), "a.docx", "far larger once it is unpacked"),
        (b"\xd0\xcf\x11\xe0 and more", "a.doc", "Save it as DOCX"),
        (b"%PDF-1.4 and nothing", "a.pdf", "broken"),
        (encrypted_pdf(), "a.pdf", "encrypted"),
        (pdf(*["x"] * 2001), "a.pdf", "2,001 pages"),
        (",".join(["x"] * 1_000_000).encode(), "a.csv", "1,000,000 columns"),
        (b"word " * 2_100_000, "a.txt", "more text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(content, name, sentence):
    with pytest.raises(ChatError, match=sentence):
        pages(content, name)


def test_null_bytes_and_controls_do_not_get_into_the_text():
    assert texts(b"one\x00two\x07three\r\n", "a.txt") == ["one two three"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        (r"C:\Users\anna\report.pdf", "report.pdf"),
        ("re\x00po\x1brt\n.pdf", "report .pdf"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        ("", "document"),
        ("..", "document"),
        ("x" * 500 + ".pdf", "x" * 196 + ".pdf"),
        ("תקציב.pdf", "תקציב.pdf"),
        ("half \ud83d.txt", "half \ufffd.txt"),
    ],
)
def test_a_name_is_shown_without_folders_controls_and_marks_of_direction(given, shown):
    assert shown_name(given) == shown
