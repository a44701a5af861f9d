"""Messages in, token ids out. Weights, devices, sampling and the page are unknown in this room.

messages   what may enter, checked
formats    Llama 2's format to the letter, and which format a model has
template   any other model's own chat template, safe from what was typed
calls      whether a template takes tools, and how it writes calls
ending     how a format ends an answer
codec      text to ids; typed words never become control tokens or tags of the template
fitting    what fits in the context window
examples   conversations to train on
infilling  what stands between two texts
"""

from llama2_chat.prompt.calls import call_style, show_calls, tool_object
from llama2_chat.prompt.codec import INFILLING_PIECES, check_length, decode, encode_text
from llama2_chat.prompt.ending import Ending, find_ending
from llama2_chat.prompt.examples import TokenizedExample, encode_example
from llama2_chat.prompt.fitting import Fitted, check_prompt, fit, subject_of
from llama2_chat.prompt.formats import (
    BASE_MODEL,
    GOLDEN,
    LLAMA_2_FORMAT,
    LLAMA_2_TEMPLATE,
    NO_FORMAT,
    checked_format,
    encode,
    recognise,
    without_results,
)
from llama2_chat.prompt.infilling import (
    NO_INFILLING,
    Infilling,
    encode_infilling,
    find_infilling,
    head_ids,
    written_infilling,
)
from llama2_chat.prompt.messages import (
    Turn,
    check_messages,
    droppable,
    goes_on,
    newest_turns,
    question_indices,
    split_examples,
)

__all__ = [
    "BASE_MODEL",
    "GOLDEN",
    "INFILLING_PIECES",
    "LLAMA_2_FORMAT",
    "LLAMA_2_TEMPLATE",
    "NO_FORMAT",
    "NO_INFILLING",
    "Ending",
    "Fitted",
    "Infilling",
    "TokenizedExample",
    "Turn",
    "call_style",
    "check_length",
    "check_messages",
    "check_prompt",
    "checked_format",
    "decode",
    "droppable",
    "encode",
    "encode_example",
    "encode_infilling",
    "encode_text",
    "find_ending",
    "find_infilling",
    "fit",
    "goes_on",
    "head_ids",
    "newest_turns",
    "question_indices",
    "recognise",
    "show_calls",
    "split_examples",
    "subject_of",
    "tool_object",
    "without_results",
    "written_infilling",
]
