"""Tools for a model that only writes text: what it is told of them, what it may write, and which calls that is.

plain      conversations with calls and results as plain turns, for a model whose template takes no tools
signature  a tool as one line of text, and arguments that it would take
grammar    an answer or calls, as a grammar that decides the first step
schemas    parameters that can be met in few tokens
reading    from a reply's text, as it comes, to text and calls
json_only  the same for a server that takes JSON schemas only

No HTTP, no template and no token is known here; nothing is run.
"""

from llama2_chat.tools.grammar import answer_grammar
from llama2_chat.tools.json_only import JsonOnly, json_only_grammar
from llama2_chat.tools.plain import PLAIN, plain
from llama2_chat.tools.reading import Arguments, CallReader, Delta, Started, Text

BEGUN = "An answer that has begun cannot call tools. Ask for it from the beginning, or with tool_choice none."

__all__ = [
    "BEGUN",
    "PLAIN",
    "Arguments",
    "CallReader",
    "Delta",
    "JsonOnly",
    "Started",
    "Text",
    "answer_grammar",
    "json_only_grammar",
    "plain",
]
