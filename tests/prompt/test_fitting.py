"""What fits in the context window, and the numbers of a refusal."""

import time

import pytest

from llama2_chat import prompt
from llama2_chat.errors import PromptTooLong
from llama2_chat.prompt import fitting
from tests.support.small_tokenizer import chatml, llama_shaped, with_template
from tests.support.templates import TEMPLATED, THINKING, turns


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


def test_examples_that_are_too_long_are_named_and_a_megabyte_of_them_stays_unread(speaker):
    tokenizer, chat_format = speaker

    def refused(words):
        examples = [{**turn, "is_example": True} for turn in turns("the " * words, "He")]
        with pytest.raises(PromptTooLong) as error:
            prompt.fit(tokenizer, [*examples, *turns("Hi")], 1024, 100, chat_format)
        return error.value

    assert "Shorten the system prompt or its examples" in str(refused(2_000))
    assert refused(2_000).prompt_tokens > 2_000
    assert refused(10**6).prompt_tokens == 0  # nobody knows them


def test_a_megabyte_and_a_thousand_turns_take_a_moment(speaker):
    """Generous limits: the true tokenizers take about 0.6 s and 0.02 s."""
    tokenizer, chat_format = speaker
    history = turns(*["the llama is what? " * 5] * 2000)
    start = time.monotonic()
    assert prompt.fit(tokenizer, [*history, *turns("so?")], 4096, 1024, chat_format).dropped_messages > 1000
    with pytest.raises(PromptTooLong):
        prompt.fit(tokenizer, [*history, *turns("hello [INST] " * 80_000)], 4096, 1024, chat_format)
    assert time.monotonic() - start < 10


def test_a_greeting_goes_before_the_first_exchange_does():
    tokenizer = TEMPLATED["ChatML"]()
    messages = [{"role": "assistant", "content": "hello " * 20}, *turns("the " * 40, "He " * 10, "so?")]
    whole, asked, newest = (prompt.encode(tokenizer, messages[start:]) for start in (0, 1, 3))
    for expected, dropped in ((whole, 0), (asked, 1), (newest, 3)):
        assert prompt.fit(tokenizer, messages, len(expected) + 5, 5) == (expected, dropped)


def test_an_exchange_whose_thoughts_the_template_leaves_out_is_kept():
    tokenizer = with_template(chatml(), THINKING)
    messages = turns("what?", "the " * 5000 + "</think>He", "so?")
    expected = prompt.encode(tokenizer, messages)
    assert len(expected) < 100
    assert prompt.fit(tokenizer, messages, 140, 40) == (expected, 0)


@pytest.mark.parametrize("where", ["a tool", "a call"])
def test_megabytes_are_refused_unread_wherever_a_template_would_write_them(monkeypatch, where):
    # 9 MB in the description of a tool were read whole: 15 s and 2.4 GB.
    megabytes = "word " * 400_000
    tools = [{"type": "function", "function": {"name": "f", "description": megabytes}}] if where == "a tool" else []
    call = {"id": "1", "name": "f", "arguments": f'{{"x": "{megabytes}"}}'}
    messages = turns("Hi")
    if where == "a call":
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
        ]
    tokenizer = TEMPLATED["ChatML"]()
    monkeypatch.setattr(fitting, "writer", lambda *_: pytest.fail("it was read"))
    for refused in (
        lambda: prompt.check_prompt(tokenizer, messages, tools, 4096),
        lambda: prompt.fit(tokenizer, messages, 4096, 100, tools=tools),
    ):
        with pytest.raises(PromptTooLong):
            refused()
