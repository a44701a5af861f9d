"""Where in a JSON text an answer stands, byte by byte. Of text that llguidance has let pass, so nothing is checked."""

from __future__ import annotations

MAX_DIGITS = 17  # of a number: a double has no more
MAX_EXPONENT_DIGITS = 2  # of e+308 some are infinite when they are read
DIGITS = frozenset(b"0123456789")
IN_NUMBERS = DIGITS | frozenset(b".+-eE")


class JsonState:
    def __init__(self) -> None:
        self.quotes = 0  # that began or ended a string so far
        self.depth = 0  # brackets and braces that are open
        self.digits = 0  # of the number that is being written, before its exponent
        self.exponent_digits: int | None = None  # of the same; None before there is an exponent
        self._escaped = False

    @property
    def in_string(self) -> bool:
        return self.quotes % 2 == 1

    @property
    def digits_left(self) -> int | None:
        """How many more the number may have that is being written; None if there is none."""
        if self.exponent_digits is not None:
            return max(0, MAX_EXPONENT_DIGITS - self.exponent_digits)
        return max(0, MAX_DIGITS - self.digits) if self.digits else None

    def feed(self, text: bytes) -> None:
        for byte in text:
            if self.in_string:
                self._in_string(byte)
            else:
                self._outside(byte)

    def _in_string(self, byte: int) -> None:
        if self._escaped:
            self._escaped = False
        elif byte == ord("\\"):
            self._escaped = True
        elif byte == ord('"'):
            self.quotes += 1

    def _outside(self, byte: int) -> None:
        if byte in DIGITS:
            if self.exponent_digits is None:
                self.digits += 1
            else:
                self.exponent_digits += 1
        elif self.digits and byte in b"eE":
            self.exponent_digits = 0
        elif byte not in IN_NUMBERS:
            self.digits, self.exponent_digits = 0, None
        if byte == ord('"'):
            self.quotes += 1
        elif byte in b"[{":
            self.depth += 1
        elif byte in b"]}":
            self.depth -= 1
