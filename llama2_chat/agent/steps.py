"""How a model says what it does next, {"action": …, "action_input": …}: written, held by a grammar, read as it comes.

The action is a tool's name, with the tool's input, or ANSWER, with the text of the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llama2_chat.agent.tool import Tool
from llama2_chat.text import valid_unicode
from llama2_chat.types import GrammarSpec

ANSWER = "answer"
HEADER = re.compile(r'\s*\{\s*"action"\s*:\s*"([^"\\]*)"\s*,\s*"action_input"\s*:\s*(?=\S)')
# What a JSON string holds, in whole characters and escapes.
CONTENT = re.compile(r'(?:[^"\\]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+')
HALF_CHARACTER = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}$")


def grammar(tools: Iterable[Tool]) -> GrammarSpec:
    """The next step calls one of the tools, or answers. Raises BadGrammar if their schemas are too long."""
    inputs = {**{tool.name: tool.input_schema for tool in tools}, ANSWER: {"type": "string", "minLength": 1}}
    return GrammarSpec("json_schema", json.dumps({"anyOf": [_schema(*step) for step in inputs.items()]}))


def _schema(action: str, input: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"action": {"const": action}, "action_input": input},
        "required": ["action", "action_input"],
        "additionalProperties": False,
    }


def write(action: str, input: Any) -> str:
    """A step as the grammar has it."""
    return json.dumps({"action": action, "action_input": input}, ensure_ascii=False)


class StepReader:
    """Reads one step while a model writes it.

    begun: what of it there is already. text: all that has come. action: as soon as it is known; None to the end for
    what is no step, which a model may write that is held to no grammar. is_whole: of an answer, whether it has ended.
    """

    def __init__(self, begun: str = "") -> None:
        self.text = ""
        self.action: str | None = None
        self.is_whole = False
        self._read = 0  # where the part of the answer begins that has not been handed out
        self.feed(begun)

    def feed(self, piece: str) -> str:
        """Take more of the text; what of the answer has become certain with it."""
        self.text += piece
        if self.action is None and (header := HEADER.match(self.text)):
            self.action, self._read = header[1], header.end()
            if self.action == ANSWER:
                self._read += 1  # the quotation mark, which a JSON string begins with
        return self._more() if self.action == ANSWER else ""

    def _more(self) -> str:
        content = CONTENT.match(self.text, self._read)
        assert content  # it matches nothing, too
        escaped = content[0]
        self.is_whole = self.text.startswith('"', content.end())
        if not self.is_whole:  # then the other half may follow
            escaped = HALF_CHARACTER.sub("", escaped)
        self._read += len(escaped)
        return valid_unicode(json.loads(f'"{escaped}"', strict=False))

    def call(self) -> tuple[str, Any] | None:
        """The tool's name and its input, once all is read; None for an answer and for a step that is not whole."""
        try:
            step = json.loads(self.text)
            action, input = step["action"], step["action_input"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return (action, input) if isinstance(action, str) and action != ANSWER else None
