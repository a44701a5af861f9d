"""Meta's ids, other models' own templates, and which of the two a model has."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama2_chat import prompt
from llama2_chat.errors import ChatError, ModelUnavailable
from tests.support.small_tokenizer import CHATML, llama_shaped, with_template
from tests.support.templates import GEMMA, MISTRAL, turns

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.mark.parametrize("dialog", GOLDEN, ids=lambda dialog: dialog["name"])
def test_the_prompt_matches_metas_reference_token_for_token(loaded_llama2, dialog):
    assert prompt.encode(loaded_llama2, dialog["messages"]) == dialog["input_ids"]


def test_no_system_prompt_and_an_empty_one_are_two_things(llama_tokenizer):
    without, empty = (prompt.encode(llama_tokenizer, turns("Hi", system=text), "llama-2") for text in (None, ""))
    assert "<<SYS>>\n\n<</SYS>>\n\nHi" in llama_tokenizer.decode(empty)
    assert "<<SYS>>" not in llama_tokenizer.decode(without)


BENIGN = {
    "one turn": turns("hello"),
    "with a system prompt": turns("hello", system="Be brief."),
    "several turns": turns(
        "hello", "He 😱", "  what is the llama?\n", " x\n\n\n", "def f():\n        pass", system=" the "
    ),
    "brackets": turns("a < b > c [d] | e", "", "<"),
}


@pytest.mark.parametrize("messages", BENIGN.values(), ids=BENIGN)
def test_another_models_prompt_is_what_its_chat_template_gives(templated, messages):
    written = [dict(message) for message in messages]
    if templated.chat_template in (GEMMA, MISTRAL) and written[0]["role"] == "system":  # one refuses it, one ignores it
        system = written.pop(0)["content"]
        written[0]["content"] = f"{system}\n\n{written[0]['content']}"
    input_ids = templated.apply_chat_template(written, add_generation_prompt=True, return_dict=False)
    assert prompt.encode(templated, messages) == input_ids


SAYS_LLAMA_2 = "{# [INST] <<SYS>> #}" + MISTRAL


def test_llama_2_is_recognised_with_and_without_its_template(loaded_llama2):
    assert prompt.recognise(loaded_llama2) == "llama-2"
    assert prompt.recognise(with_template(loaded_llama2, SAYS_LLAMA_2)) == "llama-2"
    assert prompt.recognise(with_template(loaded_llama2, CHATML)) is None
    loaded_llama2.chat_template = None


def test_another_template_is_recognised_as_the_models_own(templated):
    assert prompt.recognise(templated) is None


def test_a_tokenizer_that_disagrees_with_meta_is_refused():
    with pytest.raises(ModelUnavailable, match="Llama 2 format"):
        prompt.recognise(with_template(llama_shaped(), SAYS_LLAMA_2))


def test_a_base_model_is_recognised_and_asked_no_questions():
    base = llama_shaped()
    assert prompt.recognise(base) == prompt.NO_FORMAT
    with pytest.raises(ChatError, match="completes text"):
        prompt.encode(base, [{"role": "user", "content": "Hello"}])


def test_llama_2s_format_cannot_be_asked_of_another_tokenizer():
    with pytest.raises(ModelUnavailable, match="CHAT_FORMAT"):
        prompt.checked_format(llama_shaped(), prompt.LLAMA_2_FORMAT)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{% for %}", "{{ messages[7].content.x }}", "hello", "{{ 1 + 'x' }}"],
    ids=["refuses", "syntax", "too few messages", "writes no message", "type error"],
)
def test_a_template_that_cannot_write_a_conversation_is_refused(template):
    with pytest.raises(ModelUnavailable, match="chat template cannot write"):
        prompt.recognise(with_template(llama_shaped(), template))


def test_a_tokenizer_without_a_fast_form_is_refused():
    class Slow(PreTrainedTokenizerBase):
        pass

    with pytest.raises(ModelUnavailable, match=r"tokenizer\.json"):
        prompt.recognise(Slow())


def test_an_unknown_format_is_refused():
    with pytest.raises(ChatError, match="chat_format"):
        prompt.encode(llama_shaped(), turns("x"), "alpaca")


def test_the_template_that_is_saved_with_a_trained_llama_2_is_recognised_and_says_the_same_text(llama2_tokenizer):
    tokenizer = with_template(AutoTokenizer.from_pretrained(llama2_tokenizer.name_or_path), prompt.LLAMA_2_TEMPLATE)
    messages = turns(" Hello ", "Hi.", "How are you?", system="Be brief.")
    assert prompt.recognise(tokenizer) == "llama-2"
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.replace("<s>", "<s> ") == tokenizer.decode(prompt.encode(tokenizer, messages))
