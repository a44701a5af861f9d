"""A base model completes texts and does not chat; one that was trained to fills in what stands between two."""

import pytest

from llama2_chat.errors import ChatError, PromptTooLong
from llama2_chat.types import SamplingParams
from model import ChatModel
from tests.support.code_llama import code_llama_tokenizer, one_word_model

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def code_llama(settings, tmp_path_factory):
    tokenizer = code_llama_tokenizer(tmp_path_factory.mktemp("code-llama"))
    chat = ChatModel(settings).serve(tokenizer, one_word_model(tokenizer))
    yield chat
    chat.close()


def test_an_answer_ends_at_its_mark_which_nobody_sees(code_llama):
    ids = code_llama.encode_infilling("the cat", " sat")
    with code_llama.stream_completion(ids, GREEDY) as reply:
        assert "".join(reply) == " x"  # with the space that its first word has
        assert reply.finish_reason == "stop"
        assert reply.usage.completion_tokens == 1


def test_a_text_that_is_written_as_an_editor_does_is_the_same_prompt(code_llama):
    written = code_llama.encode_text("<PRE> the cat <SUF> sat <MID>")
    assert written == code_llama.encode_infilling("the cat", " sat")
    assert code_llama.encode_text("the <PRE> the cat <SUF> sat <MID>") != written


def test_a_text_is_gone_on_with(code_llama):
    with code_llama.stream_completion(code_llama.encode_text("the"), GREEDY) as reply:
        text = "".join(reply)
    assert text.startswith(" x")
    assert reply.finish_reason == "length" or reply.usage.completion_tokens == 1


@pytest.mark.parametrize("text", ["the " * 600, "the " * 10**6], ids=["too long", "absurdly long"])
def test_a_text_that_is_too_long_is_called_a_prompt_and_no_conversation(code_llama, text):
    with pytest.raises(PromptTooLong, match=r"^This prompt is [\d,]*(too long| tokens)"):
        code_llama.stream_completion(code_llama.encode_text(text), GREEDY)
    with pytest.raises(PromptTooLong, match=r"^This prompt is "):
        code_llama.stream_completion(code_llama.encode_infilling(text, text), GREEDY)


def test_it_says_that_it_does_not_chat(code_llama):
    question = [{"role": "user", "content": "Hello"}]
    assert not code_llama.capabilities.chats
    for ask in (code_llama.stream_reply, code_llama.fit):
        with pytest.raises(ChatError, match="completes text and does not chat"):
            ask(question, GREEDY)
    with pytest.raises(ChatError, match="completes text and does not chat"):
        code_llama.encode(question)


def test_a_model_without_rows_for_the_marks_cannot_fill_in(settings, tmp_path):
    tokenizer = code_llama_tokenizer(tmp_path)
    rows = tokenizer.convert_tokens_to_ids("▁<PRE>")
    with pytest.raises(ChatError, match="cannot fill in"):
        ChatModel(settings).serve(tokenizer, one_word_model(tokenizer, rows=rows)).encode_infilling("a", "b")


def test_a_model_that_chats_cannot_either_and_says_so(chat):
    assert chat.capabilities.chats
    with pytest.raises(ChatError, match="CodeLlama-7b"):
        chat.encode_infilling("a", "b")
