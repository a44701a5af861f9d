"""From what the page shows to what a model reads, and back."""

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.page.messages import Shown, is_refusal, plain_messages, text_turn, verbatim


def test_remarks_and_refused_messages_never_reach_the_model():
    shown = [
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": [{"type": "text", "text": "Answer"}]},
        {"role": "assistant", "content": "The answer reached the limit.", "metadata": {"id": "remark"}},
        {"role": "user", "content": "Too long"},
        {"role": "assistant", "content": "This message is 9,999 tokens.", "metadata": {"id": "refused"}},
        {"role": "user", "content": "Stopped before an answer"},
        {"role": "assistant", "content": "Waiting", "metadata": {"id": "remark"}},
    ]
    assert [message["content"] for message in plain_messages("Now", shown, None)] == [
        "First",
        "Answer",
        "Stopped before an answer",
        "Now",
    ]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool", "content": "x"},
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "file", "file": {"path": "/etc/passwd"}}]},
        {"role": "user", "content": None},
        {},
    ],
    ids=["unknown role", "system in the middle", "a file", "nothing", "empty"],
)
def test_a_history_that_no_chat_can_have_is_refused_in_words(turn):
    with pytest.raises(ChatError):
        plain_messages("Now", [turn], None)


def test_the_system_prompt_comes_first_and_an_empty_one_is_left_out():
    assert plain_messages("Hi", [], "Be brief.")[0] == {"role": "system", "content": "Be brief."}
    assert plain_messages("Hi", [], "") == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("message", ["", " \n", None, ["Hi"]])
def test_a_message_without_words_is_asked_for_again(message):
    with pytest.raises(ChatError, match="type a message"):
        plain_messages(message, [], None)


def test_what_waits_shows_only_until_there_is_text():
    (waiting,) = Shown(waiting="Reading …").turns()
    assert "Reading …" in waiting["content"][0]["text"]
    assert Shown("Once", waiting="Reading …").turns() == [text_turn("assistant", "Once")]
    assert Shown().turns() == []


def test_a_refusal_is_marked_and_other_remarks_are_not():
    answer, remark = Shown("Once", remark="The server left.").turns()
    (refusal,) = Shown(remark="Not sent: <b>", refused=True).turns()
    assert [is_refusal(turn) for turn in (answer, remark, refusal)] == [False, False, True]
    assert "&lt;b&gt;" in refusal["content"][0]["text"]


def test_shown_texts_keep_their_indentation_and_whole_characters_only():
    texts = ["    indented\n    code", "half \ud83d", "whole \ud83d\ude00"]
    shown = verbatim(lambda turns: turns)([{"role": "user", "content": text} for text in texts])
    assert [turn["content"][0]["text"] for turn in shown] == [texts[0], "half \ufffd", "whole \U0001f600"]
