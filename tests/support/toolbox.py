"""Tools to offer in a test, and what a reader makes of a text."""

from llama2_chat.tools import Arguments, CallReader, Started, Text
from llama2_chat.types import CallStyle, Tool

WEATHER = Tool(
    "get_weather",
    "The weather in a city.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its name"},
            "unit": {"type": "string", "enum": ["c", "f"]},
        },
        "required": ["city"],
    },
)
CALCULATOR = Tool(
    "calculator",
    "Computes.",
    {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
)
CLOCK = Tool("clock")
QWEN_BETWEEN = '}\n</tool_call>\n<tool_call>\n{"name": "'
QWEN_STYLE = CallStyle('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", QWEN_BETWEEN)
MISTRAL_STYLE = CallStyle(
    '[TOOL_CALLS] [{"name": "',
    '", "arguments": ',
    ', "id": "000000000"}]',
    ', "id": "000000000"}, {"name": "',
)
FUNCTIONARY_STYLE = CallStyle("<function=", ">", "</function>", "</function><function=")
LLAMA_3_STYLE = CallStyle('{"name": "', '", "parameters": ', "}")


def call(name, arguments, id=""):
    return {"id": id, "name": name, "arguments": arguments}


def function(tool):
    """As programs send it."""
    more = {} if tool.parameters is None else {"parameters": tool.parameters}
    return {"name": tool.name, "description": tool.description, **more}


def read(pieces, style, names=("get_weather", "clock"), may_be_cut=False):
    """The text and the calls that were told of piece by piece, and the reader."""
    reader, text, calls = CallReader(style, names, lambda: may_be_cut), "", []
    for delta in [delta for piece in pieces for delta in reader.read(piece)] + reader.finish():
        match delta:
            case Text(more):
                text += more
            case Started(index, name):
                assert index == len(calls)
                calls.append(call(name, ""))
            case Arguments(index, more):
                calls[index]["arguments"] += more
    return text, calls, reader
