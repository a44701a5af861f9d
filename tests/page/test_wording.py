"""What the page says of a model and of an answer."""

from typing import get_args, get_type_hints

import pytest

from llama2_chat.errors import Busy
from llama2_chat.page import wording
from llama2_chat.types import Status, Usage
from tests.support.scripted import Scripted


def test_the_status_line_shows_markup_as_text():
    assert "<b>" not in wording.status_line(Status(state="ready", model="<b>", precision="int8", device="cpu"))


@pytest.mark.parametrize("phase", get_args(get_type_hints(Status)["phase"]))
def test_every_phase_of_loading_has_words(phase):
    assert wording.progress(Status(phase=phase)).endswith(" …")


def test_a_download_shows_how_far_it_is():
    status = Status(phase="download", done_bytes=1_200_000_000, total_bytes=26_000_000_000)
    assert wording.progress(status) == "Downloading the model: 1,200 of 26,000 MB"


def test_the_place_in_line_shows_until_the_request_runs():
    reply = Scripted()
    assert wording.waiting(reply) == "Reading …"
    reply.queue_position = 3
    assert wording.waiting(reply) == "Waiting in line, position 3 …"


@pytest.mark.parametrize(
    ("text", "finish_reason", "dropped", "remark"),
    [
        ("Hello", "stop", 0, ""),
        ("", "cancelled", 0, ""),
        ("Hello", "length", 0, "The answer was cut off at 'Max new tokens'."),
        (" ", "stop", 0, "The model gave an empty answer. Try again, or rephrase your message."),
        ("Hello", "stop", 1, "The oldest message no longer fits and was left out."),
        ("Hello", "stop", 2, "The 2 oldest messages no longer fit and were left out."),
        (
            "Hello",
            "length",
            4,
            "The 4 oldest messages no longer fit and were left out. The answer was cut off at 'Max new tokens'.",
        ),
    ],
)
def test_an_answer_that_has_ended_gets_a_remark_if_there_is_something_to_know(text, finish_reason, dropped, remark):
    reply = Scripted()
    reply.finish_reason, reply.usage = finish_reason, Usage(dropped_messages=dropped)
    assert wording.closing_remark(text, reply) == remark


def test_only_sentences_written_for_visitors_reach_them():
    assert wording.error_sentence(Busy("The line is full.")) == "The line is full."
    assert "secret" not in wording.error_sentence(RuntimeError("secret"))
