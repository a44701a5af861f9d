"""The answer that /v1/responses gives: items, a message or calls, as one object or as typed events while they grow.

The whole object is what the events add up to: both are written by the same steps.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from llama2_chat.server.choices import Choices
from llama2_chat.server.chunks import event
from llama2_chat.server.errors import ApiError
from llama2_chat.server.logprobs import chat_logprobs
from llama2_chat.server.speech import CallIds, Reader
from llama2_chat.tools import Arguments, Delta, Started, Text
from llama2_chat.types import TokenLogprob, Usage


class Items:
    """How the answer to one request is written. A responses.AnswerWriter.

    settings: what of the request is repeated in the response.
    """

    def __init__(self, model: str, settings: dict[str, Any], reader: Reader, ids: CallIds, with_logprobs: bool) -> None:
        self._reader, self._ids, self._with_logprobs = reader, ids, with_logprobs
        self._id, self._created = _id("resp"), int(time.time())
        self._settings = {"model": model, **settings}
        self._output: list[dict[str, Any]] = []  # the last of which may not be done
        self._is_open = False  # whether it is not
        self._calls = 0  # that have begun
        self._untold: list[TokenLogprob] = []
        self._number = 0  # of the next event

    def whole(self, texts: Sequence[str], choices: Choices) -> dict[str, Any]:
        for _ in (*self.piece(0, texts[0], choices), *self.ended(0, choices)):
            pass
        return self._response(*_outcome(choices), choices.usage)

    def begin(self, choices: Choices) -> Iterator[str]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def piece(self, index: int, piece: str, choices: Choices) -> Iterator[str]:
        yield from self._write(self._reader.read(piece), choices)
        if self._is_open and self._open["type"] == "function_call" and self._calls == len(self._reader.calls):
            yield from self._close("completed")

    def ended(self, index: int, choices: Choices) -> Iterator[str]:
        yield from self._write(self._reader.finish(), choices)
        if not self._output:
            yield from self._begin_message()
        if self._is_open:
            is_whole = choices.finish_reason == "stop" and self._calls == len(self._reader.calls)
            yield from self._close("completed" if is_whole else "incomplete")

    def failed(self, problem: ApiError) -> Iterator[str]:
        if self._is_open:
            self._open["status"] = "incomplete"
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        error = {"code": code, "message": str(problem)}
        yield self._event("response.failed", response=self._response("failed", {"error": error}))

    def end(self, choices: Choices) -> Iterator[str]:
        status, details = _outcome(choices)
        yield self._event(f"response.{status}", response=self._response(status, details, choices.usage))

    def _write(self, deltas: list[Delta], choices: Choices) -> Iterator[str]:
        if self._with_logprobs:
            self._untold += choices.new_logprobs(0)
        for delta in deltas:
            match delta:
                case Text(text):
                    if not (self._is_open and self._open["type"] == "message"):
                        yield from self._begin_message()
                    yield self._more_text(text)
                case Started(call, name):
                    yield from self._begin_call(call, name)
                case Arguments(_, text):
                    self._open["arguments"] += text
                    yield self._of_item("response.function_call_arguments.delta", delta=text)

    # ---- One item ----

    @property
    def _open(self) -> dict[str, Any]:
        return self._output[-1]

    def _begin_message(self) -> Iterator[str]:
        yield from self._begin({"id": _id("msg"), "type": "message", "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open["content"].append(part)
        yield self._of_item("response.content_part.added", content_index=0, part=part)

    def _more_text(self, text: str) -> str:
        (part,) = self._open["content"]
        logprobs, self._untold = chat_logprobs(self._untold)["content"], []
        part["text"] += text
        part["logprobs"] += logprobs
        return self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _begin_call(self, call: int, name: str) -> Iterator[str]:
        self._calls, self._untold = call + 1, []
        call_id = self._ids.id(0, call)
        yield from self._begin(
            {"id": _id("fc"), "type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
        )

    def _begin(self, item: dict[str, Any]) -> Iterator[str]:
        if self._is_open:
            yield from self._close("completed")
        self._output.append(item | {"status": "in_progress"})
        self._is_open = True
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=self._open)

    def _close(self, status: str) -> Iterator[str]:
        item = self._open
        if item["type"] == "message":
            (part,) = item["content"]
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._of_item("response.output_text.done", content_index=0, **told)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **told)
        item["status"], self._is_open = status, False
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _of_item(self, type: str, **fields: Any) -> str:
        return self._event(type, item_id=self._open["id"], output_index=len(self._output) - 1, **fields)

    # ---- All of them ----

    def _event(self, type: str, **fields: Any) -> str:
        number, self._number = self._number, self._number + 1
        return event({"type": type, "sequence_number": number, **fields})

    def _response(
        self, status: str, details: dict[str, Any] | None = None, usage: Usage | None = None
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **self._settings,
            "output": self._output,
            "usage": None if usage is None else _usage_object(usage),
            "background": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,  # whatever was asked for
            **(details or {}),
        }


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(24)}"


def _outcome(choices: Choices) -> tuple[str, dict[str, Any]]:
    """Status, and what goes with it."""
    if choices.finish_reason == "length":
        return "incomplete", {"incomplete_details": {"reason": "max_output_tokens"}}
    return "completed", {}


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "dropped_messages": usage.dropped_messages,
    }
