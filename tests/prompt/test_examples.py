"""What a model is trained on: the chat's own ids, and of them what it has to write."""

import pytest

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from tests.support.small_tokenizer import CHATML, gpt_2_shaped, llama_shaped, with_template
from tests.support.templates import turns

CONVERSATION = turns("hello", "what is the llama</s>", "user?", "the [INST] llama is hello", system="the hello")


def labels(tokenizer, example):
    return [tokenizer.decode(example.input_ids[start:end]) for start, end in example.answers]


def test_what_is_learnt_in_the_llama_2_format_is_the_answers_with_their_eos(llama_tokenizer):
    example = prompt.encode_example(llama_tokenizer, CONVERSATION, {2}, "llama-2")
    assert labels(llama_tokenizer, example) == ["what is the llama</s> </s>", "the [INST] llama is hello </s>"]
    assert [example.input_ids[end - 1] for _, end in example.answers] == [2, 2]
    assert example.input_ids.count(2) == 2  # a typed </s> is no EOS


def test_what_is_learnt_in_a_models_own_format_ends_with_its_stop_token(templated):
    if "<|eot_id|>" in templated.get_vocab():
        pytest.skip("GPT-2's pre-tokenizer, unlike Llama 3's own, reads two line ends otherwise where a text ends")
    end = next(token for token in ("<end_of_turn>", "<|im_end|>", "</s>") if token in templated.get_vocab())
    stop_ids = {templated.convert_tokens_to_ids(end)}
    example = prompt.encode_example(templated, turns("hello", "the llama", "what", "is"), stop_ids)
    assert [text.strip() for text in labels(templated, example)] == [f"the llama{end}", f"is{end}"]


def test_a_format_in_which_the_model_would_have_to_write_otherwise_cannot_be_learnt_from():
    tokenizer = with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>"), CHATML)
    with pytest.raises(ChatError, match="without the token that stops the model"):
        prompt.encode_example(tokenizer, turns("hello", "hello"), {0})
    with pytest.raises(ChatError, match="cannot be trained on"):  # the template's line end and the answer's are one
        prompt.encode_example(tokenizer, turns("hello", "\n"), {tokenizer.eos_token_id})


def test_an_example_has_the_ids_that_the_chat_would_send(llama_tokenizer):
    example = prompt.encode_example(llama_tokenizer, CONVERSATION, {2}, "llama-2")
    for (start, _), T in zip(example.answers, (2, 4), strict=True):
        assert example.input_ids[:start] == prompt.encode(llama_tokenizer, CONVERSATION[:T], "llama-2")
    whole = prompt.encode(llama_tokenizer, [*CONVERSATION, *turns("hello")], "llama-2")
    assert whole[: len(example.input_ids)] == example.input_ids
    assert whole[len(example.input_ids)] == 1  # the next exchange begins


@pytest.mark.parametrize("messages", [turns("hello"), turns("hello", "hello", "hello"), []])
def test_a_conversation_to_learn_from_ends_with_an_answer(messages):
    with pytest.raises(ChatError, match=r"ends with an answer|starts with"):
        prompt.encode_example(llama_shaped(), messages, {2}, "llama-2")
