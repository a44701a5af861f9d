"""Answers to go on with: the prompt of the question, then what the model has written of the answer."""

import pytest
from hypothesis import given, settings

from llama2_chat import prompt
from llama2_chat.errors import ChatError, PromptTooLong
from tests.support.small_tokenizer import chatml, llama_shaped, with_template
from tests.support.templates import GEMMA, LLAMA_3, TAGS, THINKING, hostile_dialogs, turns

HELLO = [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]  # [INST] Hello [/INST]
GOLDEN = {  # as sentencepiece with Meta's tokenizer.model gives "[INST] Hello [/INST] " and the text
    "Hi! How can": [6324, 29991, 1128, 508],
    " Hi! How can": [29871, 6324, 29991, 1128, 508],  # how Llama 2 begins most answers
    "Hi! H": [6324, 29991, 379],
    "1. Wo": [29871, 29896, 29889, 14962],
    "\nOnce": [29871, 13, 26222],
    "Hi  ": [6324, 259],
    "日本 😱": [29871, 30325, 30346, 29871, 243, 162, 155, 180],
}


@pytest.mark.parametrize("answer", GOLDEN)
def test_an_unfinished_answer_has_metas_ids_without_a_space_or_an_end(loaded_llama2, answer):
    assert prompt.encode(loaded_llama2, turns(" Hello ", answer)) == HELLO + GOLDEN[answer]


@pytest.mark.parametrize("answer", ["Hi! How can", "<s>[INST] x", "  a", "é 日本"])
def test_earlier_exchanges_are_finished_and_the_last_one_is_not(llama_tokenizer, answer):
    messages = turns("hello", "He", "what?", answer, system="Be brief.")
    before = prompt.encode(llama_tokenizer, messages[:-1], "llama-2")
    ids = prompt.encode(llama_tokenizer, messages, "llama-2")
    assert ids[: len(before)] == before
    assert ids.count(1) == 2
    assert ids.count(2) == 1
    shown = llama_tokenizer.decode(ids)
    assert shown.endswith(f"[/INST] {answer}")


@pytest.mark.parametrize("answer", ["He is", "hello ", "\n\nthe lla", "  what", "é日 😱"])
def test_another_models_answer_stands_behind_its_prompt_as_a_finished_one_would(templated, answer):
    before, whole = (prompt.encode(templated, messages) for messages in (turns("hi"), turns("hi", answer)))
    assert whole[: len(before)] == before
    written = templated.decode(whole[len(before) :])
    assert written.strip() == answer.strip()
    assert written.endswith(answer[-1])  # no trimming, no end of turn


def test_the_ids_are_those_of_transformers_where_the_template_leaves_the_answer_as_it_is():
    tokenizer, messages = chatml(), turns("hello", "He", "what", "hello the lla")
    expected = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert prompt.encode(tokenizer, messages) == expected


@pytest.mark.parametrize("template", [LLAMA_3, GEMMA, THINKING], ids=["Llama 3", "Gemma", "thoughts"])
@pytest.mark.parametrize("answer", ["He said: ", "hm, <think>a</think>b "])
def test_a_template_that_trims_answers_or_cuts_their_thoughts_leaves_an_unfinished_one_alone(template, answer):
    tokenizer = with_template(llama_shaped(), template)
    assert tokenizer.decode(prompt.encode(tokenizer, turns("hi", answer))).endswith(answer)


def test_a_line_end_after_a_prompt_that_ends_with_one_stays_a_token_of_its_own():
    """Both together are one token, which no model writes after the first."""
    tokenizer = chatml()
    before = prompt.encode(tokenizer, turns("hi"))
    line_end = tokenizer.convert_tokens_to_ids("Ċ")
    assert prompt.encode(tokenizer, turns("hi", "\nhello"))[len(before)] == line_end


VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize("answer", ["hello the", " hello the"])
def test_the_space_that_decoding_took_from_the_first_word_is_written_once(answer):
    tokenizer = with_template(llama_shaped(), VICUNA)
    assert prompt.encode(tokenizer, turns("hi", answer)) == tokenizer.encode("USER: hi ASSISTANT: hello the")


def test_nothing_typed_into_an_answer_becomes_a_control_token_or_a_tag(llama_tokenizer, templated):
    ids_of = [llama_tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS]

    @settings(max_examples=40)
    @given(hostile_dialogs)
    def check(messages):
        messages = [*messages, {"role": "assistant", "content": f"a{messages[-1]['content']}z"}]
        ids = prompt.encode(templated, messages)
        harmless = [{**message, "content": "x"} for message in messages]
        expected = prompt.encode(templated, harmless)
        for token in templated.all_special_ids:
            if token != templated.unk_token_id:
                assert ids.count(token) == expected.count(token)
        ids = prompt.encode(llama_tokenizer, messages, "llama-2")
        answer = ids[len(prompt.encode(llama_tokenizer, messages[:-1], "llama-2")) :]
        assert not {1, 2} & {*answer}
        for tag in ids_of:
            assert all(answer[t : t + len(tag)] != tag for t in range(len(answer)))

    check()


@pytest.mark.parametrize("nothing", ["", "\ufffd"])
def test_an_answer_without_a_text_is_as_good_as_none(llama_tokenizer, templated, nothing):
    for tokenizer, chat_format in ((llama_tokenizer, "llama-2"), (templated, None)):
        expected = prompt.encode(tokenizer, turns("hello"), chat_format)
        assert prompt.encode(tokenizer, turns("hello", nothing), chat_format) == expected


def test_half_a_character_at_the_end_is_left_for_the_model_to_write():
    assert prompt.check_messages(turns("hello", "He 😱\ufffd\ufffd"))[1][-1].content == "He 😱"


@pytest.mark.parametrize("messages", [turns("x", "y")[1:], turns("x", "y", system="z")[::2]], ids=["alone", "system"])
def test_an_answer_without_a_question_is_refused(messages):
    with pytest.raises(ChatError, match="an answer to go on with"):
        prompt.encode(chatml(), messages)


def test_an_unfinished_answer_and_its_question_are_never_dropped():
    tokenizer = chatml()
    messages = turns("the " * 50, "He " * 50, "the " * 40, "He " * 40, "so?", "He is")
    for dropped in (0, 2, 4):
        expected = prompt.encode(tokenizer, messages[dropped:])
        assert prompt.fit(tokenizer, messages, len(expected) + 5, 5) == (expected, dropped)
    T = len(expected)
    with pytest.raises(PromptTooLong, match=f"This message and its answer so far are {T:,} tokens, and 5 more"):
        prompt.fit(tokenizer, messages, T + 4, 5)


def test_an_endless_unfinished_answer_is_refused_unread():
    with pytest.raises(PromptTooLong):
        prompt.fit(chatml(), turns("so?", "the " * 2_000_000), 4096, 5)
