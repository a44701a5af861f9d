"""What the choices of one request say: text and, where tools were offered, calls, in OpenAI's words."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from llama2_chat.tools import Arguments, Delta, Started, Text
from llama2_chat.types import ToolCall


class Reader(Protocol):
    """From a reply's text, as it comes, to text and calls: a tools.CallReader, or one where nothing can be called."""

    text: str
    calls: list[ToolCall]

    def read(self, piece: str) -> list[Delta]: ...
    def finish(self) -> list[Delta]: ...


class TextReader:
    """All that comes is text."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: list[ToolCall] = []

    def read(self, piece: str) -> list[Delta]:
        self.text += piece
        return [Text(piece)]

    def finish(self) -> list[Delta]:
        return []


class CallIds:
    """Ids of calls, the same ones for the same seed; random without one."""

    def __init__(self, seed: str | None) -> None:
        self._seed = secrets.token_hex() if seed is None else seed

    def id(self, index: int, call: int) -> str:
        made = hashlib.sha256(f"{self._seed} {index} {call}".encode()).hexdigest()
        return f"call_{made[:24]}"


class Speech:
    """What chats and texts are told of each choice.

    readers: one for each choice. speaks_of_functions: as OpenAI did at first.
    """

    def __init__(self, readers: Sequence[Reader], ids: CallIds, speaks_of_functions: bool = False) -> None:
        self._readers, self._ids, self._functions = readers, ids, speaks_of_functions

    def deltas(self, index: int, piece: str) -> Iterator[dict[str, Any]]:
        """What a stream adds to the message of choice `index` for one more piece of text."""
        return self._written(index, self._readers[index].read(piece))

    def rest(self, index: int) -> Iterator[dict[str, Any]]:
        """What it adds at the end of the choice."""
        return self._written(index, self._readers[index].finish())

    def message(self, index: int, text: str) -> dict[str, Any]:
        """The whole message."""
        reader = self._readers[index]
        reader.read(text)
        reader.finish()
        if not reader.calls:
            return {"role": "assistant", "content": reader.text}
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in reader.calls]
        calls: dict[str, Any] = {"function_call": functions[0]}
        if not self._functions:
            calls = {"tool_calls": [self._call(index, n) | {"function": each} for n, each in enumerate(functions)]}
        return {"role": "assistant", "content": reader.text or None, **calls}

    def finish_reason(self, index: int, reason: str | None) -> str | None:
        if reason != "stop" or not self._readers[index].calls:
            return reason
        return "function_call" if self._functions else "tool_calls"

    def _written(self, index: int, deltas: list[Delta]) -> Iterator[dict[str, Any]]:
        for delta in deltas:
            match delta:
                case Text(text):
                    yield {"content": text}
                case Started(call, name) if self._functions:
                    yield {"function_call": {"name": name, "arguments": ""}}
                case Started(call, name):
                    head = {"index": call, **self._call(index, call), "function": {"name": name, "arguments": ""}}
                    yield {"tool_calls": [head]}
                case Arguments(_, text) if self._functions:
                    yield {"function_call": {"arguments": text}}
                case Arguments(call, text):
                    yield {"tool_calls": [{"index": call, "function": {"arguments": text}}]}

    def _call(self, index: int, call: int) -> dict[str, str]:
        return {"id": self._ids.id(index, call), "type": "function"}
