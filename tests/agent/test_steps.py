"""A step is read while it is written, however it is cut into pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.agent import Calculator, Clock
from llama2_chat.agent.steps import StepReader, grammar, write


def read(text, size):
    reader = StepReader()
    return reader, "".join(reader.feed(text[start : start + size]) for start in range(0, len(text), size))


@given(st.text(st.characters(codec="utf-8")), st.integers(1, 9), st.booleans())
def test_an_answer_comes_whole_whatever_its_characters_and_pieces(answer, size, ascii_only):
    text = json.dumps({"action": "answer", "action_input": answer}, ensure_ascii=ascii_only)
    reader, said = read(text, size)
    assert (said, reader.call()) == (answer, None)


def test_an_answer_shows_before_its_step_is_whole():
    reader = StepReader()
    assert reader.feed('{"action": "answer", "action_input": "Hel') == "Hel"
    assert reader.feed("lo \\") == "lo "
    assert reader.feed('n"}') == "\n"


def test_half_an_emoji_waits_for_its_other_half_and_a_lone_one_is_replaced():
    reader = StepReader()
    assert reader.feed('{"action": "answer", "action_input": "\\ud83d') == ""
    assert reader.feed("\\ude00 \\ud83d!") == "😀 �!"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_call_is_known_by_name_and_input_once_it_is_whole(size):
    reader, said = read(write("weather", {"city": "Zürich"}), size)
    assert (reader.action, reader.call(), said) == ("weather", ("weather", {"city": "Zürich"}), "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello!",
        "[1]",
        '{"action": 5, "action_input": 1}',
        '{"action": "x"}',
        '{"action": "x", "action_in',
        "[" * 5000,
    ],
)
def test_what_is_no_whole_step_is_no_call(text):
    assert read(text, 4)[0].call() is None


def test_a_step_calls_a_tool_as_its_schema_says_or_answers():
    options = json.loads(grammar([Calculator(), Clock()]).text)["anyOf"]
    assert [option["properties"]["action"]["const"] for option in options] == ["calculator", "clock", "answer"]
    assert options[1]["properties"]["action_input"] == {"const": "now"}
    assert len(json.loads(grammar([]).text)["anyOf"]) == 1
