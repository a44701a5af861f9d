"""What programs send, in OpenAI's words, checked at the door.

Ranges are those of types.py. A field that is not here is let pass if the answer would be the same without it
(neutral_fields.py), and refused otherwise: a program that asks for something must not be given something else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llama2_chat.errors import ChatError
from llama2_chat.server.chunks import UsageIn
from llama2_chat.server.errors import ApiError
from llama2_chat.server.grammar_types import GrammarFields
from llama2_chat.server.neutral_fields import PENALTY_WINDOWS, asks_for_nothing, by_weight, in_our_names, why_refused
from llama2_chat.server.tool_types import Call, CalledFunction, ToolFields
from llama2_chat.types import (
    MAX_BIAS,
    MAX_NAMED_TOKENS,
    MAX_STOP_STRINGS,
    OPEN_BELOW,
    RANGES,
    Message,
    SamplingParams,
    ToolCall,
    ToolOffer,
)

# Type of a part of a message -> the name of its text. Some programs send the types of /v1/responses.
TEXT_OF_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MAX_CHOICES = 8  # answers to one prompt
MAX_ANSWERS = 64  # of one request, to all its prompts together; QUEUE_LIMIT's default


def _text(content: Any) -> Any:
    """The text of a message's content. The parts of a list are joined as the page joins them."""
    texts = [_part_text(part) for part in content] if isinstance(content, list) else [content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("it must be text, or a list of parts of type text; nothing else can be read here")
    return "\n".join(filter(None, texts))


def _part_text(part: Any) -> Any:
    return part.get(TEXT_OF_PARTS.get(str(part.get("type")))) if isinstance(part, dict) else part


def _prompts(prompt: Any, info: ValidationInfo) -> Any:
    """A list of texts and lists of ids, also of what is one by itself. Before a suffix there may be nothing."""
    prompts = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if info.data.get("suffix"):
        if not prompts or not all(isinstance(each, str) for each in prompts):
            raise ValueError("with a suffix it must be a text, or a list of texts")
    elif not prompts or not all(each and (isinstance(each, str) or _is_ids(each)) for each in prompts):
        raise ValueError("it must be a text, a list of token ids, or a list of these, and nothing empty")
    return prompts


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(id) is int for id in prompt)


def _list(stop: Any) -> Any:
    """The strings of it. An empty one, as forms send it, ends nothing."""
    stop = [stop] if isinstance(stop, str) else stop or []
    return [text for text in stop if text != ""] if isinstance(stop, list) else stop


def _by_id(bias: Any) -> Any:
    """OpenAI's JSON names ids by text; llama.cpp also takes pairs."""
    try:
        return {int(id): value for id, value in (bias.items() if isinstance(bias, dict) else bias)}
    except (TypeError, ValueError):
        raise ValueError('it must be an object such as {"1234": -100}') from None


def _none_if_empty(value: Any) -> Any:
    return None if value in ("", {}) else value


def in_range(name: str) -> Any:
    low, high = RANGES[name]
    return Field(gt=low, le=high) if name in OPEN_BELOW else Field(ge=low, le=high)


def or_minus_one(name: str) -> BeforeValidator:
    """-1 is one of the ways to send no number."""
    accepted: Any = Annotated[int, in_range(name)] | Literal[-1] | None
    return BeforeValidator(lambda number: None if number == -1 else number, json_schema_input_type=accepted)


