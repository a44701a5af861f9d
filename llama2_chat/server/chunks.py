"""Answers as chats and texts get them: one JSON document, or chunks of a stream. Those of /v1/responses: items.py."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from llama2_chat.documents.asking import Source
from llama2_chat.server.choices import Choices
from llama2_chat.server.errors import ApiError
from llama2_chat.server.logprobs import chat_logprobs, text_logprobs
from llama2_chat.server.speech import Speech
from llama2_chat.types import Usage

UsageIn = Literal["none", "last", "every"]  # chunk of a stream


class Chunks:
    """How the answers to one request are written: as a chat's or as a text's. A responses.AnswerWriter."""

    def __init__(
        self,
        model: str,
        is_chat: bool,
        speech: Speech,
        with_logprobs: bool = False,
        usage_in: UsageIn = "none",
        sources: Sequence[Source] = (),
    ) -> None:
        """sources: what stands in the question, and with every answer to a chat."""
        self._is_chat, self._speech = is_chat, speech
        self._annotations = {"annotations": [annotation(source) for source in sources]} if sources else {}
        self._with_logprobs, self._usage_in = with_logprobs, usage_in
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created, self._model = int(time.time()), model

    def whole(self, texts: Sequence[str], choices: Choices) -> dict[str, Any]:
        written = []
        for index, (text, reply) in enumerate(zip(texts, choices.replies, strict=True)):
            content = (
                {"message": self._speech.message(index, text) | self._annotations} if self._is_chat else {"text": text}
            )
            reason = self._speech.finish_reason(index, reply.finish_reason)
            written.append(self._choice(index, content, reason, choices, whole=True))
        name = "chat.completion" if self._is_chat else "text_completion"
        return self._head(name) | {"choices": written, "usage": usage_object(choices.usage)}

    def begin(self, choices: Choices) -> Iterator[str]:
        for index, opening in enumerate(choices.openings):
            yield self._chunk(index, {"role": "assistant", "content": opening}, choices)

    def piece(self, index: int, piece: str, choices: Choices) -> Iterator[str]:
        for delta in self._speech.deltas(index, piece):
            yield self._chunk(index, delta, choices)

    def ended(self, index: int, choices: Choices) -> Iterator[str]:
        for delta in self._speech.rest(index):
            yield self._chunk(index, delta, choices)
        reason = self._speech.finish_reason(index, choices.replies[index].finish_reason)
        yield self._chunk(index, self._annotations, choices, reason)

    def failed(self, problem: ApiError) -> Iterator[str]:
        yield event(problem.body)

    def end(self, choices: Choices) -> Iterator[str]:
        if self._usage_in != "none":
            yield event(self._chunk_head | {"choices": [], "usage": usage_object(choices.usage)})
        yield "data: [DONE]\n\n"

    def _chunk(self, index: int, delta: dict[str, Any], choices: Choices, finish_reason: str | None = None) -> str:
        content = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        chunk = self._chunk_head | {"choices": [self._choice(index, content, finish_reason, choices)]}
        if self._usage_in != "none":
            chunk["usage"] = usage_object(choices.usage) if self._usage_in == "every" else None
        return event(chunk)

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: str | None,
        choices: Choices,
        whole: bool = False,
    ) -> dict[str, Any]:
        logprobs = None
        if self._with_logprobs and ((tokens := choices.new_logprobs(index)) or whole):
            logprobs = chat_logprobs(tokens) if self._is_chat else text_logprobs(tokens, len(choices.openings[index]))
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self._is_chat else "text_completion")

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self._id, "created": self._created, "model": self._model, "object": name}


def annotation(source: Source) -> dict[str, Any]:
    """As OpenAI's assistants cite files; index is the number by which the answer names it."""
    cited = {"file_id": source.document, "filename": source.name, "page": source.page, "quote": source.text}
    return {"type": "file_citation", "index": source.number, "file_citation": cited}


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "dropped_messages": usage.dropped_messages,
    }


def event(body: dict[str, Any]) -> str:
    """One of a stream. One that says of which type it is has that as its name, too."""
    name = f"event: {body['type']}\n" if "type" in body else ""
    return f"{name}data: {json.dumps(body, separators=(',', ':'))}\n\n"
