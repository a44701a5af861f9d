"""How a conversation starts: a system prompt, examples that the model reads as turns, a reminder to each new question.

Examples and reminder are added each time a prompt is made, and to nothing that is kept. A file of presets is what
visitors export on the page, and what PRESETS names; in it, only the name of a preset is needed:

    {"presets": [{"name": "Short", "systemPrompt": "Today is {{today}}. Be brief.", "reminder": "(One sentence.)",
                  "examples": [{"question": "Where is Oslo?", "answer": "In Norway."}]}],
     "default": "Short"}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from llama2_chat.errors import ChatError, quoted
from llama2_chat.named_files import read_json
from llama2_chat.text import valid_unicode, written_day
from llama2_chat.types import Message

MOST_EXAMPLES = 20
LONGEST_NAME = 60  # characters
FORMAT, VERSION = "llama2-chat-presets", 1  # of the files that the page exports
REMEDY = "Correct the file, or start without PRESETS."
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # and ends of lines
VARIABLE = re.compile(r"\{\{ *(\w+) *\}\}")
VARIABLES: Mapping[str, Callable[[date], str]] = {"today": written_day}


def filled(text: str, today: date) -> str:
    """The text with what its variables stand for; unknown ones stay as they are."""
    return VARIABLE.sub(lambda found: VARIABLES.get(found[1], lambda _: found[0])(today), text)


@dataclass(frozen=True)
class Example:
    question: str
    answer: str


@dataclass(frozen=True)
class Guidance:
    """What the model reads beside the system prompt and what was said."""

    examples: tuple[Example, ...] = ()
    reminder: str = ""

    def filled(self, today: date) -> Guidance:
        examples = [Example(filled(each.question, today), filled(each.answer, today)) for each in self.examples]
        return Guidance(tuple(examples), filled(self.reminder, today))

    def added_to(self, messages: list[Message]) -> list[Message]:
        """The conversation as the model reads it: examples behind the system prompt, and the newest question reminded.

        messages: as they were said. Old questions have no reminder: each prompt holds it once.
        """
        systems = [message for message in messages if message["role"] == "system"]
        said = [message for message in messages if message["role"] != "system"]
        newest = max((i for i, message in enumerate(said) if message["role"] == "user"), default=None)
        if newest is not None:
            said[newest] = {**said[newest], "content": self.reminded(said[newest]["content"])}
        return [*systems, *self._turns(), *said]

    def reminded(self, question: str) -> str:
        return f"{question}\n\n{self.reminder.strip()}" if self.reminder.strip() else question

    def _turns(self) -> list[Message]:
        return [
            message
            for example in self.examples
            for message in (
                Message(role="user", content=example.question, is_example=True),
                Message(role="assistant", content=example.answer, is_example=True),
            )
        ]


NO_GUIDANCE = Guidance()


@dataclass(frozen=True)
class Preset:
    """How a conversation may start, under a name."""

    name: str
    system_prompt: str = ""
    guidance: Guidance = NO_GUIDANCE


@dataclass(frozen=True)
class Presets:
    """Those of an operator. default: with which conversations start."""

    all: tuple[Preset, ...] = ()
    default: Preset | None = None


NO_PRESETS = Presets()


def read_presets(path: Path) -> Presets:
    """What the file holds. Raises ChatError, with what to do, for a file that makes no sense."""
    read = read_json("PRESETS", path, REMEDY)
    try:
        return _presets(read)
    except _Wrong as error:
        raise ChatError(f"PRESETS {quoted(path)}: {error} {REMEDY}") from error


class _Wrong(Exception):
    """A sentence about one part of the file."""


def _presets(read: Any) -> Presets:
    entries = read.get("presets") if isinstance(read, dict) else None
    if not isinstance(entries, list) or not entries:
        raise _Wrong('it must hold {"presets": [{"name": ..., "systemPrompt": ...}]}.')
    if read.get("format", FORMAT) != FORMAT or read.get("version", VERSION) != VERSION:
        raise _Wrong(f'its "format" must be {FORMAT!r} and its "version" {VERSION}.')
    _check_keys(read, {"presets", "default", "format", "version"}, "the file")
    presets: dict[str, Preset] = {}
    for number, entry in enumerate(entries, 1):
        preset = _preset(entry, number)
        if preset.name in presets:
            raise _Wrong(f"there are two presets called {preset.name!r}.")
        presets[preset.name] = preset
    if "default" not in read:
        return Presets(tuple(presets.values()))
    default = read["default"]
    if not (isinstance(default, str) and default in presets):
        raise _Wrong(f'"default" must be the name of a preset; it was {default!r:.60}.')
    return Presets(tuple(presets.values()), presets[default])


def _preset(entry: Any, number: int) -> Preset:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not (isinstance(name, str) and name.strip() and len(name) <= LONGEST_NAME and not CONTROLS.search(name)):
        raise _Wrong(f"preset {number} needs a name: one line of at most {LONGEST_NAME} characters.")
    name = valid_unicode(name)
    _check_keys(entry, {"name", "systemPrompt", "examples", "reminder"}, f"preset {name!r}")
    examples = entry.get("examples", [])
    if not isinstance(examples, list) or len(examples) > MOST_EXAMPLES:
        raise _Wrong(f'"examples" of {name!r} must be a list of at most {MOST_EXAMPLES}.')
    return Preset(
        name,
        _text(entry, "systemPrompt", name),
        Guidance(tuple(_example(each, name) for each in examples), _text(entry, "reminder", name)),
    )


def _example(entry: Any, name: str) -> Example:
    is_whole = isinstance(entry, dict) and set(entry) == {"question", "answer"}
    if not is_whole or not all(isinstance(text, str) and text.strip() for text in entry.values()):
        raise _Wrong(f'each example of {name!r} must be {{"question": ..., "answer": ...}}, and neither empty.')
    return Example(valid_unicode(entry["question"]), valid_unicode(entry["answer"]))


def _text(entry: dict[str, Any], key: str, name: str) -> str:
    text = entry.get(key, "")
    if not isinstance(text, str):
        raise _Wrong(f'"{key}" of {name!r} must be text.')
    return valid_unicode(text)


def _check_keys(read: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := next((key for key in read if key not in known), None):
        raise _Wrong(f"{where} has {unknown!r:.60}, which nothing here reads.")