ModelName = Annotated[str | None, BeforeValidator(_none_if_empty)]
Text = Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[dict[str, Any]] | None)]
Stop = Annotated[
    list[str],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_list, json_schema_input_type=str | list[str] | None),
]
Prompts = Annotated[
    list[str | list[int]],
    Field(max_length=MAX_ANSWERS),
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_NAMED_TOKENS)]
Bias = Annotated[
    dict[int, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]],
    Field(max_length=MAX_NAMED_TOKENS),
    BeforeValidator(_by_id, json_schema_input_type=dict[str, float]),
]
# llama.cpp says -1 for as many as fit, and for any seed.
MaxTokens = Annotated[Annotated[int, in_range("max_new_tokens")] | None, or_minus_one("max_new_tokens")]
Seed = Annotated[Annotated[int, in_range("seed")] | None, or_minus_one("seed")]
MAX_NAMED_DOCUMENTS = 100
DocumentIds = Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=MAX_NAMED_DOCUMENTS)]
# A chat's false is sent for a text as well.
TextLogprobs = Annotated[
    Annotated[int, in_range("logprobs")] | None,
    BeforeValidator(lambda number: None if number is False else number, json_schema_input_type=int | bool | None),
]
# vLLM says -1 for all.
TopK = Annotated[int, Field(ge=-1, le=RANGES["top_k"][1]), AfterValidator(lambda top_k: max(top_k, 0))]


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    # developer is what OpenAI calls system today, and tool what it called function.
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    refusal: str | None = None  # what OpenAI's models say instead of a content
    content: Annotated[Text, Field(default=None, validate_default=True)]
    tool_calls: list[Call] | None = None
    function_call: CalledFunction | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _only_an_assistant_says_nothing(cls, content: Any, info: ValidationInfo) -> Any:
        return info.data.get("refusal") or "" if content is None and info.data.get("role") == "assistant" else content

    def plain(self) -> Message:
        """As a model takes it."""
        match self.role:
            case "tool" | "function":
                return {
                    "role": "tool",
                    "content": self.content,
                    "tool_call_id": self.tool_call_id or self.name or "",
                    "name": self.name or "",
                }
            case "assistant" if calls := self._calls:
                return {"role": "assistant", "content": self.content, "tool_calls": calls}
            case "developer":
                return {"role": "system", "content": self.content}
        return {"role": self.role, "content": self.content}

    @property
    def _calls(self) -> list[ToolCall]:
        called = [call.tool_call for call in self.tool_calls or ()]
        if self.function_call is not None:  # the result of which goes by the function's name
            called.append(Call(id=self.function_call.name, function=self.function_call).tool_call)
        return called


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: the usage so far in every chunk


