"""One answer on its way, as types.Reply promises: the event loop's thread puts text in, one reader takes it out.

Entering waits until a server has accepted the question, so that a refusal is raised before anything is shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import (
    ChatCompletionStreamOutput,
    ChatCompletionStreamOutputChoice,
    ChatCompletionStreamOutputDeltaToolCall,
)

from llama2_chat.channel import Stopwatch
from llama2_chat.remote.faults import ABORTED, NO_LOGPROBS, RequestRejected, ServerFault
from llama2_chat.tasks import ACCEPTED, TaskReply
from llama2_chat.text import valid_unicode
from llama2_chat.tools import PLAIN, JsonOnly
from llama2_chat.types import CallStyle, Candidate, FinishReason, Timing, TokenLogprob, Usage

MARKER = "\x02"  # start of text: a control character that no answer holds
OPENING = MARKER + PLAIN.opening
CALLS = CallStyle(OPENING, PLAIN.middle, PLAIN.closing, PLAIN.closing + OPENING)  # as calls stand in the text here


class RemoteReply(TaskReply):
    queue_position = 0  # servers do not say
    prompt_logprobs: Sequence[TokenLogprob] = ()  # nor these

    def __init__(self, asked_logprobs: int | None = None) -> None:
        """asked_logprobs: as SamplingParams has it."""
        super().__init__()
        self.logprobs: list[TokenLogprob] = []
        self._asked_logprobs = asked_logprobs
        self._new_logprobs: deque[TokenLogprob] = deque()  # whose text has not been read
        self._offset = 0  # characters of all text that came
        self.usage = Usage()
        self.server_reason: FinishReason | None = None  # why the answer ended, by the server; its usage may still come
        self.has_text = False  # whether any came
        self._characters = 0  # of the text that was read
        self._json_only: JsonOnly | None = None  # what reads an answer of a server that takes no tools
        self._calling: int | None = None  # the index of the call that the server is writing
        self._argued = False  # whether that call has arguments yet
        self._half = ""  # half a character, that is a surrogate, whose other half the next piece may begin with
        self._stopwatch = Stopwatch()

    # What the event loop's thread calls.

    def count_dropped(self, messages: int) -> None:
        self.usage = replace(self.usage, dropped_messages=messages)

    def accept(self) -> None:
        self._channel.put(ACCEPTED)

    def expect_json_only(self, answer_is_text: bool | None) -> None:
        """answer_is_text: as JsonOnly takes it; None where the answer is no such JSON."""
        self._json_only = None if answer_is_text is None else JsonOnly(MARKER, answer_is_text)

    def put(self, chunk: ChatCompletionStreamOutput) -> None:
        for choice in chunk.choices or ():
            if self._asked_logprobs is not None:
                self._put_logprobs(choice)
            if choice.delta and choice.delta.content:
                content = choice.delta.content.replace(MARKER, "")
                self._put_text(self._json_only.read(content) if self._json_only else content)
            for call in (choice.delta and choice.delta.tool_calls) or ():
                self._put_call(call)
            if choice.finish_reason in ("abort", "error"):
                raise ServerFault(ABORTED)
            if choice.finish_reason:
                self.server_reason = "length" if choice.finish_reason == "length" else "stop"
                self._put_end()
        if chunk.usage:
            details = getattr(chunk.usage, "prompt_tokens_details", None) or {}
            self.usage = replace(
                self.usage,
                prompt_tokens=count(chunk.usage.prompt_tokens),
                completion_tokens=count(chunk.usage.completion_tokens) or self.usage.completion_tokens,
                cached_tokens=count(details.get("cached_tokens")),
            )

    def _put_logprobs(self, choice: ChatCompletionStreamOutputChoice) -> None:
        """Before the text of the same chunk."""
        entries = (choice.logprobs and choice.logprobs.content) or []
        if choice.delta and choice.delta.content and not (entries or self._new_logprobs or self.logprobs):
            raise RequestRejected(NO_LOGPROBS)
        for entry in entries:
            top = tuple(map(_candidate, (entry.top_logprobs or [])[: self._asked_logprobs]))
            self._new_logprobs.append(TokenLogprob(_candidate(entry), top, self._offset))
            self._offset += len(entry.token)

    def _put_call(self, call: ChatCompletionStreamOutputDeltaToolCall) -> None:
        """A piece of a call, as text: its index and name are in the first."""
        if call.index != self._calling:
            self._put_end_of_call()
            self._calling, self._argued = call.index, False
            self._put_text(f"{CALLS.opening}{call.function.name}{CALLS.middle}")
        if call.function.arguments:
            self._argued = True
            self._put_text(call.function.arguments.replace(MARKER, ""))

    def _put_end_of_call(self) -> None:
        if self._calling is not None:
            self._put_text(("" if self._argued else "{}") + CALLS.closing)
        self._calling = None

    def _put_end(self) -> None:
        if self._json_only:
            self._put_text(self._json_only.finish())
        if self.server_reason != "length":
            self._put_end_of_call()

    def _put_text(self, text: str) -> None:
        if not text:
            return
        self._stopwatch.lap()
        self._channel.put(text)
        self.has_text = True
        # An estimate until the server reports its usage, which not all do: a piece is a token, or a few.
        self.usage = replace(self.usage, completion_tokens=self.usage.completion_tokens + 1)

    # What readers see.

    @property
    def timing(self) -> Timing:
        return self._stopwatch.timing(self.usage.completion_tokens)

    def _read_text(self, text: str) -> str:
        self._characters += len(text)
        self._show_logprobs()
        text = self._half + text
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return valid_unicode(text.removesuffix(self._half))

    def _read_rest(self) -> str:
        self._show_logprobs(all=True)
        text, self._half = self._half, ""
        return valid_unicode(text)

    def _show_logprobs(self, all: bool = False) -> None:
        """Those of the tokens that begin in the text read so far."""
        while self._new_logprobs and (all or self._new_logprobs[0].offset < self._characters):
            self.logprobs.append(self._new_logprobs.popleft())


def _candidate(entry: Any) -> Candidate:
    """entry: one of OpenAI's tokens with a logprob; not every server sends its bytes."""
    data = entry.get("bytes")
    return Candidate(entry.token, entry.token.encode() if data is None else bytes(data), float(entry.logprob))


def count(value: object) -> int:
    """A number of tokens that a server reports; 0 if it reports something else."""
    return value if type(value) is int and 0 < value < 2**63 else 0
