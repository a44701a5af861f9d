"""Calls or an answer from a server that takes no tools but keeps to a JSON schema: one object, of either kind.

How a server spaces its JSON is its own affair. One that ignores the schema and writes plain text has it left as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from llama2_chat.tools.schemas import call_schemas, closed_object, one_of, schema_of
from llama2_chat.types import GrammarSpec, ToolOffer

CALL, ANSWER = '{"name":', '{"answer":'
# What a string of JSON begins with, in whole characters: half of an escape, or of a pair of surrogates, has to wait.
WHOLE_CHARACTERS = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*'
)


def json_only_grammar(offer: ToolOffer, answer: GrammarSpec | None) -> GrammarSpec:
    """The JSON schema of one call or, under "answer", of what the answer must follow.

    Raises BadGrammar for an answer that must follow another grammar.
    """
    value = {"type": "string"} if answer is None else schema_of(answer)
    answers = {} if offer.must_call else {"answer": closed_object(answer=value)}
    return GrammarSpec("json_schema", json.dumps(one_of(call_schemas(offer, "arguments") | answers)))


class JsonOnly:
    """From the text of such an answer, as it comes, to the text with calls that a model itself would write in PLAIN.

    before_call: what stands before a call there. is_text: the answer is a string, rather than JSON of its own.
    """

    def __init__(self, before_call: str = "", is_text: bool = True) -> None:
        self._before_call, self._is_text = before_call, is_text
        self._rest = ""
        self._write: Callable[[], str] = self._beginning
        self._depth, self._in_string, self._escaped = 0, False, False

    def read(self, piece: str) -> str:
        """What has become certain."""
        self._rest += piece
        return self._write()

    def finish(self) -> str:
        """What remains, at the end of an answer that was nothing of the kind."""
        return self._plain() if self._write == self._beginning else ""

    def _beginning(self) -> str:
        compact = "".join(self._rest.split())
        if compact.startswith(CALL):
            self._write = self._json
            return self._before_call + self._json()
        if compact.startswith(ANSWER):
            value = self._rest.partition(":")[2].lstrip()
            if not value:
                return ""
            self._rest = value[1:] if self._is_text else value
            self._write = self._string if self._is_text else self._json
        elif not (CALL.startswith(compact) or ANSWER.startswith(compact)):
            self._write = self._plain
        else:
            return ""
        return self._write()

    def _plain(self) -> str:
        text, self._rest = self._rest, ""
        return text

    def _string(self) -> str:
        found = WHOLE_CHARACTERS.match(self._rest)
        whole = found[0] if found else ""
        self._rest = self._rest[len(whole) :]
        if self._rest.startswith('"'):
            self._write = self._nothing
        return str(json.loads(f'"{whole}"', strict=False))

    def _json(self) -> str:
        """As Python writes it, to the end of the value."""
        written = []
        for char in self._plain():
            if self._in_string or char == '"':
                self._in_string = char != '"' or self._escaped or not self._in_string
                self._escaped = self._in_string and char == "\\" and not self._escaped
            elif char.isspace():
                continue
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth < 0:
                    self._write = self._nothing
                    break
            written.append(char + " " if char in ":," and not self._in_string else char)
        return "".join(written)

    def _nothing(self) -> str:
        self._rest = ""
        return ""
