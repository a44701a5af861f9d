"""What may enter, and a sentence for what may not."""

import pytest

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from tests.support.small_tokenizer import CHATML, chatml, llama_shaped, with_template
from tests.support.templates import turns

MALFORMED = {
    "none": ([], "starts with"),
    "only a system message": (turns(system="x"), "starts with"),
    "no list": ("hello", "list of messages"),
    "no message": (["hello"], "list of messages"),
    "unknown role": ([{"role": "critic", "content": "x"}], "'critic'"),
    "no role": ([{"content": "x"}], "'None'"),
    "no content": ([{"role": "user"}], "plain text"),
    "content parts": ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "plain text"),
    "blank": (turns(" \n"), "empty"),
    "blank after another": ([*turns("x"), *turns(" ")], "empty"),
    "assistant first": (turns("x", "y", "z")[1:], "starts with"),
    "assistant alone": (turns("x", "y")[1:], "ends with"),
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


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_several_system_messages_become_the_first(llama_tokenizer, templated, at):
    talk = turns("one", "two", "three")
    more = {"role": "system", "content": "In French."}
    messages = [{"role": "system", "content": "Be brief."}, *talk[: at % 4], more, *talk[at % 4 :]]
    joined = turns("one", "two", "three", system="Be brief.\n\nIn French.")
    for tokenizer, chat_format in ((llama_tokenizer, "llama-2"), (templated, None)):
        assert prompt.encode(tokenizer, messages, chat_format) == prompt.encode(tokenizer, joined, chat_format)


def test_a_system_message_may_come_late():
    messages = [*turns("one"), {"role": "system", "content": "Be brief."}]
    assert prompt.check_messages(messages)[0] == "Be brief."
    with pytest.raises(ChatError, match="empty"):
        prompt.check_messages([*turns(" "), messages[1]])
    assert prompt.check_messages(messages) == prompt.check_messages(turns("one", system="Be brief."))


def test_a_greeting_comes_first_where_the_template_allows_it():
    greeting = turns("x", "hello", "what")[1:]
    tokenizer = chatml()
    expected = tokenizer.apply_chat_template(greeting, add_generation_prompt=True, return_dict=False)
    assert prompt.encode(tokenizer, greeting) == expected
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    with pytest.raises(ChatError, match=r"refuses this conversation \(roles must alternate\).*from the user"):
        prompt.encode(with_template(llama_shaped(), strict + CHATML), greeting)
