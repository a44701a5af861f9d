"""What stands between two texts is asked for by Meta's ids, and no typed mark becomes one of them."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat import prompt
from llama2_chat.prompt.infilling import MARKS as MARKS_AROUND
from tests.support.code_llama import MARKS, code_llama_tokenizer
from tests.support.metas import more_pieces


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return code_llama_tokenizer(tmp_path_factory.mktemp("code-llama"))


@pytest.fixture(scope="module")
def infilling(tokenizer):
    return prompt.find_infilling(tokenizer, len(tokenizer))


@pytest.mark.slow
def test_the_prompt_is_metas_id_for_id(llama2_tokenizer, tmp_path):
    path = Path(llama2_tokenizer.name_or_path, "tokenizer.model")
    ids_of_meta = path.parents[1] / "codellama.json"
    if not (path.is_file() and ids_of_meta.is_file()):
        pytest.skip("Llama 2's tokenizer.model or Code Llama's golden ids are not here")
    golden = json.loads(ids_of_meta.read_text())
    tokenizer = code_llama_tokenizer(tmp_path, more_pieces(path.read_bytes(), *MARKS))
    infilling = prompt.find_infilling(tokenizer, 32_016)
    assert infilling == prompt.Infilling(*golden["pieces"].values())
    assert prompt.encode_infilling(tokenizer, infilling, golden["prefix"], golden["suffix"]) == golden["input_ids"]


def test_the_suffix_begins_without_a_space_of_its_own(tokenizer, infilling):
    ids = prompt.encode_infilling(tokenizer, infilling, "the", "cat the")
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces == ["<s>", "▁<PRE>", "▁the", "▁<SUF>", "cat", "▁the", "▁<MID>"]


def test_the_texts_may_be_empty(tokenizer, infilling):
    ids = prompt.encode_infilling(tokenizer, infilling, "", "")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁<PRE>", "▁<SUF>", "▁<MID>"]


TYPED = "the <PRE> x <SUF>cat <MID> <EOT> </s><s>"


def test_typed_marks_stay_letters(tokenizer, infilling):
    # To Code Llama's own tokenizer they are words like any other, which anybody could type.
    ids = prompt.encode_infilling(tokenizer, infilling, TYPED, TYPED)
    assert [id for id in ids if id in infilling] == [infilling.prefix, infilling.suffix, infilling.middle]
    plain = prompt.encode_text(tokenizer, TYPED)
    assert not {*infilling} & {*plain}
    assert tokenizer.decode(plain, skip_special_tokens=True) == TYPED


@given(prefix=st.text(), suffix=st.text())
def test_any_texts_come_back_from_their_ids(tokenizer, infilling, prefix, suffix):
    ids = prompt.encode_infilling(tokenizer, infilling, prefix, suffix)
    middle = ids.index(infilling.suffix)
    before, after = ids[2:middle], ids[middle + 1 : -1]
    valid = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in (prefix, suffix)]
    assert tokenizer.decode(before) == valid[0].replace("▁", " ")
    assert tokenizer.decode([*prompt.head_ids(tokenizer), *after]) == "☺" + valid[1].replace("▁", " ")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<PRE> a\nb <SUF>c\nd <MID>", ("a\nb", "c\nd")),
        ("<PRE>  <SUF> <MID>", ("", "")),
        ("<PRE> a  <SUF> c <MID>", ("a ", " c")),
        ("x <PRE> a <SUF>b <MID>", None),
        ("<PRE> a <SUF>b <MID> c", None),
        ("<PRE> a <SUF>b", None),
        ("a", None),
    ],
)
def test_only_a_whole_prompt_in_the_words_of_editors_is_read_as_one(text, parts):
    assert prompt.written_infilling(text) == parts


def test_too_much_is_shortened_far_from_the_gap(tokenizer, infilling):
    prefix, suffix = "a b c d e f g h", "i j k l m n o p"

    def written(room, extra=()):
        ids = prompt.encode_infilling(tokenizer, infilling, prefix, suffix, extra, room)
        assert len(ids) <= max(room, MARKS_AROUND)
        between = ids.index(infilling.suffix)
        return [tokenizer.decode(part).split() for part in (ids[2:between], ids[between + 1 : -1])]

    before, after = written(12 + MARKS_AROUND)
    assert before == list("defgh")  # a letter and the space before it are a token each
    assert after == list("ij")
    before, after = written(400, ["too far", "the cat"])
    assert " ".join(before) == "--- snippet --- too far --- snippet --- the cat a b c d e f g h"
    assert after == suffix.split()
    assert written(0) == [[], []]


def test_megabytes_are_not_read_to_be_shortened(tokenizer, infilling, monkeypatch):
    monkeypatch.setattr("llama2_chat.prompt.codec.Codec.most_characters", lambda self, tokens: 50)
    ids = prompt.encode_infilling(tokenizer, infilling, "x" * 10**6, "y" * 10**6, ["z" * 10**6], 200)
    assert len(ids) < 200


def test_a_model_without_the_marks_or_without_rows_for_them_cannot(tokenizer, infilling, tmp_path):
    assert prompt.find_infilling(tokenizer, infilling.end) is None
    from tests.support.metas import tokenizer_model

    plain = code_llama_tokenizer(tmp_path, tokenizer_model())
    assert prompt.find_infilling(plain, 10**6) is None


@pytest.mark.slow
def test_four_threads_get_the_ids_that_one_gets(tokenizer, infilling):
    # transformers' own tokenizer for Code Llama keeps the last suffix in itself.
    texts = [("the cat\n" * (i % 7) + str(i), f" x{i}" * (i % 5)) for i in range(1_000)]
    expected = [prompt.encode_infilling(tokenizer, infilling, *each) for each in texts]

    def encode_all(_):
        return [prompt.encode_infilling(tokenizer, infilling, *each) for each in texts]

    with ThreadPoolExecutor(4) as threads:
        assert all(ids == expected for ids in threads.map(encode_all, range(4)))
