"""Whether a model's own chat template takes tools, and how it then writes calls: found out by rendering some."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat.prompt.codec import codec_of, forget_codec
from llama2_chat.prompt.messages import Turn
from llama2_chat.prompt.template import RENDERING_ERRORS, ToolObject, nonce, render, template_of
from llama2_chat.types import CallStyle, Tool, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CALL_ID = "000000000"  # of as many digits as Mistral's templates ask for


def show_calls(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make text of the special tokens that calls are written with, such as Mistral's [TOOL_CALLS].

    Decoding leaves special tokens out, and no grammar can ask for them. What is typed becomes none of them either way.
    """
    if template_of(tokenizer) is None:
        return
    try:
        written = _written(tokenizer)
    except RENDERING_ERRORS:
        return
    marks = set(codec_of(tokenizer).special.findall(written.of_two or written.of_one)) if written else ()
    if not marks:
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in marks
    tokenizer.backend_tokenizer.__setstate__(json.dumps(state).encode())
    forget_codec(tokenizer)


def call_style(tokenizer: PreTrainedTokenizerBase) -> CallStyle | None:
    """How the template writes a call; None if it takes no tools, or writes calls in a way that text cannot follow.

    That is arguments that are no JSON, and special tokens around them that show_calls() has not made text of.
    """
    styles, template = codec_of(tokenizer).call_styles, template_of(tokenizer)
    if template is None:
        return None
    if template not in styles:
        try:
            styles[template] = _find(tokenizer)
        except RENDERING_ERRORS:
            styles[template] = None
    return styles[template]


def tool_object(tool: Tool) -> ToolObject:
    """As OpenAI's API has it."""
    parameters = {"type": "object", "properties": {}} if tool.parameters is None else tool.parameters
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


class _Written(NamedTuple):
    """What the assistant says where it calls tools, as a template writes it."""

    names: tuple[str, str]
    arguments: str
    of_one: str  # a call of the first name
    of_two: str  # of both; "" where the template refuses


def _find(tokenizer: PreTrainedTokenizerBase) -> CallStyle | None:
    written = _written(tokenizer)
    if written is None:
        return None
    first, second = (ToolCall(id="", name=name, arguments=written.arguments) for name in written.names)
    opening, found, rest = written.of_one.partition(first["name"])
    middle, found_arguments, closing = rest.partition(written.arguments)
    style = CallStyle(opening, middle, closing)
    if not (opening.strip() and found and found_arguments) or codec_of(tokenizer).special.search(style.write(first)):
        return None
    head, tail = style.write(first).removesuffix(closing), style.write(second).removeprefix(opening)
    between = written.of_two.removeprefix(head).removesuffix(tail)
    is_found = written.of_two == head + between + tail and between.strip()
    return CallStyle(opening, middle, closing, between) if is_found else style


def _written(tokenizer: PreTrainedTokenizerBase) -> _Written | None:
    """None for a template that does not tell of tools, or not of what they returned."""
    described, key, value, result = (nonce() for _ in range(4))
    names = nonce(), nonce()
    tools = [tool_object(Tool(name, described, {"type": "object", "properties": {}})) for name in names]
    arguments = json.dumps({key: value})
    first, second = (ToolCall(id=CALL_ID, name=name, arguments=arguments) for name in names)
    asked, answered = Turn("user", nonce(), 1), Turn("assistant", nonce(), 1)

    prompt = render(tokenizer, [asked], tools=tools)
    if described not in prompt:
        return None
    said = _after(prompt, render(tokenizer, [asked, answered], False, tools))
    before, _, ending = said.partition(answered.content)  # before it some write that nothing was thought

    def written(*calls: ToolCall) -> str:
        rendered = render(tokenizer, [asked, Turn("assistant", "", 1, calls)], False, tools)
        return _after(prompt, rendered).removeprefix(before).removesuffix(ending)

    told = Turn("tool", result, 1, call_id=CALL_ID, name=names[0])
    if result not in render(tokenizer, [asked, Turn("assistant", "", 1, (first,)), told], tools=tools):
        return None
    of_one = written(first)
    try:
        return _Written(names, arguments, of_one, written(first, second))
    except RENDERING_ERRORS:  # "This model only supports single tool-calls at once!"
        return _Written(names, arguments, of_one, "")


def _after(prompt: str, rendered: str) -> str:
    """What stands in a conversation where the prompt ends; nothing if it is another conversation."""
    return rendered.removeprefix(prompt) if rendered.startswith(prompt) else ""
