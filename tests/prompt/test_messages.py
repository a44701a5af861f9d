"""What may enter, and a sentence for what may not."""

import pytest

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from tests.support.small_tokenizer import llama_shaped
from tests.support.templates import turns

MALFORMED = {
    "none": ([], "starts with"),
    "only a system message": (turns(system="x"), "starts with"),
    "no list": ("hello", "list of messages"),
    "no message": (["hello"], "list of messages"),
    "unknown role": ([{"role": "tool", "content": "x"}], "'tool'"),
    "no role": ([{"content": "x"}], "'None'"),
    "no content": ([{"role": "user"}], "plain text"),
    "content parts": ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "plain text"),
    "blank": (turns(" \n"), "empty"),
    "blank after another": ([*turns("x"), *turns(" ")], "empty"),
    "assistant first": (turns("x", "y", "z")[1:], "starts with"),
    "assistant last": (turns("x", "y"), "ends with"),
    "late system": ([*turns("x", "y"), *turns("z", system="s")], "first message"),
}


@pytest.mark.parametrize(("messages", "sentence"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_get_a_sentence(messages, sentence):
    with pytest.raises(ChatError, match=sentence):
        prompt.encode(llama_shaped(), messages, "llama-2")


def test_two_turns_in_a_row_are_joined_by_a_blank_line(llama_tokenizer):
    joined = prompt.encode(llama_tokenizer, turns("one\n\ntwo", "three\n\nfour", "five"), "llama-2")
    asked, answered = turns("one", "three")
    in_a_row = [asked, {**asked, "content": "two"}, answered, {**answered, "content": "four"}, *turns("five")]
    assert prompt.encode(llama_tokenizer, in_a_row, "llama-2") == joined


def test_half_an_emoji_becomes_a_replacement_character(llama_tokenizer, templated):
    for tokenizer, chat_format in ((llama_tokenizer, "llama-2"), (templated, None)):
        expected = prompt.encode(tokenizer, turns("a\ufffdb 😱"), chat_format)
        assert prompt.encode(tokenizer, turns("a\ud83db \ud83d\ude31"), chat_format) == expected
