"""Text as it really arrives: half characters, many lines, long numbers; and days in words. Only the standard library is
used here."""

from __future__ import annotations

from datetime import date

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def valid_unicode(text: str) -> str:
    """The text as UTF-8 can hold it: two surrogates that form a pair are their character, a lone one is U+FFFD.

    Browsers and JSON (`"\\ud83d"`) can send halves of characters, which no tokenizer, file or HTTP body takes.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or this computer's. PyTorch has a class for a GPU's; Triton, cuBLAS and the
    driver only say so."""
    said = str(error).lower()
    of_gpu = type(error).__name__ == "OutOfMemoryError" or "out of memory" in said or "alloc_failed" in said
    return of_gpu or is_out_of_host_memory(error)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether this computer's memory ran out. PyTorch says so in a RuntimeError, in other words on Windows."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "can't allocate memory" in said or "not enough memory" in said


def first_line(error: object) -> str:
    """The first line of an error's text, without a full stop; the error's class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().removesuffix(".") if lines else type(error).__name__


def written_day(day: date) -> str:
    """As in "Monday, 3 March 2025": strftime would write the names in the language of the operator's machine."""
    return f"{DAYS[day.weekday()]}, {day.day} {MONTHS[day.month - 1]} {day.year}"
