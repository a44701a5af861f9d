"""Tools and calls as programs send them, in OpenAI's words: today's, and those that it had before ("functions")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from llama2_chat.errors import ChatError
from llama2_chat.types import MAX_TOOLS, TOOL_NAME, Tool, ToolCall, ToolOffer

Name = Annotated[str, StringConstraints(pattern=f"^(?:{TOOL_NAME.pattern})$")]


class Function(BaseModel):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters, bool(self.strict))


class FunctionTool(BaseModel):
    type: Literal["function"]
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") != "function":
            raise ValueError("only tools of type function can be called")
        return value


class FlatTool(Function):
    """As /v1/responses has it."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise ValueError(f"there is no {kind:.40} here: only tools of type function can be called")
        return value


class Named(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"]
    function: Named


class FlatNamedTool(Named):
    type: Literal["function"]


class AllowedTools(BaseModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(BaseModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class FlatAllowedTools(BaseModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatNamedTool], Field(min_length=1)]


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True)

    name: Name
    arguments: str | None = None  # JSON, as a rule


class Call(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    @property
    def tool_call(self) -> ToolCall:
        return {"id": self.id, "name": self.function.name, "arguments": self.function.arguments or ""}


def either(sentence: str) -> WrapValidator:
    """One sentence for whatever is none of a choice's forms, rather than one for each of them."""

    def validate(value: Any, validate_forms: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate_forms(value)
        except ValidationError:
            raise ValueError(f"it must be {sentence}") from None

    return WrapValidator(validate)


Choice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice,
    either('none, auto, required or {"type": "function", "function": {"name": "..."}}'),
]
FlatChoice = Annotated[
    Literal["none", "auto", "required"] | FlatNamedTool | FlatAllowedTools,
    either('none, auto, required or {"type": "function", "name": "..."}'),
]
OlderChoice = Annotated[Literal["none", "auto"] | Named, either('none, auto or {"name": "..."}')]


class ToolFields(BaseModel):
    """The fields of a chat's request that are about tools."""

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    function_call: OlderChoice | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tools", "functions")
    @classmethod
    def _make_sense(cls, value: list[FunctionTool] | list[Function] | None, info: ValidationInfo) -> Any:
        if value and info.field_name == "functions" and info.data.get("tools"):
            raise ValueError("it is the older name of tools: send one of them")
        with _as_value_error():
            _offer(_tools(value))
        return value

    @field_validator("tool_choice", "function_call")
    @classmethod
    def _fits_the_tools(cls, value: Any, info: ValidationInfo) -> Any:
        return _fitting(value, "tools" if info.field_name == "tool_choice" else "functions", info)

    @property
    def has_functions(self) -> bool:
        """Whether the answer is to speak of functions, as OpenAI's did at first."""
        return bool(self.functions)

    @property
    def offer(self) -> ToolOffer | None:
        """What the model is told of and may call; None without tools."""
        if self.has_functions:
            return _offer(_tools(self.functions), self.function_call, parallel=False)
        return _offer(_tools(self.tools), self.tool_choice, self.parallel_tool_calls)


class FlatToolFields(BaseModel):
    """The same of a request to /v1/responses."""

    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: FlatChoice | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tools")
    @classmethod
    def _make_sense(cls, value: list[FlatTool] | None) -> list[FlatTool] | None:
        with _as_value_error():
            _offer(_tools(value))
        return value

    @field_validator("tool_choice")
    @classmethod
    def _fits_the_tools(cls, value: Any, info: ValidationInfo) -> Any:
        return _fitting(value, "tools", info)

    @property
    def offer(self) -> ToolOffer | None:
        return _offer(_tools(self.tools), self.tool_choice, self.parallel_tool_calls)


def _fitting(choice: Any, field: str, info: ValidationInfo) -> Any:
    """The choice, if it is one of the tools in the field. Raises ValueError if not."""
    if field not in info.data:  # which was refused already
        return choice
    tools = _tools(info.data[field])
    if choice not in (None, "none", "auto") and not tools:
        raise ValueError(f"it goes with {field} only")
    with _as_value_error():
        _offer(tools, choice)
    return choice


def _tools(sent: Sequence[FunctionTool | Function] | None) -> tuple[Tool, ...]:
    return tuple((each.function if isinstance(each, FunctionTool) else each).tool for each in sent or ())


def _offer(tools: tuple[Tool, ...], choice: Any = None, parallel: bool | None = None) -> ToolOffer | None:
    """Raises ChatError for tools that do not go together, and for a choice that is none of them."""
    if not tools:
        return None
    offer = ToolOffer(tools, parallel=parallel)
    match choice:
        case "none":
            return replace(offer, may_call=False)
        case "required":
            return replace(offer, must_call=True)
        case FlatAllowedTools(mode=mode, tools=allowed):
            return replace(offer, must_call=mode == "required", names=tuple(tool.name for tool in allowed))
        case Named(name=name) | NamedTool(function=Named(name=name)):
            return replace(offer, must_call=True, names=(name,))
        case AllowedToolsChoice(allowed_tools=allowed):
            names = tuple(tool.function.name for tool in allowed.tools)
            return replace(offer, must_call=allowed.mode == "required", names=names)
    return offer


@contextmanager
def _as_value_error() -> Iterator[None]:
    """As pydantic wants it."""
    try:
        yield
    except ChatError as error:
        raise ValueError(str(error)) from error
