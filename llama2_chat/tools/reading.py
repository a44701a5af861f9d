"""From a reply's text, piece by piece, to text and calls.

What may be the beginning of a call is held back until it is certain, and a call's closing is never shown as text. A
call that the reply breaks off is told apart from one that is whole: only whole ones are in `calls`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from llama2_chat.types import CallStyle, ToolCall


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Started:
    """The first of a call, which has its name and nothing else."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    index: int
    text: str


Delta = Text | Started | Arguments
STRUCTURE = re.compile(r'[{}\[\]"]')  # of JSON, outside its strings
QUOTED = re.compile(r'["\\]')  # within them


class CallReader:
    """One reply's text as it comes.

    names: of the tools that can be called; what looks like a call of another one is text.
    may_be_cut: asked as a call begins. If so, nothing of it is told until it is whole; else its name and its arguments
        are told as they come.
    must_call: whether the reply has to be a call: where it ends within what every call begins with, that is no text.
    """

    def __init__(
        self,
        style: CallStyle,
        names: Collection[str],
        may_be_cut: Callable[[], bool] = lambda: False,
        must_call: bool = False,
    ) -> None:
        self.calls: list[ToolCall] = []  # those that are whole, without ids
        self.text = ""
        self._style, self._names, self._may_be_cut, self._must_call = style, names, may_be_cut, must_call
        self._rest = ""  # read, and not yet certain
        self._read: Callable[[], bool] = self._beginning  # what comes next; whether that got any further
        self._told: list[Delta] = []
        self._hold = False
        self._held: list[Delta] = []  # of a call that is not yet whole
        self._name, self._arguments = "", ""
        self._depth, self._in_string, self._escaped = 0, False, False  # in the JSON of the arguments

    def read(self, piece: str) -> list[Delta]:
        """What has become certain."""
        self._rest += piece
        while self._read():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """What remains, at the reply's end: text that only looked like the beginning of a call."""
        is_cut_off = self._must_call and self._read == self._beginning
        if self._read in (self._beginning, self._in_text) and not is_cut_off:
            self._say(self._rest)
        self._rest = ""
        return self._take()

    def _take(self) -> list[Delta]:
        told, self._told = self._told, []
        return told

    # Each says whether there is more to read.

    def _beginning(self) -> bool:
        """Before anything but white space."""
        if not (text := self._rest.lstrip()):
            return False
        opening = self._style.opening
        if text.startswith(opening):
            self._rest, self._read = text[len(opening) :], self._in_name
            return True
        if opening.startswith(text):
            return False
        self._read = self._in_text if self._style.marker else self._in_last_text
        return True

    def _in_text(self) -> bool:
        """Text that a call may follow."""
        before, marker, after = self._rest.partition(self._style.marker)
        if marker:
            self._say(before.rstrip())
            self._rest, self._read = marker + after, self._at_marker
            return True
        certain = len(self._rest) - _overlap(self._rest, self._style.marker)
        blanks = len(self._rest[:certain]) - len(self._rest[:certain].rstrip())  # dropped where a call follows
        self._say(self._rest[: certain - blanks])
        self._rest = self._rest[certain - blanks :]
        return False

    def _at_marker(self) -> bool:
        opening = self._style.opening
        if self._rest.startswith(opening):
            self._rest, self._read = self._rest[len(opening) :], self._in_name
            return True
        if opening.startswith(self._rest):
            return False
        return self._is_text("")

    def _in_last_text(self) -> bool:
        self._say(self._rest)
        self._rest = ""
        return False

    def _in_name(self) -> bool:
        for name in self._names:
            if self._rest.startswith(written := name + self._style.middle):
                self._name, self._arguments = name, ""
                self._depth, self._in_string, self._escaped = 0, False, False
                self._hold = self._may_be_cut()
                self._tell(Started(len(self.calls), name))
                self._rest, self._read = self._rest[len(written) :], self._in_arguments
                return True
        if any((name + self._style.middle).startswith(self._rest) for name in self._names):
            return False
        return self._is_text(self._style.opening)

    def _in_arguments(self) -> bool:
        end = self._end_of_json()
        piece = self._rest[:end]
        if piece:
            self._arguments += piece
            self._tell(Arguments(len(self.calls), piece))
        self._rest = self._rest[len(piece) :]
        if end is not None:
            self._read = self._in_closing
        return end is not None

    def _end_of_json(self) -> int | None:
        """Where the arguments end in the rest, which is read once."""
        at, self._escaped = int(self._escaped and bool(self._rest)), self._escaped and not self._rest
        while found := (QUOTED if self._in_string else STRUCTURE).search(self._rest, at):
            at = found.end()
            match found[0]:
                case "\\":
                    self._escaped = at == len(self._rest)  # what it escapes is still to come
                    at += 1
                case '"':
                    self._in_string = not self._in_string
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        return None

    def _in_closing(self) -> bool:
        end = self._style.end
        if len(self._rest) < len(end):
            return False
        self._told += self._held
        self._held = []
        self.calls.append(ToolCall(id="", name=self._name, arguments=self._arguments))
        self._rest, self._read = self._rest[len(end) :], self._after_call
        return True

    def _after_call(self) -> bool:
        """Before another call, or what is then left unsaid: white space, as a rule."""
        next_one = (self._style.between or self._style.opening).removeprefix(self._style.end).lstrip(" \n,;")
        _, found, rest = self._rest.partition(next_one)
        if found:
            self._rest, self._read = rest, self._in_name
        return bool(found)

    def _is_text(self, before: str) -> bool:
        self._rest, self._read = before + self._rest, self._in_last_text
        return True

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self._told.append(Text(text))

    def _tell(self, delta: Delta) -> None:
        (self._held if self._hold else self._told).append(delta)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest beginning of the marker, short of all of it, that the text ends with."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
