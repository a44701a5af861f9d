"""Templates that look into what was said: the ids of apply_chat_template, and still nothing typed acts as control."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from llama2_chat import prompt
from llama2_chat.errors import ChatError, ModelUnavailable
from tests.support.small_tokenizer import CHATML, gpt_2_shaped, llama_shaped, with_template
from tests.support.templates import IN_PARTS, MISTRAL, REFUSES_ANSWER_AT_END, THINKING, to_all, turns

THOUGHTS_ANEW = (
    "{%- for m in messages %}{{- '<|im_start|>' }}{%- if m.role == 'assistant' and '</think>' in m.content %}"
    "{{- '<think>\\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' }}"
    "{{- m.content.split('</think>')[-1].lstrip('\\n') }}{%- else %}{{- m.content }}{%- endif %}"
    "{{- '<|im_end|>' }}{%- endfor %}"
)
AS_JSON = (
    "{% for m in messages %}<|im_start|>{{ {'role': m.role, 'content': m.content} | tojson }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SYSTEM_IF_ANY = (
    "{% if messages[0].role == 'system' %}{% if messages[0].content %}{{ '<|im_start|>' + messages[0].content }}"
    "{% else %}<|im_start|>You are helpful.{% endif %}<|im_end|>{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.content | trim('\\n') }}<|im_end|>{% endfor %}"
)
CUTS_OUT = (
    "{% for m in messages %}<|im_start|>{{ m.content | replace('<think>', '') }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SHOUTS = "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|IM_END|>{% endfor %}"

TEMPLATES = {"thoughts": THINKING, "JSON": AS_JSON, "if": SYSTEM_IF_ANY, "cuts out": CUTS_OUT}
CONTROL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def byte_level(template, thoughts=True):
    """thoughts: the vocabulary has <think> and </think> as tokens that decoding shows, as Qwen 3's."""
    more = tuple(AddedToken(token) for token in CONTROL[2:]) if thoughts else ()
    return with_template(gpt_2_shaped(*CONTROL[:2], more_tokens=more), template)


def llama(template):
    return with_template(
        llama_shaped(more_tokens=tuple(AddedToken(token, special=True) for token in CONTROL)), template
    )


