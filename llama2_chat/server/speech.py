"""What the choices of one request say: text and, where tools were offered, calls, in OpenAI's words."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from typing import Any

from llama2_chat.tools import Arguments, CallReader, Delta, Started, Text


class Speech:
    """The text of each choice, as it comes."""

    def deltas(self, index: int, piece: str) -> list[dict[str, Any]]:
        """What a stream adds to the message of choice `index` for one more piece of text."""
        return [{"content": piece}]

    def rest(self, index: int) -> list[dict[str, Any]]:
        """What it adds at the end of the choice."""
        return []

    def message(self, index: int, text: str) -> dict[str, Any]:
        """The whole message."""
        return {"role": "assistant", "content": text}

    def finish_reason(self, index: int, reason: str | None) -> str | None:
        return reason


class SpeechWithCalls(Speech):
    """The same of replies that may call tools.

    readers: one for each choice. speaks_of_functions: as OpenAI did at first. seed: of the ids of calls, which are the
    same for the same seed; random without one.
    """

    def __init__(self, readers: list[CallReader], speaks_of_functions: bool = False, seed: str | None = None) -> None:
        self._readers, self._functions = readers, speaks_of_functions
        self._seed = secrets.token_hex() if seed is None else seed

    def deltas(self, index: int, piece: str) -> list[dict[str, Any]]:
        return list(self._written(index, self._readers[index].read(piece)))

    def rest(self, index: int) -> list[dict[str, Any]]:
        return list(self._written(index, self._readers[index].finish()))

    def message(self, index: int, text: str) -> dict[str, Any]:
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
        made = hashlib.sha256(f"{self._seed} {index} {call}".encode()).hexdigest()
        return {"id": f"call_{made[:24]}", "type": "function"}
