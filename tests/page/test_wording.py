"""What the server says of a model and of an answer."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from llama2_chat.documents.store import Document
from llama2_chat.errors import Busy
from llama2_chat.page import wording
from llama2_chat.types import Status


@pytest.mark.parametrize("phase", get_args(get_type_hints(Status)["phase"]))
def test_every_phase_of_loading_has_words(phase):
    assert wording.progress(Status(phase=phase)).endswith(" …")


def test_the_status_line_says_in_what_weights_and_keys_and_values_are():
    status = Status("ready", model="small", precision="int4", kv_cache="none", device="cuda:0")
    assert wording.status_line(status) == "small · int4 on cuda:0"
    assert wording.status_line(replace(status, kv_cache="fp8")) == "small · int4, KV fp8 on cuda:0"


def test_the_status_line_says_that_a_chat_format_is_a_guess():
    status = Status("ready", model="vicuna", precision="int8", device="cpu", guesses_format=True)
    assert wording.status_line(status) == "vicuna · int8 on cpu · chats in Llama 2's format, a guess"
    assert wording.status_line(status, chats=False) == "vicuna · int8 on cpu · completes text, does not chat"


def test_a_download_shows_how_far_it_is():
    status = Status(phase="download", done_bytes=1_200_000_000, total_bytes=26_000_000_000)
    assert wording.progress(status) == "Downloading the model: 1,200 of 26,000 MB"


def test_the_place_in_line_shows_until_the_request_runs():
    assert wording.waiting(None, 0) == "Reading …"
    assert wording.waiting(None, 3) == "Waiting in line, position 3 …"


def test_a_question_waits_for_its_document_page_by_page():
    document = Document("file-1", "report.pdf", 9, "user_data", 0, "waiting", "", 40, 2, 0, ())
    assert wording.waiting(None, 0, reading=document) == "Reading \u2068report.pdf\u2069, page 3 of 40 …"


def test_metas_notice_stands_below_llama_models_only():
    assert "Copyright (c) Meta" in wording.notice("meta-llama/Llama-2-13b-chat-hf")
    assert "Meta" not in wording.notice("SmolLM2-135M-Instruct")


def test_only_sentences_written_for_visitors_reach_them():
    assert wording.error_sentence(Busy("The line is full.")) == "The line is full."
    assert "secret" not in wording.error_sentence(RuntimeError("secret"))
