"""Messages in, token ids out. Weights, devices, sampling and the page are unknown in this room.

messages   what may enter, checked
formats    Llama 2's format to the letter, any other model's through its own chat template
codec      text to ids; typed words never become control tokens or tags of the template
fitting    what fits in the context window
examples   conversations to train on
"""

from llama2_chat.prompt.codec import encode_text
from llama2_chat.prompt.examples import TokenizedExample, encode_example
from llama2_chat.prompt.fitting import Fitted, fit
from llama2_chat.prompt.formats import GOLDEN, LLAMA_2_FORMAT, LLAMA_2_TEMPLATE, encode, recognise
from llama2_chat.prompt.messages import Turn, check_messages

__all__ = [
    "GOLDEN",
    "LLAMA_2_FORMAT",
    "LLAMA_2_TEMPLATE",
    "Fitted",
    "TokenizedExample",
    "Turn",
    "check_messages",
    "encode",
    "encode_example",
    "encode_text",
    "fit",
    "recognise",
]
