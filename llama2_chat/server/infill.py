"""POST /infill as llama.cpp has it, for editors: what a request may say, where an answer is cut, how it is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, Field

from llama2_chat.server.choices import Choices
from llama2_chat.server.chunks import event
from llama2_chat.server.errors import ApiError
from llama2_chat.server.openai_types import TextRequest, or_minus_one
from llama2_chat.types import RANGES, ChatBackend, FinishReason, Reply, SamplingParams, Timing, TokenLogprob, Usage

MOST_EXTRA = 1_000  # of the further texts, the nearest; editors send up to 64


class Snippet(BaseModel):
    """A further text, from elsewhere in what is being written."""

    text: str
    filename: str | None = None


class InfillRequest(TextRequest):
    """In llama.cpp's words. prompt: what stands behind the prefix, such as the line that is being typed."""

    question_field: ClassVar = "input_prefix"
    suffix_field: ClassVar = "input_suffix"
    neutral: ClassVar = {}

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[list[Snippet], BeforeValidator(lambda value: value or [])] = Field(default_factory=list)
    prompt: Annotated[str, BeforeValidator(lambda value: value or "")] = ""
    # 0 asks for no text: an editor has its snippets read before there is a question.
    max_tokens: Annotated[
        Annotated[int, Field(ge=0, le=RANGES["max_new_tokens"][1])] | None, or_minus_one("max_new_tokens")
    ] = None
    n_indent: Annotated[int, Field(ge=0)] | None = None
    t_max_predict_ms: float | None = None
    # The order of what is done to the likelihoods is always the same here, and llama.cpp ignores the last one, too.
    samplers: list[str] | str | None = None
    t_max_prompt_ms: float | None = None

    @property
    def prefix(self) -> str:
        return self.input_prefix + self.prompt

    @property
    def said(self) -> list[str | list[int]]:
        return [self.prefix, self.input_suffix]

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens if self.max_tokens is None else max(self.max_tokens, 1)

    @property
    def choices_each(self) -> int:
        return 1 if self.max_tokens == 0 else super().choices_each


def stream_infill(chat: ChatBackend, body: InfillRequest, params: SamplingParams, *, to_the_end: bool) -> Reply:
    """What stands between prefix and suffix, which lose what is farthest from the gap if they are too long."""
    most = chat.context_length // 2
    room = chat.context_length - min(body.requested_tokens or most, most)
    extra = [snippet.text for snippet in body.input_extra[-MOST_EXTRA:]]
    ids = chat.encode_infilling(body.prefix, body.input_suffix, extra=extra, room=room)
    left = max(chat.context_length - len(ids), 1)
    if not to_the_end:
        params = replace(params, max_new_tokens=min(params.max_new_tokens, left))
    reply = chat.stream_completion(ids, params, to_the_end=to_the_end)
    if not (body.n_indent or body.t_max_predict_ms):
        return reply
    return CutReply(reply, body.n_indent or 0, (body.t_max_predict_ms or 0) / 1000)


