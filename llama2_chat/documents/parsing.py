"""Reading a file in a process of its own, which may take only so much time, memory and output.

Files come from strangers, and a small one can keep a parser busy for hours, unpack to a terabyte, or crash it. What the
process says is believed no further than its form.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import IO, Any

from llama2_chat.documents.chunks import chunks_of, page_text
from llama2_chat.documents.texts import MAX_CHARACTERS, TOO_MUCH_TEXT
from llama2_chat.errors import Busy, ChatError
from llama2_chat.process import FROM_OUTSIDE, python_command, python_environment

PAGE_CPU_S = 8.0  # to open a file, and for each page; a page takes some ms
TOTAL_CPU_S = 300
SILENT_S = 60.0  # of a computer that is busy with other things
MEMORY_BYTES = 2**29  # of addresses
LINE_BYTES = 2**25  # a page
NICE = 10
TOO_LONG = "This file takes too long to be read."
BROKEN = "This file is broken, or too large to be read."
INTERRUPTED = "The process that reads it was ended from outside, or had no time to compute."


class Interrupted(Busy):
    """No limit of its own ended the process: that says little of the file."""


@dataclass(frozen=True)
class ParsedPage:
    number: int  # from 1
    pages: int  # of the file
    text: str
    chunks: tuple[str, ...]
    hidden: bool = False  # something on it can hardly be seen


def parse(file: IO[bytes], name: str, first: int = 1) -> Generator[ParsedPage, None, None]:
    """The pages of a file from number `first` on, as they are read. file: a real one, read from its beginning.

    Raises ChatError with a sentence for the visitor, Interrupted where another try may do. Leaving the iteration ends
    the process.
    """
    file.seek(0)
    command = [*python_command(f"{__name__}:parse_here"), name, str(first)]
    pipe, devnull, env = subprocess.PIPE, subprocess.DEVNULL, python_environment()
    process = subprocess.Popen(command, stdin=file, stdout=pipe, stderr=devnull, env=env)
    assert process.stdout is not None
    seen = 0
    try:
        while (line := _line(process)).endswith(b"\n"):
            said = _object(line)
            if "error" in said:
                raise ChatError(f"{said['error']:.300}")
            page = _page(said)
            seen += len(page.text)
            if seen > MAX_CHARACTERS:
                raise ChatError(TOO_MUCH_TEXT)
            yield page
        if status := process.wait():
            if -status in FROM_OUTSIDE:
                raise Interrupted(INTERRUPTED)
            raise ChatError(TOO_LONG if -status in _TIME_SIGNALS else BROKEN)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# None of them exists on Windows, where only SILENT_S holds.
_TIME_SIGNALS = {getattr(signal, name) for name in ("SIGPROF", "SIGXCPU") if hasattr(signal, name)}


def _line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line; b"" at the end. A process that is silent for too long, or says too much, is ended."""
    assert process.stdout is not None
    silent = threading.Event()

    def end() -> None:
        silent.set()
        process.kill()

    timer = threading.Timer(SILENT_S, end)
    timer.daemon = True
    timer.start()
    try:
        line = process.stdout.readline(LINE_BYTES)
    finally:
        timer.cancel()
    if silent.is_set():
        raise Interrupted(INTERRUPTED) if _TIME_SIGNALS else ChatError(TOO_LONG)
    if line and not line.endswith(b"\n") and len(line) == LINE_BYTES:
        raise ChatError(TOO_MUCH_TEXT)
    return line


def _object(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {"error": BROKEN}
    return said if isinstance(said, dict) else {"error": BROKEN}


def _page(said: dict[str, Any]) -> ParsedPage:
    return ParsedPage(
        int(said["page"]), int(said["pages"]), str(said["text"]), tuple(map(str, said["chunks"])), bool(said["hidden"])
    )


# ---- In the process ----


def parse_here() -> None:
    """What the process does: a file is its stdin, and its pages go out at stdout, a line of JSON each."""
    name, first = sys.argv[-2], int(sys.argv[-1])
    os.nice(NICE) if hasattr(os, "nice") else None
    _limit()
    try:
        for said in _said(name, first):
            sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
            sys.stdout.buffer.flush()
    except ChatError as error:
        _say_error(str(error))
    except MemoryError:
        _say_error(BROKEN)
    except Exception:  # parsers raise whatever they like at what is broken
        _say_error(BROKEN)


def _say_error(sentence: str) -> None:
    sys.stdout.buffer.write(json.dumps({"error": sentence}).encode() + b"\n")
    sys.stdout.buffer.flush()


def _said(name: str, first: int) -> Iterator[dict[str, Any]]:
    from llama2_chat.documents.readers import read

    _page_begins()
    reading = read(sys.stdin.buffer, name, first)
    for number, page in enumerate(reading.read, first):
        text = page_text(page.blocks)
        if len(text) > MAX_CHARACTERS:
            raise ChatError(TOO_MUCH_TEXT)
        chunks = chunks_of(page.blocks)
        yield {"page": number, "pages": reading.pages, "text": text, "chunks": chunks, "hidden": page.hidden}
        _page_begins()


def _limit() -> None:
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it has nothing to write
        resource.setrlimit(resource.RLIMIT_CPU, (TOTAL_CPU_S, TOTAL_CPU_S + 1))  # the second would be SIGKILL
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _page_begins() -> None:
    """From now on PAGE_CPU_S of computing end the process, be it within a library."""
    if hasattr(signal, "ITIMER_PROF"):
        signal.setitimer(signal.ITIMER_PROF, PAGE_CPU_S)
