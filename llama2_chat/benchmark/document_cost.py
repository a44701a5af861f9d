"""What reading and encoding documents takes: until 200 pages can be searched, in time and memory, and from an answer
meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import io
import pydoc_data.topics
import statistics
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pypdfium2
import pypdfium2.raw as pdfium

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.local_model import load
from llama2_chat.documents.library import Library
from llama2_chat.documents.meaning import encode_next
from llama2_chat.documents.parsing import parse
from llama2_chat.documents.search import search
from llama2_chat.documents.store import Shelf
from llama2_chat.embeddings import make_embedder
from llama2_chat.errors import ChatError
from llama2_chat.settings import Settings
from llama2_chat.types import Embedder, Message, SamplingParams
from model import ChatModel

PAGES, LINES, COLUMNS = 200, 48, 90
ANSWER_TOKENS = 150
ROUNDS = 4  # the first warms up
MEMORY_EVERY_S = 0.05
OWNER = "login benchmark"
QUESTIONS = 20


def measure() -> Iterator[Figures]:
    """With EMBEDDINGS= also of an encoder. Ends the program with a sentence if it cannot be loaded."""
    file, settings = report(), Settings.read([])
    yield {"pages": PAGES, "MB": len(file) / 1e6}
    yield reading(file)
    if not settings.embeddings:
        yield beside_an_answer(load([]), file)
        return
    with contextlib.closing(make_embedder(settings)) as embedder:
        try:
            embedder.check()
        except ChatError as error:
            sys.exit(error.detail)
        yield encoding(file, embedder)
        yield beside_an_answer(load([]), file, embedder)


def report() -> bytes:
    """A PDF whose pages are full of Python's language reference."""
    prose = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    lines = [line.encode("ascii", "ignore").decode() for line in textwrap.wrap(prose, COLUMNS)]
    pdf, out = pypdfium2.PdfDocument.new(), io.BytesIO()
    for number in range(PAGES):
        page = pdf.new_page(595, 842)
        for row in range(LINES):
            line = pdfium.FPDFPageObj_NewTextObj(pdf, b"Helvetica", 9)
            text = ctypes.create_string_buffer(f"{lines[(number * LINES + row) % len(lines)]}\0".encode("utf-16-le"))
            pdfium.FPDFText_SetText(line, ctypes.cast(text, pdfium.FPDF_WIDESTRING))
            pdfium.FPDFPageObj_Transform(line, 1, 0, 0, 1, 50, 800 - 16 * row)
            pdfium.FPDFPage_InsertObject(page, line)
        page.gen_content()
    pdf.save(out)
    return out.getvalue()


def reading(file: bytes) -> Figures:
    """Seconds by the clock and of computing until all can be searched, and the most memory that it took on top."""
    before, began = _computed_s(), time.perf_counter()
    with _memory() as most, _reading(file) as done:
        done.wait()
        seconds = time.perf_counter() - began
    return {
        "until searchable, s": seconds,
        "of computing, s": _computed_s() - before,
        "most memory on top, MB": most[0] / 1e6,
    }


def encoding(file: bytes, embedder: Embedder) -> Figures:
    """Seconds by the clock until all chunks have vectors, once they are read, and of a question by its meaning."""
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(Path(folder) / "copy.sqlite", embedder)
        id = shelf.add(io.BytesIO(file), "a.pdf", "user_data").id
        with tempfile.TemporaryFile() as original:
            original.write(file)
            for page in parse(original, "a.pdf"):
                shelf.add_page(id, page)
        shelf.finish(id)
        began = time.perf_counter()
        while encode_next(embedder, shelf, id):
            pass
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(QUESTIONS):
            search(shelf, "How are names bound in a nested function?", [id])
        a_question = (time.perf_counter() - began) / QUESTIONS
    memory = sum(map(_resident, psutil.Process().children()))
    return {
        "until found by meaning, s": seconds,
        "a question, ms": 1000 * a_question,
        "memory of the encoder, MB": memory / 1e6,
    }


def beside_an_answer(chat: ChatModel, file: bytes, embedder: Embedder | None = None) -> Figures:
    """Tokens/s of one answer alone, and beside documents that are read and encoded, one round after the other."""
    rounds = []
    for _ in range(ROUNDS):
        alone = _tokens_per_s(chat)
        with _reading(file, embedder):
            rounds.append((alone, _tokens_per_s(chat)))
    alone, beside = (statistics.median(speeds) for speeds in zip(*rounds[1:], strict=True))
    ratio = statistics.median(beside / alone for alone, beside in rounds[1:])
    return {"tokens/s": alone, "tokens/s while documents are read": beside, "ratio": ratio}


@contextlib.contextmanager
def _reading(file: bytes, embedder: Embedder | None = None) -> Iterator[threading.Event]:
    """Copies of the file are read until the end; the event says that the first has been."""
    with tempfile.TemporaryDirectory() as folder:
        library, done, over = Library(Path(folder), embedder), threading.Event(), threading.Event()
        shelf = library.shelf(OWNER)
        ids = [library.add(OWNER, io.BytesIO(file), "a.pdf", "user_data").id]

        def watch() -> None:
            while not over.wait(0.01):
                if shelf.get(ids[-1]).state != "waiting":
                    done.set()
                    copy = file + b"\n%" + str(len(ids)).encode()
                    ids.append(library.add(OWNER, io.BytesIO(copy), "a.pdf", "user_data").id)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield done
        finally:
            over.set()
            watcher.join()
            library.close()


def _computed_s() -> float:
    """Of this process and those that it has started and that have ended."""
    times = psutil.Process().cpu_times()
    return times.user + times.system + times.children_user + times.children_system


@contextlib.contextmanager
def _memory() -> Iterator[list[int]]:
    """The most bytes that this process and those that it started have on top of what it had at first."""
    most, over, process = [0], threading.Event(), psutil.Process()
    first = process.memory_info().rss

    def watch() -> None:
        while not over.wait(MEMORY_EVERY_S):
            most[0] = max(most[0], sum(map(_resident, [process, *process.children()])) - first)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _tokens_per_s(chat: ChatModel) -> float:
    messages = [Message(role="user", content="Print the first 500 prime numbers.")]
    with chat.stream_reply(messages, SamplingParams(temperature=0, max_new_tokens=ANSWER_TOKENS)) as reply:
        "".join(reply)
    return reply.timing.tokens_per_second or 0.0