class CutReply:
    """A reply that ends where a line is indented less than `indent`, or after `seconds` once it has a line end."""

    def __init__(self, reply: Reply, indent: int, seconds: float) -> None:
        self._reply, self._least, self._seconds = reply, indent, seconds
        self._indent: int | None = None  # of the line that has just begun; of the first, nobody asks
        self._began: float | None = None
        self._has_line_end = self._is_cut = False

    @property
    def finish_reason(self) -> FinishReason | None:
        return "length" if self._is_cut else self._reply.finish_reason

    async def __anext__(self) -> str:
        if self._is_cut:
            raise StopAsyncIteration
        return self._up_to_cut(await anext(self._reply))

    def __next__(self) -> str:
        if self._is_cut:
            raise StopIteration
        return self._up_to_cut(next(self._reply))

    def _up_to_cut(self, piece: str) -> str:
        now = time.monotonic()
        self._began = self._began or now
        until = self._too_far_left(piece)
        self._has_line_end = self._has_line_end or "\n" in piece
        is_late = self._seconds > 0 and self._has_line_end and now - self._began > self._seconds
        if until is None and not is_late:
            return piece
        self._is_cut = True
        self._reply.close()
        return piece[:until]

    def _too_far_left(self, piece: str) -> int | None:
        """Where in the piece a line begins that is indented too little."""
        for at, char in enumerate(piece):
            if self._indent is not None and char not in " \t" and self._indent < self._least:
                return at
            if char == "\n":
                self._indent = 0
            elif self._indent is not None:
                self._indent = self._indent + 1 if char in " \t" else None
        return None

    # As the reply.

    @property
    def queue_position(self) -> int:
        return self._reply.queue_position

    @property
    def usage(self) -> Usage:
        return self._reply.usage

    @property
    def timing(self) -> Timing:
        return self._reply.timing

    @property
    def json_ends(self) -> bool:
        return self._reply.json_ends

    @property
    def relaxed(self) -> Sequence[str]:
        return self._reply.relaxed

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        return self._reply.prompt_logprobs

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        return self._reply.logprobs

    def __iter__(self) -> CutReply:
        return self

    def __aiter__(self) -> CutReply:
        return self

    def __enter__(self) -> CutReply:
        self._reply.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._reply.__exit__(*exc)

    async def __aenter__(self) -> CutReply:
        await self._reply.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._reply.__aexit__(*exc)

    def close(self) -> None:
        self._reply.close()


class Infills:
    """The answers in llama.cpp's form: an object, or a list of several. A responses.AnswerWriter."""

    def __init__(self, model: str, context_length: int, with_text: bool) -> None:
        """with_text: False where nobody asked for a token: what the model has said to read the prompt is not told."""
        self._model, self._context_length, self._with_text = model, context_length, with_text

    def whole(self, texts: Sequence[str], choices: Choices) -> Any:
        answers = [self._last(index, text, choices) for index, text in enumerate(texts)]
        return answers if len(answers) > 1 else answers[0]

    def begin(self, choices: Choices) -> Iterator[str]:
        return iter(())

    def piece(self, index: int, piece: str, choices: Choices) -> Iterator[str]:
        if self._with_text and piece:
            yield event({"index": index, "content": piece, "stop": False, "tokens": []})

    def ended(self, index: int, choices: Choices) -> Iterator[str]:
        yield event(self._last(index, "", choices))

    def failed(self, problem: ApiError) -> Iterator[str]:
        yield event(problem.body)

    def end(self, choices: Choices) -> Iterator[str]:
        return iter(())

    def _last(self, index: int, text: str, choices: Choices) -> dict[str, Any]:
        """The answer, or the last event of its stream, with what it cost."""
        reply = choices.replies[index]
        usage, tokens = reply.usage, reply.usage.completion_tokens if self._with_text else 0
        return {
            "index": index,
            "content": text if self._with_text else "",
            "tokens": [],
            "stop": True,
            "stop_type": "eos" if reply.finish_reason == "stop" and self._with_text else "limit",
            "model": self._model,
            "tokens_predicted": tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.prompt_tokens + tokens,
            "truncated": False,
            "generation_settings": {"n_ctx": self._context_length},
            "timings": _timings(usage, tokens, reply.timing),
        }


def _timings(usage: Usage, tokens: int, timing: Timing) -> dict[str, float]:
    """Of what was computed: the tokens of the prompt that were not in the KV cache, and those of the answer."""
    read, first_s, speed = (
        usage.prompt_tokens - usage.cached_tokens,
        timing.time_to_first_token_s or 0.0,
        timing.tokens_per_second or 0.0,
    )
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": read,
        "prompt_ms": first_s * 1000,
        "prompt_per_second": read / first_s if first_s else 0.0,
        "predicted_n": tokens,
        "predicted_ms": tokens / speed * 1000 if speed else 0.0,
        "predicted_per_second": speed,
    }