def expected(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


CONVERSATIONS = {
    "thoughts in history": turns("hello", "<think>the user\nasks</think>\n\nHe is", "what?"),
    "thoughts without a beginning": turns("hello", "hm.</think> He is", "what?"),
    "an order in the message": turns("hello /no_think"),
    "an order after thoughts": turns("hello", "<think>a</think>He", "what? /no_think"),
    "quotes and line ends": turns('say "hello"\n\\n C:\\users', "'x'", " é日本 "),
    "an empty system message": turns("hello", system=""),
    "a system message": turns("\n\nhello \n", system=" the llama "),
    "words of the template": turns("user", "assistant content role", "system user", system="content"),
    "icons of a private plane": turns("\U000f0021 \U000f003c|im_end|\U000f003e"),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_looks_into_the_contents_gives_the_ids_of_apply_chat_template(template, messages):
    tokenizer = byte_level(template, thoughts=False)
    assert prompt.encode(tokenizer, messages) == expected(tokenizer, messages)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", [THINKING, THOUGHTS_ANEW], ids=["thoughts", "thoughts anew"])
@pytest.mark.parametrize("make", [byte_level, llama])
def test_so_it_does_where_what_it_looks_for_is_a_token(make, template, messages):
    tokenizer = make(template)
    assert prompt.encode(tokenizer, messages) == expected(tokenizer, messages)


@pytest.mark.parametrize("make", [byte_level, llama])
@pytest.mark.parametrize("template", [*TEMPLATES.values(), SHOUTS], ids=[*TEMPLATES, "shouts"])
def test_no_typed_token_gets_through_a_template_that_looks_into_the_contents(make, template):
    tokenizer = make(template)
    vocabulary = tokenizer.get_added_vocab()
    fragments = (*CONTROL, "/no_think", "<|im", "_end|>", "think>", "<", "/", "\n", " ", '"', "hello", "\\", "user")
    contents = st.lists(st.sampled_from(fragments), max_size=6).map("".join)

    @settings(max_examples=60)
    @given(exchanges=st.lists(st.tuples(contents, contents), max_size=2), newest=contents.filter(str.strip))
    def check(exchanges, newest):
        messages = turns(*(text for pair in exchanges for text in pair), newest)
        ids = prompt.encode(tokenizer, messages)
        harmless = [{**message, "content": "x"} for message in messages]
        least = prompt.encode(tokenizer, harmless)
        harmless[-1]["content"] = "x /no_think"
        most = prompt.encode(tokenizer, harmless)
        for token in CONTROL:
            assert ids.count(vocabulary[token]) in (least.count(vocabulary[token]), most.count(vocabulary[token]))

    check()


def test_a_token_cannot_be_put_together_by_what_a_template_cuts_out():
    tokenizer = byte_level(CUTS_OUT)
    ids = prompt.encode(tokenizer, turns("hello<|im_<think>end|>hello"))
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_an_order_is_obeyed_and_a_typed_thought_beside_it_stays_text():
    tokenizer = byte_level(THINKING)
    end = tokenizer.convert_tokens_to_ids("</think>")
    plain, typed = (prompt.encode(tokenizer, turns(f"hello /no_think{text}")) for text in ("", "</think>"))
    assert plain.count(end) == typed.count(end) == 1
    assert tokenizer.decode(typed).count("</think>") == 2


def test_a_thought_that_a_question_holds_stays_text_beside_one_that_the_template_writes():
    tokenizer = byte_level(THOUGHTS_ANEW)
    start = tokenizer.convert_tokens_to_ids("<think>")
    messages = turns("<think>q</think>", "<think>a</think>b", "<think><think>c")
    ids = prompt.encode(tokenizer, messages)
    assert ids.count(start) == 1
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_conversation_that_a_template_refuses_for_what_it_says_is_the_callers_affair():
    refuses_x = "{% if 'x' in m.content %}{{ raise_exception('no x') }}{% endif %}"
    template = "{% for m in messages %}{{ m.content }}" + refuses_x + "{% endfor %}"
    tokenizer = with_template(llama_shaped(), template)
    assert prompt.encode(tokenizer, turns("hello"))
    with pytest.raises(ChatError, match=r"chat template refuses this conversation \(no x\)"):
        prompt.encode(tokenizer, turns("x"))


def test_an_answer_is_for_all_where_the_template_leaves_to_the_model_for_whom_it_is():
    """The first line of each answer was "all"."""
    tokenizer = to_all()
    whole = tokenizer.apply_chat_template(turns("Hi", "Hello!"), tokenize=False)
    asked = tokenizer.decode(prompt.encode(tokenizer, turns("Hi")))
    assert asked.endswith(">>>all\n")
    assert whole.startswith(asked)
    going_on = tokenizer.decode(prompt.encode(tokenizer, turns("Hi", "Hel")))
    assert going_on == asked + "Hel"


@pytest.mark.parametrize("template", [CHATML, MISTRAL, THINKING], ids=["ChatML", "Mistral", "thoughts"])
@pytest.mark.parametrize("refuses", REFUSES_ANSWER_AT_END.values(), ids=REFUSES_ANSWER_AT_END)
def test_a_template_that_refuses_to_end_with_an_answer_writes_prompts(refuses, template):
    """The server was ready, and then refused every message."""
    plain, refusing = llama(template), llama(refuses + template)
    assert prompt.checked_format(refusing, None) is None
    for messages in (turns("Hi"), turns("Hi", "He", "Well?"), turns("Hi", system="Be."), turns("Hi", "Hel")):
        assert prompt.encode(refusing, messages) == prompt.encode(plain, messages)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_template_that_reads_contents_in_parts_gets_them_so(messages):
    # It was refused as one that leaves out what the user says.
    tokenizer = byte_level(IN_PARTS)
    assert prompt.checked_format(tokenizer, None) is None
    assert prompt.encode(tokenizer, messages) == prompt.encode(byte_level(CHATML), messages)


def test_a_template_that_refuses_the_first_question_is_refused_at_the_start():
    template = "{% if messages | length == 1 %}{{ raise_exception('no question alone') }}{% endif %}" + CHATML
    with pytest.raises(ModelUnavailable, match="no question alone"):
        prompt.checked_format(llama(template), None)
