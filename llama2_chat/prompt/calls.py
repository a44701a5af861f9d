"""Whether a model's own chat template takes tools, and how it then writes calls: found out by rendering some."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llama2_chat.prompt.codec import codec_of
from llama2_chat.prompt.messages import Turn
from llama2_chat.prompt.template import RENDERING_ERRORS, ToolObject, nonce, render, template_of
from llama2_chat.types import CallStyle, Tool, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def call_style(tokenizer: PreTrainedTokenizerBase) -> CallStyle | None:
    """How the template writes a call; None if it takes no tools, or writes calls in a way that text cannot follow.

    That is arguments that are no JSON, and special tokens around them, which decoding leaves out.
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


def _find(tokenizer: PreTrainedTokenizerBase) -> CallStyle | None:
    described, key, value, result = (nonce() for _ in range(4))
    names = nonce(), nonce()
    tools = [tool_object(Tool(name, described, {"type": "object", "properties": {}})) for name in names]
    arguments = json.dumps({key: value})
    first, second = (ToolCall(id=str(i) * 9, name=name, arguments=arguments) for i, name in enumerate(names))
    asked, answered = Turn("user", nonce(), 1), Turn("assistant", nonce(), 1)

    prompt = render(tokenizer, [asked], tools=tools)
    if described not in prompt:
        return None
    said = _after(prompt, render(tokenizer, [asked, answered], False, tools))
    before, _, ending = said.partition(answered.content)  # before it some write that nothing was thought

    def written(*calls: ToolCall) -> str:
        """What the assistant then says."""
        rendered = render(tokenizer, [asked, Turn("assistant", "", 1, calls)], False, tools)
        return _after(prompt, rendered).removeprefix(before).removesuffix(ending)

    opening, found, rest = written(first).partition(first["name"])
    middle, found_arguments, closing = rest.partition(arguments)
    style = CallStyle(opening, middle, closing)
    told = Turn("tool", result, 1, call_id=first["id"], name=first["name"])
    if not (found and found_arguments and "{" in opening) or codec_of(tokenizer).special.search(style.write(first)):
        return None
    if result not in render(tokenizer, [asked, Turn("assistant", "", 1, (first,)), told], tools=tools):
        return None
    try:
        between = written(first, second).removeprefix(style.write(first)).removesuffix(style.write(second))
    except RENDERING_ERRORS:  # "This model only supports single tool-calls at once!"
        return style
    return CallStyle(opening, middle, closing, between) if between.strip() in ("", ",", ";") else style


def _after(prompt: str, rendered: str) -> str:
    """What stands in a conversation where the prompt ends; nothing if it is another conversation."""
    return rendered.removeprefix(prompt) if rendered.startswith(prompt) else ""
