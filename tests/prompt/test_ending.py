"""How formats end an answer, found from what they write."""

import pytest
from tokenizers import AddedToken

from llama2_chat.prompt import Ending, find_ending
from tests.support.small_tokenizer import CHATML, chatml, llama_shaped, with_template
from tests.support.templates import REFUSES_ANSWER_AT_END, TEMPLATED

VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
ANOTHER_END_AT_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}"
    "{{ '<|done|>' if loop.last and not add_generation_prompt else '<|im_end|>' }}{% endfor %}"
)


def marked(*tokens, **options):
    return llama_shaped(more_tokens=tuple(AddedToken(token, special=True) for token in tokens), **options)


def ending(tokenizer, template):
    found = find_ending(with_template(tokenizer, template))
    return [*tokenizer.convert_ids_to_tokens(sorted(found.ids)), *found.strings], found.next_turn


CASES = {
    "ChatML on a Llama vocabulary": (marked("<|im_start|>", "<|im_end|>"), CHATML, "<|im_end|>"),
    "ChatML written in letters": (llama_shaped(), CHATML, "<|im_end|>"),
    "Vicuna": (llama_shaped(), VICUNA, "</s>"),
    "Vicuna on a vocabulary without </s>": (chatml(), VICUNA, "</s>"),
    "Alpaca": (llama_shaped(), ALPACA, "\n### Instruction:"),
    "the newest answer ends otherwise": (
        marked("<|im_start|>", "<|im_end|>", "<|done|>"),
        ANOTHER_END_AT_LAST,
        "<|done|>",
    ),
}


@pytest.mark.parametrize(("tokenizer", "template", "end"), CASES.values(), ids=CASES)
def test_an_answer_ends_where_the_template_ends_it(tokenizer, template, end):
    assert ending(tokenizer, template)[0] == [end]


@pytest.mark.parametrize("refuses", REFUSES_ANSWER_AT_END.values(), ids=REFUSES_ANSWER_AT_END)
@pytest.mark.parametrize("tokenizer", [marked("<|im_start|>", "<|im_end|>"), llama_shaped()], ids=["tokens", "letters"])
def test_an_answer_ends_where_it_does_before_a_question_if_the_template_refuses_to_end_with_it(tokenizer, refuses):
    assert ending(tokenizer, refuses + CHATML) == ending(tokenizer, CHATML)


def test_a_token_that_begins_the_next_turn_is_no_part_of_an_answer():
    tokenizer = marked("<|im_start|>", "<|im_end|>")
    assert ending(tokenizer, CHATML)[1] == {tokenizer.convert_tokens_to_ids("<|im_start|>")}


def test_every_template_of_these_tests_has_an_end():
    for make in TEMPLATED.values():
        found = find_ending(make())
        assert len(found.ids) == 1
        assert found.strings == ()


def test_llama_2_ends_with_its_eos(loaded_llama2):
    assert find_ending(loaded_llama2) == Ending(frozenset({2}))


def test_a_model_without_a_format_has_no_end_of_its_own():
    assert find_ending(llama_shaped()) == Ending()
