"""The tools of a row, calls of them and what they returned, as OpenAI, ShareGPT and others write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llama2_chat.errors import ChatError
from llama2_chat.training.row_formats import is_empty
from llama2_chat.types import Tool, ToolCall, ToolOffer

CALLERS = {"function_call", "tool_call"}  # roles of messages that are calls
RESULTS = {"tool", "function", "observation", "tool_response", "ipython"}  # roles of what came back
OFFERS = ("tools", "functions")  # columns with tools, as OpenAI calls them today and called them before
CALLS = ("tool_calls", "function_call")  # fields of an answer with calls


def read_tools(columns: dict[str, Any]) -> tuple[Tool, ...]:
    """Those of the column tools, or functions; none if there is none. Raises ChatError if they make no sense."""
    given = next((columns[name] for name in OFFERS if not is_empty(columns.get(name))), None)
    if given is None:
        return ()
    written = _parsed(given)
    try:
        found = tuple(_tool(tool) for tool in written)
        return ToolOffer(found).tools if found else ()
    except (TypeError, KeyError, AttributeError) as error:
        raise ChatError("its tools are not a list of functions with a name and parameters.") from error


def with_calls(messages: list[Any]) -> list[Any]:
    """The messages with their calls and results as the chat has them. Raises ChatError for a result without a call."""
    turns = [_turn(message) for message in messages]
    waiting: list[str] = []  # ids of calls whose results are still to come
    number = 0
    for turn in turns:
        if not isinstance(turn, dict):
            continue
        for call in turn.get("tool_calls") or ():
            number += 1
            call["id"] = call["id"] or f"call{number:05}"
            waiting.append(call["id"])
        if turn.get("role") == "tool":
            if not waiting:
                raise ChatError("it has the result of a tool that nobody called.")
            given = turn.get("tool_call_id")
            turn["tool_call_id"] = waiting.pop(waiting.index(given) if given in waiting else 0)
    return turns


def _turn(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    rest = {name: value for name, value in message.items() if name not in (*CALLS, "name")}
    role = str(message.get("role"))
    if role in CALLERS:
        return rest | {"role": "assistant", "content": "", "tool_calls": list(_calls(message.get("content")))}
    if role in RESULTS:
        content = message.get("content")
        return rest | {"role": "tool", "content": content if isinstance(content, str) else _json(content)}
    written = [message[name] for name in CALLS if not is_empty(message.get(name))]
    if role != "assistant" or not written:
        return message
    content = "" if is_empty(message.get("content")) else message["content"]
    return rest | {"content": content, "tool_calls": [call for each in written for call in _calls(each)]}


def _calls(written: Any) -> Iterator[ToolCall]:
    """Raises ChatError for what is none."""
    found = _parsed(written)
    for call in found if isinstance(found, list) else [found]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise ChatError("a call of a tool is not JSON with a name and arguments.")
        # Written anew, as the grammar of a chat has it: data often leaves out the spaces.
        arguments = _json(_parsed(function.get("arguments") or {}))
        yield {"id": str(call.get("id") or ""), "name": function["name"], "arguments": arguments}


def _tool(written: dict[str, Any]) -> Tool:
    function = written.get("function", written)
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or None)


def _parsed(value: Any) -> Any:
    """JSON that is in a text, as CSV and ShareGPT have it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ChatError("its tools or calls are not JSON.") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
