"""What is read as the JSON of a request, and the sentence for what is not."""

import json

import pytest

from llama2_chat.server.bodies import MAX_DEPTH, parse
from llama2_chat.server.errors import ApiError

REFUSED = {
    "empty": (b" \n", "The body is empty. Send a JSON object."),
    "cut": (
        b'{"a": 1,\n',
        "The body is not JSON: Expecting property name enclosed in double quotes at line 2, column 1.",
    ),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "The body is not UTF-8: invalid continuation byte at byte 7."),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "The body is not UTF-8: invalid start byte at byte 0."),
    "encoded surrogate": (b'"\xed\xa0\xbd"', "The body is not UTF-8: invalid continuation byte at byte 1."),
    "NaN": (b'{"a": NaN}', "The body is not JSON: it holds NaN, and JSON has no such number."),
    "infinity": (b"[-Infinity]", "The body is not JSON: it holds -Infinity, and JSON has no such number."),
    "large": (b"[1e999]", "The body holds a number that is too large for any field."),
    "long": (b'{"a": -1' + b"0" * 309 + b"}", "The body holds a number that is too large for any field."),
    "long and late": (
        b'{"a": "' + b"word " * 99 + b'", "b": ' + b"9" * 309 + b"}",
        "The body holds a number that is too large for any field.",
    ),
    "very long": (b"1" * 5000, "The body holds a number that is too large for any field."),
    "twice": (b'[{"a": {"b": 1, "c": 2, "b": 1}}]', "The body has 'b' twice in one object. Send it once."),
    "deep": (b"[" * 100_000, f"The body is nested too deeply; {MAX_DEPTH} levels are read."),
    "rather deep": (
        b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
        f"The body is nested too deeply; {MAX_DEPTH} levels are read.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_json_is_refused_with_the_reason(case):
    body, sentence = REFUSED[case]
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.body["error"] == {
        "message": sentence,
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_json",
    }
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, 1e300, True, None, "é😀"], "b": {"a": {}}},
        {"digits": "9" * 5000, "number": 10**300},
        [[] for _ in range(MAX_DEPTH)],
        json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH),
    ],
    ids=["kinds", "digits", "many lists", "deepest"],
)
@pytest.mark.parametrize("ensure_ascii", [True, False], ids=["escaped", "as it is"])
def test_plain_json_is_read_as_it_is(value, ensure_ascii):
    assert parse(json.dumps(value, ensure_ascii=ensure_ascii).encode()) == value


def test_a_byte_order_mark_is_passed_over():
    assert parse(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_half_a_character_becomes_the_one_that_stands_for_it():
    body = rb'{"\ude00": ["\ud83d", "\ud83d\ude00", "\\ud83d"]}'
    assert parse(body) == {"\ufffd": ["\ufffd", "😀", r"\ud83d"]}


def test_a_whole_number_may_be_written_as_a_float():
    assert [type(number) for number in parse(b"[256.0, 1e3, -0.0, 0.5, 1e300]")] == [int, int, int, float, float]