class BaseRequest(GrammarFields):
    """What the requests of all routes may say."""

    model_config = ConfigDict(strict=True, extra="allow")
    question_field: ClassVar[str]  # that a ChatError is about
    neutral: ClassVar[dict[str, tuple[Any, ...]]]  # values that ask for nothing on this route alone

    model: ModelName = None
    max_tokens: MaxTokens = None
    temperature: Annotated[float, in_range("temperature")] | None = None
    top_p: Annotated[float, in_range("top_p")] | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, in_range("min_p")] | None = None
    repetition_penalty: Annotated[float, in_range("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, in_range("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, in_range("frequency_penalty")] | None = None
    seed: Seed = None
    logit_bias: Bias | None = None
    stop: Stop = Field(default_factory=list)
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, in_range("min_tokens")] | None = None
    cache_prompt: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int | None, Field(validate_default=True)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_our_names(cls, body: Any) -> Any:
        return in_our_names(body, cls.model_fields) if isinstance(body, dict) else body

    @property
    def requested_tokens(self) -> int | None:
        """The longest answer; None for as long as the context window leaves."""
        return self.max_tokens

    @field_validator("best_of")
    @classmethod
    def _is_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, info.data.get("n") or 1):
            raise ValueError("it must be equal to n: all answers are returned")
        return value

    @property
    def requested_logprobs(self) -> int | None:
        """How many likeliest tokens are shown in each place; None for no logprobs at all."""
        return None

    @property
    def echoed(self) -> list[str | list[int]]:
        """The prompts that stand before their answers."""
        return []

    @property
    def choices_each(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def offer(self) -> ToolOffer | None:
        """The tools that may be called."""
        return None

    @property
    def usage_in(self) -> UsageIn:
        """Which chunks of a stream carry the usage."""
        options = self.stream_options or StreamOptions()
        if not (options.include_usage or (options.include_usage is None and options.continuous_usage_stats)):
            return "none"
        return "every" if options.continuous_usage_stats else "last"

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """What the request sets, and the server's defaults for the rest."""
        names = RANGES.keys() - {"max_new_tokens", "logprobs"} | {
            "cache_prompt",
            "ignore_eos",
            "logit_bias",
            "stop_token_ids",
        }
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.requested_tokens is not None:
            given["max_new_tokens"] = self.requested_tokens
        given["logprobs"] = self.requested_logprobs
        given["prompt_logprobs"] = self.requested_logprobs is not None and bool(self.echoed)
        return replace(defaults, stop=tuple(self.stop), grammar=self.grammar_spec(), **given)

    def reject_unsupported(self) -> None:
        """Raises ApiError for the field that changes the answer most, of those that cannot be done."""
        unused = PENALTY_WINDOWS if self.repetition_penalty == 1 else ()
        refused = [
            name
            for name, value in (self.model_extra or {}).items()
            if name not in unused and not asks_for_nothing(name, value, self.neutral.get(name, ()))
        ]
        for name in by_weight(refused):
            raise ApiError(400, "unsupported_parameter", why_refused(name), name[:60])


class _Conversation(BaseModel):
    """Messages, and whether the last of them is an answer to go on with, which vLLM has these fields for."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: Annotated[bool | None, Field(validate_default=True)] = None

    @field_validator("continue_final_message")
    @classmethod
    def _has_an_answer(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("it goes with add_generation_prompt false only")
        last = _last_turn(info.data.get("messages"))
        if value and (last is None or last.role != "assistant"):
            raise ValueError("it goes with messages that end with one of the assistant only")
        if not value and info.data.get("add_generation_prompt") is False:
            raise ValueError("it must be true where add_generation_prompt is false")
        return value

    def conversation(self) -> list[Message]:
        """As a model takes it. Raises ChatError if it ends with an answer that nobody asked to go on with."""
        last = _last_turn(self.messages)
        if last is not None and last.role == "assistant" and last.content and not self.continue_final_message:
            raise ChatError(
                "A conversation starts with a message from the user and ends with one. "
                "To go on with an answer, set continue_final_message to true."
            )
        return self.said

    @property
    def said(self) -> list[Message]:
        return [message.plain() for message in self.messages or ()]


def _last_turn(messages: list[ChatMessage] | None) -> ChatMessage | None:
    spoken = (message for message in reversed(messages or ()) if message.role not in ("system", "developer"))
    return next(spoken, None)


class ChatRequest(ToolFields, BaseRequest, _Conversation):
    question_field: ClassVar = "messages"
    neutral: ClassVar = {"add_special_tokens": (False,)}  # a chat template writes its own

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    documents: DocumentIds | None = None  # of /v1/files, about which the conversation is
    max_completion_tokens: MaxTokens = None
    trim: bool | None = None  # leave out the oldest exchanges of a conversation that is too long, as the page does

    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, in_range("logprobs"), Field(validate_default=True)] = None

    @field_validator("top_logprobs")
    @classmethod
    def _goes_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("it goes with logprobs true only")
        return value

    @property
    def requested_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def requested_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(BaseRequest):
    """A text to go on with, or to fill in. What is written twice is penalised in a chat alone: code repeats itself."""

    suffix_field: ClassVar[str]  # that NoInfilling is about

    def params(self, defaults: SamplingParams) -> SamplingParams:
        return super().params(replace(defaults, repetition_penalty=1.0))


class CompletionRequest(TextRequest):
    question_field: ClassVar = "prompt"
    suffix_field: ClassVar = "suffix"
    neutral: ClassVar = {"add_special_tokens": (True,)}

    suffix: Annotated[str | None, BeforeValidator(lambda suffix: suffix or None)] = None
    prompt: Prompts
    echo: bool | None = None
    logprobs: TextLogprobs = None

    @property
    def requested_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoed(self) -> list[str | list[int]]:
        return self.prompt if self.echo else []

    @field_validator("echo")
    @classmethod
    def _has_no_suffix(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("suffix"):
            raise ValueError("it does not go with a suffix")
        return value

    @field_validator("prompt")
    @classmethod
    def _are_few(cls, value: list[str | list[int]], info: ValidationInfo) -> list[str | list[int]]:
        if len(value) * (info.data.get("n") or 1) > MAX_ANSWERS:
            raise ValueError(f"it may have {MAX_ANSWERS} answers, those of all prompts together")
        return value


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    model: ModelName = None
    tokens: list[int]


class TokenizeRequest(_Conversation, ToolFields):
    """One of the two."""

    model_config = ConfigDict(strict=True)

    model: ModelName = None
    prompt: str | None = None
