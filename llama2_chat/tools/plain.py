"""Calls and results as plain turns, for a model that was never trained for tools.

The system text names the tools, examples stand before the conversation as real turns, which helps a small model more
than examples in the system text, and every question ends with a reminder. It is added here each time anew and in the
same words to every question, so that nobody has to store it and each prompt begins as the one before it did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from llama2_chat.tools.signature import sample_arguments, signature
from llama2_chat.types import CallStyle, Message, Tool, ToolCall, ToolOffer

PLAIN = CallStyle('{"name": "', '", "arguments": ', "}", '}\n{"name": "')  # as Python writes JSON

EXAMPLES = 2  # tools that are shown in use
LONGEST_EXAMPLE = 300  # characters of arguments
MOST_NAMES = 8  # that the reminder repeats

TOLD = (
    "You can use tools. To use one, write nothing but its name and its arguments as JSON:\n"
    f"{PLAIN.opening}the name of a tool{PLAIN.middle}{{...}}{PLAIN.closing}\n"
    "You will then be told what it returned. When no tool helps, or when you know the answer, write plain text.\n"
    "The tools:\n"
)


def plain(messages: list[Message], offer: ToolOffer | None) -> list[Message]:
    """What a model is to read instead of messages with calls and results in them, and the tools that are offered.

    The result of a tool keeps its role, which is written as the user's.
    """
    turns = list(_without_calls(messages))
    if offer is None:
        return turns
    systems = [turn["content"] for turn in turns if turn["role"] == "system"]
    told = TOLD + "\n".join(f"- {signature(tool)}" for tool in offer.tools)
    examples: Iterator[Message] = ({**turn, "is_example": True} for turn in _examples(offer.tools))
    spoken = [*examples, *(turn for turn in turns if turn["role"] != "system")]
    return [_turn("system", "\n\n".join(filter(None, [*systems, told]))), *_reminded(spoken, _reminder(offer))]


def _without_calls(messages: list[Message]) -> Iterator[Message]:
    names: dict[str, str] = {}  # of the tools that were called, by the call's id
    for message in messages:
        if message["role"] == "assistant" and (calls := message.get("tool_calls")):
            names |= {call["id"]: call["name"] for call in calls}
            yield _turn("assistant", "\n".join(filter(None, [message["content"], *map(PLAIN.write, calls)])))
        elif message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""), "The tool")
            yield _turn("tool", f"{name} returned: {message['content']}")
        else:
            yield message


def _reminded(turns: list[Message], reminder: str) -> Iterator[Message]:
    """The last of several questions or results in a row has it: they become one turn."""
    for i, turn in enumerate(turns):
        is_last = turn["role"] != "assistant" and (i + 1 == len(turns) or turns[i + 1]["role"] == "assistant")
        if is_last and turn["content"].strip():
            yield {**turn, "content": f"{turn['content']}\n\n{reminder}"}
        else:
            yield turn


def _reminder(offer: ToolOffer) -> str:
    names = ", ".join(tool.name for tool in offer.tools) if len(offer.tools) <= MOST_NAMES else "as listed above"
    return f"(Write plain text, or call a tool with JSON: {names}.)"


def _examples(tools: tuple[Tool, ...]) -> Iterator[Message]:
    """Tools in use, and small talk without one."""
    shown = [(tool, sample_arguments(tool)) for tool in tools]
    short = [(tool, sample) for tool, sample in shown if len(json.dumps(sample)) <= LONGEST_EXAMPLE]
    for tool, sample in short[:EXAMPLES]:
        values = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in sample.items())
        arguments = json.dumps(sample, ensure_ascii=False)
        yield _turn("user", f"Use {tool.name}{f' with {values}' if values else ''}.")
        yield _turn("assistant", PLAIN.write(ToolCall(id="", name=tool.name, arguments=arguments)))
        yield _turn("tool", f"{tool.name} returned: OK")
        yield _turn("assistant", f"I used {tool.name}, and it returned OK.")
    yield _turn("user", "Hello!")
    yield _turn("assistant", "Hello! How can I help you?")


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}  # type: ignore[typeddict-item]  # one of its roles
