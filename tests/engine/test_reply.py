"""From ids to text: what stands before an answer, and stop strings that are special tokens."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken

from llama2_chat.engine.reply import StreamedReply
from llama2_chat.types import SamplingParams, Usage
from tests.support.small_tokenizer import chatml, llama_shaped

ENGINE = SimpleNamespace(cancel=lambda request: None)


def pieces(tokenizer, ids, stop=(), before=(), params=SamplingParams()):
    """What a reader gets of these ids, one by one, and why it ends."""
    reply = StreamedReply(tokenizer, ENGINE, stop, Usage(), before)
    reply.request = SimpleNamespace(finish_reason="length", cached_tokens=0, params=params)
    for id in ids:
        reply.put(torch.tensor([id]))
    reply.end()
    return list(reply), reply.finish_reason


def text(tokenizer, ids, stop=(), before=()):
    return "".join(pieces(tokenizer, ids, stop, before)[0])


def split(tokenizer, whole, at):
    """The ids of a text, those of its first characters and those of the rest."""
    head = tokenizer(whole[:at])["input_ids"]
    ids = tokenizer(whole)["input_ids"]
    assert ids[: len(head)] == head
    return head, ids[len(head) :]


@pytest.mark.parametrize("prepend", [False, True], ids=["newer file", "older file"])
def test_a_text_that_is_gone_on_with_keeps_the_space_before_the_next_word(prepend):
    """A program saw "Once upon a" go on with "time there was"."""
    tokenizer = llama_shaped(prepend=prepend)
    before, rest = split(tokenizer, "hello what is the llama", len("hello what"))
    assert text(tokenizer, rest, before=before) == " is the llama"
    assert text(tokenizer, rest) == "is the llama"  # an answer is a text of its own
    assert text(tokenizer, rest, stop=[" the"], before=before) == " is"
    assert pieces(tokenizer, rest, stop=[" is"], before=before) == ([], "stop")


def test_llama_2_goes_on_with_the_space_before_the_next_word(llama2_tokenizer):
    before, rest = split(llama2_tokenizer, "Once upon a time there was 日本 😱", len("Once upon a"))
    assert text(llama2_tokenizer, rest, before=before) == " time there was 日本 😱"
    assert pieces(llama2_tokenizer, rest, stop=[" time"], before=before) == ([], "stop")
    assert text(llama2_tokenizer, rest, before=[1]) == "time there was 日本 😱"


def test_a_character_begun_in_the_prompt_is_shown_whole_and_nothing_else_of_the_prompt():
    tokenizer = llama_shaped()
    ids = tokenizer("hello 😱")["input_ids"]
    for cut in (1, 2, 3):
        assert text(tokenizer, ids[-cut:], before=ids[:-cut]) == "😱"


def test_stray_bytes_after_a_prompt_break_no_answer():
    tokenizer = llama_shaped()
    ids = tokenizer.convert_tokens_to_ids(["▁hello", "▁the", "<0x32>", "<0xA6>", "▁is"])
    assert text(tokenizer, ids[1:], before=ids[:1]) == " the2\ufffd is"


def test_a_decoder_that_fails_in_another_way_is_not_taken_for_a_stray_byte(monkeypatch):
    tokenizer = llama_shaped()
    ids = tokenizer("hello what")["input_ids"]
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", None)
    with pytest.raises(TypeError):
        text(tokenizer, ids)


@pytest.mark.parametrize(
    ("stop", "shown", "reason"),
    [
        (["<|im_end|>"], "hello", "stop"),
        (["<|im_end|>\n<|im_start|>user"], "hello", "stop"),
        (["lo<|im_end|>"], "hel", "stop"),
        (["<|im_end|>x", "<|im_start|>a"], "hello\nuserhello", "length"),
        (["im_end", "|"], "hello\nuserhello", "length"),  # letters of a token's name are no text
    ],
)
def test_a_stop_string_may_be_a_special_token(stop, shown, reason):
    """Special tokens are skipped in decoding, so that a program's stop=["<|im_end|>"] was never found."""
    tokenizer = chatml()
    ids = tokenizer("hello<|im_end|>\n<|im_start|>userhello", add_special_tokens=False)["input_ids"]
    read, ended = pieces(tokenizer, ids, stop)
    assert ("".join(read), ended) == (shown, reason)


def test_no_stop_string_cuts_the_text_of_the_first_min_tokens():
    tokenizer = llama_shaped()
    ids = tokenizer("hello the hello the llama")["input_ids"]
    until = {n: "".join(pieces(tokenizer, ids, ["the"], params=SamplingParams(min_tokens=n))[0]) for n in (1, 2, 3, 4)}
    first, second = "hello ", "hello the hello "
    assert until == {1: first, 2: second, 3: second, 4: "hello the hello the llama"}


def test_a_special_token_that_the_model_spells_out_is_found_too():
    tokenizer = chatml()
    ids = tokenizer("hello<|im_end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert pieces(tokenizer, ids, ["<|im_end|>"])[1] == "stop"
    assert text(tokenizer, ids, ["<|im_end|>"]) == "hello"


def test_a_token_that_decoding_does_not_skip_is_found_once():
    tokenizer = llama_shaped(more_tokens=(AddedToken("<end>", special=False),))
    ids = tokenizer("hello<end>hello", add_special_tokens=False)["input_ids"]
    assert text(tokenizer, ids, ["<end>"]) == "hello"


def test_without_a_match_special_tokens_stay_hidden():
    tokenizer = chatml()
    ids = tokenizer("hello<|im_end|>hello", add_special_tokens=False)["input_ids"]
    assert text(tokenizer, ids, ["<|im_end|>\n"]) == "hellohello"
