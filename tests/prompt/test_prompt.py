"""What prompt.py promises: Meta's ids, templates' ids, nothing typed that acts as control, and what fits."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from llama2_chat import prompt
from llama2_chat.errors import ChatError, ModelUnavailable, PromptTooLong
from tests.support.small_tokenizer import CHATML, WORDS, gpt_2_shaped, llama_shaped, with_template

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def turns(*contents, system=None):
    """A conversation of these contents, the user's first."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


TEMPLATED = {
    "ChatML": lambda: with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>"), CHATML),
    "Llama 3": lambda: with_template(
        gpt_2_shaped("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), LLAMA_3
    ),
    "Zephyr": lambda: with_template(llama_shaped(), ZEPHYR),
    "Zephyr, older file": lambda: with_template(llama_shaped(prepend=True), ZEPHYR),
    "Gemma": lambda: with_template(
        llama_shaped(more_tokens=(AddedToken("<start_of_turn>", special=True), AddedToken("<end_of_turn>"))), GEMMA
    ),
    "tokens that eat white space": lambda: with_template(
        llama_shaped(more_tokens=(AddedToken("<|im_start|>", rstrip=True), AddedToken("<|im_end|>", lstrip=True))),
        CHATML,
    ),
    "white space as added tokens": lambda: with_template(
        gpt_2_shaped("<|im_start|>", "<|im_end|>", more_tokens=(AddedToken("    "), AddedToken("\n\n\n"))), CHATML
    ),
    "Mistral": lambda: with_template(llama_shaped(), MISTRAL),
}


@pytest.fixture(scope="module", params=TEMPLATED)
def templated(request):
    return TEMPLATED[request.param]()


@pytest.fixture(scope="module", params=["small", "small, older file", "Llama 2's own"])
def llama_tokenizer(request):
    if request.param == "Llama 2's own":
        return request.getfixturevalue("llama2_tokenizer")
    return llama_shaped(prepend="older" in request.param)


# Llama 2's format -----------------------------------------------------------------------------------------------------

LOADERS = {
    "AutoTokenizer": AutoTokenizer.from_pretrained,
    "AutoTokenizer, legacy": lambda source: AutoTokenizer.from_pretrained(source, legacy=True),
    "LlamaTokenizer": LlamaTokenizer.from_pretrained,
    "LlamaTokenizer, legacy": lambda source: LlamaTokenizer.from_pretrained(source, legacy=True),
    "tokenizer.json alone": lambda source: PreTrainedTokenizerFast(
        tokenizer_file=cached_file(source, "tokenizer.json")
    ),
}


@pytest.fixture(scope="module", params=LOADERS)
def loaded_llama2(request, llama2_tokenizer):
    return LOADERS[request.param](llama2_tokenizer.name_or_path)


@pytest.mark.parametrize("dialog", GOLDEN, ids=lambda dialog: dialog["name"])
def test_the_prompt_matches_metas_reference_token_for_token(loaded_llama2, dialog):
    assert prompt.encode(loaded_llama2, dialog["messages"]) == dialog["input_ids"]


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


FRAGMENTS = (
    *TAGS,
    *("[INST", "INST]", "[/", "<<", "SYS", "SYS>>", "<</SYS", "[", "]", "<", ">", "/"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<|im_start|>", "<|im_end|>", "<|user|>", "<end_of_turn>"),
    *(" ", "  ", "▁", "\n", "\t", "\r\n", "\u2003", "\u200b", "\x00", "\x1c"),
    *("😱", "👨\u200d👩\u200d👧", "é", "e\u0301", "日本", "\ufeff", "hello", "llama", "the", "He"),
)
contents = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
hostile_dialogs = st.builds(
    lambda exchanges, newest, system: turns(*(text for pair in exchanges for text in pair), newest, system=system),
    st.lists(st.tuples(contents, contents), max_size=2),
    contents.filter(str.strip),
    st.none() | contents,
)


def emptied(messages):
    """The same conversation with next to nothing said."""
    return [{**message, "content": "x"} for message in messages]


def test_a_hostile_dialog_keeps_its_text_and_forges_no_turn(llama_tokenizer):
    forms = [form for tag in TAGS for form in natural_forms(llama_tokenizer, tag)]

    @settings(max_examples=200)
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


def test_a_dialog_without_a_whole_tag_keeps_metas_ids(llama_tokenizer):
    @settings(max_examples=200)
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


def test_no_system_prompt_and_an_empty_one_are_two_things(llama_tokenizer):
    without, empty = (prompt.encode(llama_tokenizer, turns("Hi", system=text), "llama-2") for text in (None, ""))
    assert "<<SYS>>\n\n<</SYS>>\n\nHi" in llama_tokenizer.decode(empty)
    assert "<<SYS>>" not in llama_tokenizer.decode(without)


# The model's own template ---------------------------------------------------------------------------------------------

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
    told = [dict(message) for message in messages]
    if templated.chat_template in (GEMMA, MISTRAL) and told[0]["role"] == "system":  # one refuses it, one ignores it
        system = told.pop(0)["content"]
        told[0]["content"] = f"{system}\n\n{told[0]['content']}"
    input_ids = templated.apply_chat_template(told, add_generation_prompt=True, return_dict=False)
    assert prompt.encode(templated, messages) == input_ids


def test_control_tokens_come_from_the_template_alone(templated):
    control = {token: id for token, id in templated.get_added_vocab().items() if token.strip()}

    @settings(max_examples=100)
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
def test_hostile_text_survives_another_models_template(name):
    tokenizer = TEMPLATED[name]()

    @settings(max_examples=100)
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


# Which format ---------------------------------------------------------------------------------------------------------

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


def test_a_base_model_is_refused():
    with pytest.raises(ModelUnavailable, match="no chat template"):
        prompt.recognise(llama_shaped())


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


# What is learnt -------------------------------------------------------------------------------------------------------

CONVERSATION = turns("hello", "what is the llama</s>", "user?", "the [INST] llama is hello", system="the hello")


def learnt(tokenizer, lesson):
    return [tokenizer.decode(lesson.input_ids[start:end]) for start, end in lesson.answers]


def test_what_is_learnt_in_the_llama_2_format_is_the_answers_with_their_eos(llama_tokenizer):
    lesson = prompt.encode_example(llama_tokenizer, CONVERSATION, {2}, "llama-2")
    assert learnt(llama_tokenizer, lesson) == ["what is the llama</s> </s>", "the [INST] llama is hello </s>"]
    assert [lesson.input_ids[end - 1] for _, end in lesson.answers] == [2, 2]
    assert lesson.input_ids.count(2) == 2  # a typed </s> is no EOS


def test_a_lesson_has_the_ids_that_the_chat_would_send(llama_tokenizer):
    lesson = prompt.encode_example(llama_tokenizer, CONVERSATION, {2}, "llama-2")
    for (start, _), T in zip(lesson.answers, (2, 4), strict=True):
        assert lesson.input_ids[:start] == prompt.encode(llama_tokenizer, CONVERSATION[:T], "llama-2")
    whole = prompt.encode(llama_tokenizer, [*CONVERSATION, *turns("hello")], "llama-2")
    assert whole[: len(lesson.input_ids)] == lesson.input_ids
    assert whole[len(lesson.input_ids)] == 1  # the next exchange begins


def test_what_is_learnt_in_a_models_own_format_ends_with_its_stop_token(templated):
    if "<|eot_id|>" in templated.get_vocab():
        pytest.skip("GPT-2's pre-tokenizer, unlike Llama 3's own, reads two line ends otherwise where a text ends")
    end = next(token for token in ("<end_of_turn>", "<|im_end|>", "</s>") if token in templated.get_vocab())
    stop_ids = {templated.convert_tokens_to_ids(end)}
    lesson = prompt.encode_example(templated, turns("hello", "the llama", "what", "is"), stop_ids)
    assert [text.strip() for text in learnt(templated, lesson)] == [f"the llama{end}", f"is{end}"]


def test_a_format_in_which_the_model_would_have_to_write_otherwise_cannot_be_learnt_from():
    tokenizer = with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>"), CHATML)
    with pytest.raises(ChatError, match="without the token that stops the model"):
        prompt.encode_example(tokenizer, turns("hello", "hello"), {0})
    with pytest.raises(ChatError, match="cannot be learnt from"):  # the template's line end and the answer's are one
        prompt.encode_example(tokenizer, turns("hello", "\n"), {tokenizer.eos_token_id})


@pytest.mark.parametrize("messages", [turns("hello"), turns("hello", "hello", "hello"), []])
def test_a_conversation_to_learn_from_ends_with_an_answer(messages):
    with pytest.raises(ChatError, match=r"ends with an answer|starts with"):
        prompt.encode_example(llama_shaped(), messages, {2}, "llama-2")


# At the door ----------------------------------------------------------------------------------------------------------


MALFORMED = {
    "none": ([], "starts with"),
    "only a system message": (turns(system="x"), "starts with"),
    "no list": ("hello", "list of messages"),
    "no message": (["hello"], "list of messages"),
    "unknown role": ([{"role": "tool", "content": "x"}], "'tool'"),
    "no role": ([{"content": "x"}], "'None'"),
    "no content": ([{"role": "user"}], "plain text"),
    "content parts": ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "plain text"),
    "blank": (turns(" \n"), "empty"),
    "blank after another": ([*turns("x"), *turns(" ")], "empty"),
    "assistant first": (turns("x", "y", "z")[1:], "starts with"),
    "assistant last": (turns("x", "y"), "ends with"),
    "late system": ([*turns("x", "y"), *turns("z", system="s")], "first message"),
}


@pytest.mark.parametrize(("messages", "sentence"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_get_a_sentence(messages, sentence):
    with pytest.raises(ChatError, match=sentence):
        prompt.encode(llama_shaped(), messages, "llama-2")


def test_two_turns_in_a_row_are_joined_by_a_blank_line(llama_tokenizer):
    joined = prompt.encode(llama_tokenizer, turns("one\n\ntwo", "three\n\nfour", "five"), "llama-2")
    asked, answered = turns("one", "three")
    in_a_row = [asked, {**asked, "content": "two"}, answered, {**answered, "content": "four"}, *turns("five")]
    assert prompt.encode(llama_tokenizer, in_a_row, "llama-2") == joined


def test_half_an_emoji_becomes_a_replacement_character(llama_tokenizer, templated):
    for tokenizer, chat_format in ((llama_tokenizer, "llama-2"), (templated, None)):
        expected = prompt.encode(tokenizer, turns("a\ufffdb 😱"), chat_format)
        assert prompt.encode(tokenizer, turns("a\ud83db \ud83d\ude31"), chat_format) == expected


# What fits ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama-2", "its own template"])
def speaker(request):
    """A tokenizer and the format to use it with."""
    if request.param == "llama-2":
        return llama_shaped(), "llama-2"
    return TEMPLATED["ChatML"](), None


HISTORY = turns(*(f"what is {i}? " * (i % 7) + "the llama" for i in range(40)), "so?", system="Be brief.")


def test_what_fits_is_left_whole(speaker):
    tokenizer, chat_format = speaker
    input_ids = prompt.encode(tokenizer, HISTORY, chat_format)
    assert prompt.fit(tokenizer, HISTORY, len(input_ids) + 5, 5, chat_format) == (input_ids, 0)


@pytest.mark.parametrize("room", [150, 300, 512, 1000, 1500])
def test_whole_oldest_exchanges_are_dropped_and_no_more_than_needed(speaker, room):
    tokenizer, chat_format = speaker
    fitted = prompt.fit(tokenizer, HISTORY, room + 64, 64, chat_format)
    lengths = {}  # dropped messages -> what is left, the obvious way
    for dropped in range(0, len(HISTORY) - 1, 2):
        lengths[dropped] = prompt.encode(tokenizer, HISTORY[:1] + HISTORY[1 + dropped :], chat_format)
    assert fitted.dropped_messages == min(dropped for dropped, ids in lengths.items() if len(ids) <= room)
    assert fitted.input_ids == lengths[fitted.dropped_messages]


def test_dropped_messages_are_counted_as_the_caller_gave_them(speaker):
    tokenizer, chat_format = speaker
    asked, answered, newest = turns("the " * 300, "He", "so?")
    fitted = prompt.fit(tokenizer, [asked, asked, asked, answered, newest], 400, 100, chat_format)
    assert fitted == (prompt.encode(tokenizer, [newest], chat_format), 4)


def test_a_message_that_cannot_fit_is_refused_with_the_numbers(speaker):
    tokenizer, chat_format = speaker
    messages = turns("the " * 3000, system="Be brief.")
    T = len(prompt.encode(tokenizer, messages, chat_format))
    with pytest.raises(
        PromptTooLong, match=f"This message is {T:,} tokens, and 100 more .* is 1,024 tokens.*Shorten it"
    ):
        prompt.fit(tokenizer, messages, 1024, 100, chat_format)


def test_a_refusal_says_how_long_an_answer_may_be_asked_for(speaker):
    tokenizer, chat_format = speaker
    messages = turns("the " * 50)
    T = len(prompt.encode(tokenizer, messages, chat_format))
    with pytest.raises(PromptTooLong, match=f"ask for an answer of at most {4096 - T:,} tokens"):
        prompt.fit(tokenizer, messages, 4096, 4096, chat_format)
    assert prompt.fit(tokenizer, messages, 4096, 4096 - T, chat_format).dropped_messages == 0


def test_a_system_prompt_that_is_too_long_is_named(speaker):
    tokenizer, chat_format = speaker
    with pytest.raises(PromptTooLong, match="Shorten the system prompt"):
        prompt.fit(tokenizer, turns("Hi", system="the " * 3000), 1024, 100, chat_format)


def test_a_megabyte_and_a_thousand_turns_take_a_moment(speaker):
    """Generous limits: the true tokenizers take about 0.6 s and 0.02 s."""
    tokenizer, chat_format = speaker
    history = turns(*["the llama is what? " * 5] * 2000)
    start = time.monotonic()
    assert prompt.fit(tokenizer, [*history, *turns("so?")], 4096, 1024, chat_format).dropped_messages > 1000
    with pytest.raises(PromptTooLong):
        prompt.fit(tokenizer, [*history, *turns("hello [INST] " * 80_000)], 4096, 1024, chat_format)
    assert time.monotonic() - start < 10
