"""From ids to text: what stands before an answer, and stop strings that are special tokens."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken

from llama2_chat.engine.reply import StreamedReply
from llama2_chat.engine.request import Likelihood
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


def told(tokenizer, ids, stop=(), before=()):
    """The text piece by piece, each with the tokens that came with it, and where they begin in the text."""
    reply = StreamedReply(tokenizer, ENGINE, stop, Usage(), before)
    logprobs = [Likelihood(-float(n), [(5, -0.5)]) for n in range(len(ids))]
    params = SamplingParams(logprobs=1)
    reply.request = SimpleNamespace(finish_reason="length", cached_tokens=0, params=params, logprobs=logprobs)
    for id in ids:
        reply.put(torch.tensor([id]))
    reply.end()
    found, seen = [], 0
    for piece in reply:
        found.append((piece, [each.chosen.token for each in reply.logprobs[seen:]]))
        seen = len(reply.logprobs)
    found += [("", [each.chosen.token for each in reply.logprobs[seen:]])] if reply.logprobs[seen:] else []
    assert [each.chosen.logprob for each in reply.logprobs] == [-float(n) for n in range(len(reply.logprobs))]
    return found, [each.offset for each in reply.logprobs]


def test_each_piece_of_text_brings_its_tokens_and_their_logprobs():
    tokenizer = llama_shaped()
    before, rest = split(tokenizer, "hello what is the llama", len("hello what"))
    pieces = [(" is", [" is"]), (" the", [" the"]), (" ", [" "]), ("llama", ["llama"])]
    assert told(tokenizer, rest, before=before) == (pieces, [0, 3, 7, 8])


def test_a_stop_string_takes_the_tokens_of_its_text_along_and_leaves_the_one_that_it_cuts():
    tokenizer = llama_shaped()
    before, rest = split(tokenizer, "hello what is the llama", len("hello what"))
    assert told(tokenizer, rest, ["the llama"], before)[0] == [(" is", [" is"]), (" ", []), ("", [" the"])]
    assert told(tokenizer, rest, [" the llama"], before)[0] == [(" is", [" is"])]
    held_back = [(" is", [" is"]), (" the llama", [" the", " ", "llama"])]
    assert told(tokenizer, rest, [" the llama is"], before)[0] == held_back


def test_the_tokens_of_one_letter_come_with_it():
    tokenizer = llama_shaped()
    ids = tokenizer("hello 😱")["input_ids"]
    (_, hello), (letter, tokens) = told(tokenizer, ids[-5:], before=ids[:-5])[0][-2:]
    assert (letter, tokens) == ("😱", [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\xb1"])
    assert told(tokenizer, ids[-4:], ["😱"], ids[:-4]) == ([], [])
    assert told(tokenizer, ids[-4:-1], (), ids[:-4])[0] == [("\ufffd" * 3, tokens[:3])]
    assert hello


def test_special_tokens_that_a_stop_string_names_are_no_characters():
    tokenizer = chatml()
    ids = tokenizer("hello<|im_end|>hello", add_special_tokens=False)["input_ids"]
    pieces, offsets = told(tokenizer, ids, ["<|im_end|>\n"])
    assert pieces[-1] == ("hello", ["<|im_end|>", "hello"])
    assert offsets[-2:] == [5, 5]


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
