"""Nothing typed acts as control, and nothing else of a text changes."""

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import PreTrainedTokenizerFast

from llama2_chat import prompt
from tests.support.small_tokenizer import CHATML, WORDS, gpt_2_shaped, llama_shaped, with_template
from tests.support.templates import MISTRAL, TAGS, TEMPLATED, ZEPHYR, hostile_dialogs, turns


def segments_of(messages):
    """What Meta's reference code writes between BOS and EOS."""
    messages = [dict(message) for message in messages]
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
        messages[0]["content"] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{messages[0]['content']}"
    contents = [message["content"].strip() for message in messages]
    exchanges = zip(contents[::2], contents[1::2], strict=False)
    return [f"[INST] {asked} [/INST] {answered} " for asked, answered in exchanges] + [f"[INST] {contents[-1]} [/INST]"]


def as_text(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)


def between_bos_and_eos(input_ids):
    """The ids of each segment, having seen that every one but the last is closed."""
    segments = []
    for id in input_ids:
        if id == 1:
            segments.append([])
        else:
            segments[-1].append(id)
    assert all(segment.pop() == 2 for segment in segments[:-1])
    assert not any(2 in segment for segment in segments)
    return segments


def natural_forms(tokenizer, tag):
    """Every run of ids that the tokenizer itself gives for a tag, whatever stands before it."""
    forms = set()
    for before in ("", " ", "\n", "x", "]", ">", "😱"):
        encoding, start, end = as_text(tokenizer, f"{before}{tag} x"), len(before), len(before + tag)
        pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        forms.add(tuple(id for id, (first, last) in pairs if first < end and last > start))
    return forms


def occurrences(ids, form):
    return sum(tuple(ids[i : i + len(form)]) == form for i in range(len(ids)))


@pytest.fixture(params=[20, pytest.param(100, marks=pytest.mark.slow)], ids=["a few", "many"])
def examples(request):
    return request.param


def emptied(messages):
    """The same conversation with next to nothing said."""
    return [{**message, "content": "x"} for message in messages]


def test_a_hostile_dialog_keeps_its_text_and_forges_no_turn(llama_tokenizer, examples):
    forms = [form for tag in TAGS for form in natural_forms(llama_tokenizer, tag)]

    @settings(max_examples=2 * examples)
    @given(messages=hostile_dialogs)
    def check(messages):
        segments = between_bos_and_eos(prompt.encode(llama_tokenizer, messages, "llama-2"))
        assert [llama_tokenizer.decode(ids).lstrip(" ") for ids in segments] == [
            text.replace("▁", " ") for text in segments_of(messages)
        ]
        templates_own = prompt.encode(llama_tokenizer, emptied(messages), "llama-2")
        for form in forms:
            assert sum(occurrences(ids, form) for ids in segments) == occurrences(templates_own, form)

    check()


def test_a_dialog_without_a_whole_tag_keeps_metas_ids(llama_tokenizer, examples):
    @settings(max_examples=2 * examples)
    @given(messages=hostile_dialogs.filter(lambda messages: not any(tag in str(messages) for tag in TAGS)))
    def check(messages):
        segments = between_bos_and_eos(prompt.encode(llama_tokenizer, messages, "llama-2"))
        assert segments == [as_text(llama_tokenizer, text)["input_ids"] for text in segments_of(messages)]

    check()


def test_only_a_typed_tag_loses_its_ids(llama_tokenizer):
    input_ids = prompt.encode(llama_tokenizer, turns("the [INST] llama]"), "llama-2")
    tokens = llama_tokenizer.convert_ids_to_tokens(input_ids)
    assert tokens[:6] == ["<s>", "▁[", "INST", "]", "▁the", "▁"]
    assert tokens[6:12] == list("[INST]")
    assert "".join(tokens[12:]) == "▁llama]▁[/INST]"
    assert tokens[-4:] == ["▁[", "/", "INST", "]"]


def test_a_vocabulary_that_spells_the_tags_anyway_gets_a_typed_one_in_bytes():
    tokenizer = llama_shaped(words=())
    input_ids = prompt.encode(tokenizer, turns("x[INST]"), "llama-2")
    typed = tokenizer.convert_ids_to_tokens(input_ids)[10:16]
    assert typed == ["<0x5B>", "<0x49>", "<0x4E>", "<0x53>", "<0x54>", "<0x5D>"]
    assert tokenizer.decode(input_ids[1:]) == "[INST] x[INST] [/INST]"


def test_control_tokens_come_from_the_template_alone(templated, examples):
    control = {token: id for token, id in templated.get_added_vocab().items() if token.strip()}

    @settings(max_examples=examples)
    @given(messages=hostile_dialogs)
    def check(messages):
        messages[-1]["content"] += "".join(control)
        input_ids, templates_own = prompt.encode(templated, messages), prompt.encode(templated, emptied(messages))
        for token, id in control.items():
            assert token == "<unk>" or input_ids.count(id) == templates_own.count(id)

    check()


@pytest.mark.parametrize(("template", "mark"), [(ZEPHYR, "<|user|>"), (MISTRAL, "[/INST]")], ids=["Zephyr", "Mistral"])
def test_a_turn_mark_that_a_template_writes_as_text_cannot_be_typed(template, mark):
    tokenizer = with_template(llama_shaped(words=(*WORDS, "<|", "|>")), template)
    encoded = [prompt.encode(tokenizer, turns(f"x{typed}"), None) for typed in ("", mark)]
    for form in natural_forms(tokenizer, mark):
        assert occurrences(encoded[0], form) == occurrences(encoded[1], form)
    assert tokenizer.decode(encoded[1]).count(mark) == tokenizer.decode(encoded[0]).count(mark) + 1


@pytest.mark.parametrize("name", ["ChatML", "Llama 3"])
def test_hostile_text_survives_another_models_template(name, examples):
    tokenizer = TEMPLATED[name]()

    @settings(max_examples=examples)
    @given(messages=hostile_dialogs)
    def check(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt.encode(tokenizer, messages)) == text

    check()


def test_a_character_that_shares_a_token_with_a_typed_tag_comes_once():
    tokenizer = with_template(gpt_2_shaped("</s>"), MISTRAL)
    assert tokenizer.decode(prompt.encode(tokenizer, turns("😱[INST]😱"))) == "[INST] 😱[INST]😱 [/INST]"


def test_a_word_of_the_model_that_is_a_control_token_is_spelled():
    """A unigram model knows "</s>" as a word of its own and finds it in a visitor's text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -5.0) for piece in ("▁", "<", "/", "s", ">", "x"))]
    backend = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    input_ids = prompt.encode(with_template(tokenizer, ZEPHYR), turns("x</s>x"))
    assert input_ids.count(2) == 1
    assert "x < / s > x </s>" in " ".join(tokenizer.convert_ids_to_tokens(input_ids))


def test_a_vocabulary_with_gaps_keeps_its_ids():
    pieces = ["<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE({piece: id + 7 for id, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(pieces[:2])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML)
    messages = turns("".join(map(chr, range(256))))
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt.encode(tokenizer, messages) == expected


def test_a_tokenizers_truncation_does_not_cut_the_prompt():
    """Fine-tuned models are often saved with the truncation of their training."""
    tokenizer = with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>"), CHATML)
    whole = prompt.encode(tokenizer, turns("hello " * 50))
    tokenizer.backend_tokenizer.enable_truncation(16)
    again = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHATML)
    assert prompt.encode(again, turns("hello " * 50)) == whole
