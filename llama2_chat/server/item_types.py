"""What programs send to /v1/responses, as far as it is said in other words than to /v1/chat/completions.

A conversation is a list of items here: messages, calls, and what was returned. Nothing is stored between two requests.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from llama2_chat.errors import ChatError
from llama2_chat.server.grammar_types import TextFormat
from llama2_chat.server.openai_types import BaseRequest, MaxTokens, Text, in_range
from llama2_chat.server.tool_types import FlatToolFields, Name, either
from llama2_chat.types import Message, SamplingParams

LOGPROBS = "message.output_text.logprobs"
ENDS_WITH_AN_ANSWER = (
    "The input ends with a message of the assistant. End it with one of the user; /v1/chat/completions can go on with "
    "an answer."
)


class MessageItem(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    def add_to(self, messages: list[Message]) -> None:
        if self.role == "assistant":
            turn = _assistants_turn(messages)
            turn["content"] = "\n\n".join(filter(None, [turn["content"], self.content]))
        else:
            messages.append({"role": "user" if self.role == "user" else "system", "content": self.content})


class CallItem(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str

    def add_to(self, messages: list[Message]) -> None:
        called = _assistants_turn(messages).setdefault("tool_calls", [])
        called.append({"id": self.call_id, "name": self.name, "arguments": self.arguments})


class OutputItem(BaseModel):
    """What a call returned."""

    model_config = ConfigDict(strict=True)

    type: Literal["function_call_output"]
    call_id: str
    output: Text

    def add_to(self, messages: list[Message]) -> None:
        messages.append({"role": "tool", "content": self.output, "tool_call_id": self.call_id, "name": ""})


class ReasoningItem(BaseModel):
    """What a model thought, which no other model is told."""

    type: Literal["reasoning"]

    def add_to(self, messages: list[Message]) -> None:
        pass


class ReferenceItem(BaseModel):
    type: Literal["item_reference"]

    @model_validator(mode="before")
    @classmethod
    def _leads_nowhere(cls, value: Any) -> Any:
        raise ValueError("nothing is stored here that it could refer to: send the item itself")

    def add_to(self, messages: list[Message]) -> None:
        pass


def _assistants_turn(messages: list[Message]) -> Message:
    """The last of the messages: texts and calls that no result stands between are one turn."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _type(item: Any) -> Any:
    return item.get("type") or ("message" if "role" in item else None) if isinstance(item, dict) else None


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("it must be a text, or a list of items, and not empty")
    return value


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ReferenceItem, Tag("item_reference")],
    Discriminator(
        _type,
        custom_error_type="item_type",
        custom_error_message="it must be an item of type message, function_call, function_call_output or reasoning",
    ),
]
Input = Annotated[list[Item], BeforeValidator(_items, json_schema_input_type=str | list[Item])]
# All but the first are of tools and of reasoning that are not here, so that there is nothing to include of them.
Included = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Metadata = Annotated[dict[str, Annotated[str, StringConstraints(max_length=512)]], Field(max_length=16)]


class TextFields(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None
    verbosity: Annotated[Literal["medium"], either("medium: how long answers are cannot be set")] | None = None


class ResponsesRequest(FlatToolFields, BaseRequest):
    question_field: ClassVar = "input"
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    input: Input
    instructions: str | None = None
    text: TextFields | None = None
    response_format: Annotated[None, either("left out: here it is text.format")] = None
    max_output_tokens: MaxTokens = None
    n: Literal[1] | None = None  # a response has one answer
    include: list[Included] | None = None
    top_logprobs: Annotated[int, in_range("logprobs")] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    user: str | None = None

    @property
    def requested_tokens(self) -> int | None:
        return self.max_output_tokens or self.max_tokens

    @property
    def requested_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.top_logprobs or LOGPROBS in (self.include or ()) else None

    @property
    def text_format(self) -> TextFormat | None:
        return self.text.format if self.text else None

    @property
    def grammar_field(self) -> str:
        return "text" if self.text_format else super().grammar_field

    @property
    def trim(self) -> bool:
        return self.truncation == "auto"

    @property
    def said(self) -> list[Message]:
        messages: list[Message] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            item.add_to(messages)
        return messages

    def conversation(self) -> list[Message]:
        """As a model takes it. Raises ChatError if it ends with an answer."""
        said = self.said
        last = next((message for message in reversed(said) if message["role"] != "system"), None)
        if last is not None and last["role"] == "assistant" and not last.get("tool_calls"):
            raise ChatError(ENDS_WITH_AN_ANSWER)
        return said

    def settings(self, params: SamplingParams) -> dict[str, Any]:
        """What of the request a response repeats. params: as they were made of it."""
        text = self.text_format or TextFormat(type="text")
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.requested_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "temperature": params.temperature,
            "text": {"format": text.model_dump(by_alias=True, exclude_none=True), "verbosity": "medium"},
            "tool_choice": "auto" if self.tool_choice is None else _written(self.tool_choice),
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": self.requested_logprobs or 0,
            "top_p": params.top_p,
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }


def _written(choice: Any) -> Any:
    return choice if isinstance(choice, str) else choice.model_dump()
