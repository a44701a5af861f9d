"""What a reader makes of a reply's text: however it is cut into pieces, the same text and the same calls."""

import json

import pytest

from llama2_chat.tools import PLAIN, Arguments, CallReader, Started
from tests.support.toolbox import FUNCTIONARY_STYLE, LLAMA_3_STYLE, MISTRAL_STYLE, QWEN_STYLE, call, read

STYLES = {
    "plain": PLAIN,
    "Qwen": QWEN_STYLE,
    "Llama 3": LLAMA_3_STYLE,
    "Mistral": MISTRAL_STYLE,
    "Functionary": FUNCTIONARY_STYLE,
}
PARIS = call("get_weather", '{"city": "Paris"}')
ODD = call("get_weather", json.dumps({"city": 'a "b" \\', "more": {"x": ["}", "{", []], "é": "\\\\"}}))
NOW = call("clock", "{}")


def both_ways(text, style):
    """Read whole and letter by letter."""
    whole, by_letter = read([text], style), read(text, style)
    assert whole[:2] == by_letter[:2]
    return whole


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("written", [PARIS, ODD, NOW], ids=["Paris", "odd", "clock"])
def test_a_call_is_read_back_as_it_was_written(style, written):
    text, calls, reader = both_ways(style.write(written), style)
    assert (text, calls, reader.calls) == ("", [written], [written])


@pytest.mark.parametrize("style", [PLAIN, QWEN_STYLE, MISTRAL_STYLE, FUNCTIONARY_STYLE])
def test_several_calls_are_read_in_their_order(style):
    text, calls, reader = both_ways(style.write(PARIS, ODD, NOW), style)
    assert (text, calls, reader.calls) == ("", [PARIS, ODD, NOW], [PARIS, ODD, NOW])


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize(
    "text", ["Hello!", " \n", '{"a": 1}', '{"name": "Bob", "age": 4}', "a < b", "<tool", "{", "<tool_calls>"]
)
def test_what_only_looks_like_a_call_is_text(style, text):
    assert both_ways(text, style)[:2] == (text, [])


def test_a_call_may_follow_a_text_where_it_has_a_marker():
    text, calls, _ = both_ways(f"I look.\n\n{QWEN_STYLE.write(PARIS)}", QWEN_STYLE)
    assert (text, calls) == ("I look.", [PARIS])


def test_a_call_of_an_unknown_tool_is_text():
    text, calls, _ = both_ways(PLAIN.write(call("rm", "{}")), PLAIN)
    assert (text, calls) == (PLAIN.write(call("rm", "{}")), [])


def test_the_name_comes_first_and_alone_and_the_arguments_in_pieces():
    reader = CallReader(PLAIN, ["get_weather"])
    told = [delta for piece in PLAIN.write(PARIS) for delta in reader.read(piece)]
    assert told[0] == Started(0, "get_weather")
    assert told[1:] == [Arguments(0, letter) for letter in PARIS["arguments"]]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_call_that_was_cut_off_is_never_among_those_that_are_whole(style):
    whole = style.write(PARIS)
    for end in range(len(whole) - len(style.closing) + len(style.end)):
        text, _, reader = read([whole[:end]], style)
        assert reader.calls == []
        assert style.opening not in text
        held = read([whole[:end]], style, may_be_cut=True)
        assert held[1] == []


def test_what_is_held_is_told_once_the_call_is_whole():
    text, calls, reader = read(PLAIN.write(PARIS), PLAIN, may_be_cut=True)
    assert (text, calls, reader.calls) == ("", [PARIS], [PARIS])
