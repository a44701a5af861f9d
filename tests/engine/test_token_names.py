"""Tokens by their bytes: together they are the bytes of the text, wherever a letter is cut."""

import pytest

from llama2_chat.engine.token_names import TokenNames
from tests.support.small_tokenizer import chatml, llama_shaped

TEXT = "hello what is 😱 the\nllama"


@pytest.mark.parametrize("make", [chatml, llama_shaped])
def test_the_bytes_of_all_tokens_are_those_of_the_text(make):
    tokenizer = make()
    names = TokenNames(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(map(names.bytes_of, ids)).decode().lstrip() == TEXT


def test_llama_2s_tokens_keep_the_space_before_a_word(llama2_tokenizer):
    names = TokenNames(llama2_tokenizer)
    ids = llama2_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(map(names.bytes_of, ids)).decode() == f" {TEXT}"
    assert [names.name(names.bytes_of(id)) for id in (1, 278, 13, 243, 29871)] == [
        "<s>",
        " the",
        "\n",
        r"bytes:\xf0",
        " ",
    ]


def test_control_tokens_go_by_their_names_and_ids_of_the_model_alone_have_none():
    tokenizer = chatml()
    names = TokenNames(tokenizer)
    assert names.bytes_of(tokenizer.convert_tokens_to_ids("<|im_end|>")) == b"<|im_end|>"
    assert names.bytes_of(len(tokenizer) + 5) == b""
