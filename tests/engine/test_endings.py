"""Answers of a whole model that end where its chat template ends them, and prompts to be continued."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
from tokenizers import AddedToken

from llama2_chat.settings import Settings
from llama2_chat.types import SamplingParams
from model import ChatModel
from tests.support.rote_model import rote_model
from tests.support.small_tokenizer import CHATML, llama_shaped, with_template
from tests.support.templates import turns

ENDS_IN_LETTERS = (
    "{% for m in messages %}{{ m['content'] + '[END]' }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=40)


@contextmanager
def saying(tokenizer, said, prompt_ends_with):
    """A ChatModel that answers with this text, control tokens and all, whatever it is asked."""
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    (after,) = tokenizer.convert_tokens_to_ids([prompt_ends_with])
    chat = ChatModel(Settings()).serve(tokenizer, rote_model(tokenizer, ids, after))
    try:
        yield chat
    finally:
        chat.close()


def chatml_on_llama(**options):
    tokens = (AddedToken("<|im_start|>", **options), AddedToken("<|im_end|>", **options))
    return with_template(llama_shaped(more_tokens=tokens), CHATML)


@pytest.mark.parametrize("special", [True, False])
def test_an_answer_ends_with_its_turn_though_the_end_token_is_not_the_tokenizers_eos(special):
    """A visitor read "Hellouser What next?": ChatML on Llama's vocabulary, whose EOS is </s>."""
    with saying(chatml_on_llama(special=special), "He<|im_end|><|im_start|>user what", "<0x0A>") as chat:
        with chat.stream_reply(turns("hello"), GREEDY) as reply:
            assert "".join(reply) == "He"
        assert reply.finish_reason == "stop"
        assert reply.usage.completion_tokens == 2  # the space and the word


def test_an_answer_ends_with_its_turn_though_the_template_writes_the_end_in_letters():
    tokenizer = with_template(llama_shaped(), ENDS_IN_LETTERS)
    sixteen = replace(GREEDY, stop=tuple("12345678PQRSTUVW"))  # as many as a caller may give
    with saying(tokenizer, "He[END]!?", ">") as chat:
        for trim in (True, False):
            with chat.stream_reply(turns("hello"), sixteen, trim=trim) as reply:
                assert "".join(reply) == "He"
            assert reply.finish_reason == "stop"
        with chat.stream_completion(chat.encode_text("x>"), GREEDY) as reply:  # a text is no turn
            assert "".join(reply).startswith(" He[END]!?")


def test_a_text_is_gone_on_with_from_the_space_before_the_next_word():
    tokenizer = chatml_on_llama()
    with saying(tokenizer, " what is the", "▁hello") as chat:
        prompt = chat.encode_text("hello")
        with chat.stream_completion(prompt, replace(GREEDY, max_new_tokens=3)) as reply:
            assert "".join(reply) == " what is the"
        with chat.stream_completion(prompt, replace(GREEDY, stop=(" is",))) as reply:
            assert "".join(reply) == " what"
        assert reply.finish_reason == "stop"
