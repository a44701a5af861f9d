"""How a message is answered, in a real browser and by programs: streaming, stopping, refusing, and nothing locks it."""

import re
import threading
from contextlib import ExitStack, closing
from dataclasses import replace

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import expect

from llama2_chat.errors import Busy, ModelUnavailable
from llama2_chat.page.wording import SYSTEM_PROMPT
from llama2_chat.remote import RemoteModel
from llama2_chat.remote.faults import CUT, INCOMPLETE
from llama2_chat.remote.health import OWN_TEMPLATE
from llama2_chat.types import Status
from tests.support.browser import (
    BEGUN,
    LIKELIEST,
    LONG,
    SHORT,
    answers,
    ask,
    box,
    expect_unlocked,
    open_settings,
    send,
    stop,
)
from tests.support.odd_server import HEAD, OddServer, event, reset, silence, status
from tests.support.scripted import HERE, READY, Scripted, ScriptedChat, raising, spy
from tests.support.serving import busy, serving


def test_the_page_streams_an_answer_and_stops_when_asked(page):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    begun = answers(page).last.inner_text()
    expect(answers(page).last).not_to_have_text(begun)  # it grows
    stop(page)
    kept = answers(page).last.inner_text()
    page.wait_for_timeout(500)
    assert answers(page).last.inner_text() == kept
    assert kept.startswith(begun[:5])


def test_the_next_question_after_a_stopped_one_is_answered(page, chat):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    stop(page)
    ask(page)
    expect(answers(page)).to_have_count(2)


def test_the_place_in_line_shows_and_stop_leaves_the_line(page, chat):
    question = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": LONG}]
    with busy(chat, question, replace(LIKELIEST, max_new_tokens=4096)):
        send(page, SHORT)
        expect(page.get_by_text("Waiting in line, position 1 …")).to_be_visible()
        stop(page)
        expect(page.get_by_text("Stopped before an answer began.")).to_be_visible()
        expect(page.get_by_text("Waiting in line")).to_be_hidden()


def test_stop_acts_while_a_long_message_is_read(page):
    send(page, "The tide comes in and the tide goes out. " * 600)
    expect(page.get_by_text("Reading …")).to_be_visible()
    stop(page)
    expect(page.get_by_text("Stopped before an answer began.")).to_be_visible()


def test_an_answer_that_hits_the_limit_says_so(short_answers):
    ask(short_answers, LONG)
    expect(short_answers.get_by_text("The answer was cut off at 'Max new tokens'.")).to_be_visible()


def test_the_page_says_how_many_old_messages_no_longer_fit(short_answers, chat, monkeypatch):
    monkeypatch.setattr(chat, "context_length", 600)
    ask(short_answers, "The tide comes in and the tide goes out. " * 40)
    ask(short_answers)
    expect(short_answers.get_by_text("no longer fit")).to_have_count(0)
    ask(short_answers, "The tide comes in and the tide goes out. " * 40)
    expect(short_answers.get_by_text("The 2 oldest messages no longer fit and were left out.")).to_be_visible()


def test_an_error_while_answering_keeps_what_was_written_and_unlocks_the_page(page, chat, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(chat, "stream_reply", lambda *_: Scripted("Once upon", error=RuntimeError("CUDA secret")))
        send(page, SHORT)
        expect(page.get_by_test_id("toast-body")).to_contain_text("Something went wrong on the server")
        expect_unlocked(page)
    expect(page.get_by_text("Once upon")).to_be_visible()
    expect(page.get_by_text("secret")).to_have_count(0)
    ask(page)


def test_a_message_that_finds_the_line_full_goes_back_into_the_box(page, chat, monkeypatch):
    monkeypatch.setattr(chat, "stream_reply", raising(Busy("The line is full.")))
    send(page, "A question that took long to write")
    expect(page.get_by_test_id("toast-body")).to_contain_text("The line is full.")
    expect(box(page)).to_have_value("A question that took long to write")
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_count(0)


def test_a_megabyte_is_refused_with_its_size_and_comes_back_into_the_box(page):
    send(page, "word " * 200_000)
    expect(page.get_by_test_id("toast-body")).to_contain_text("tokens", timeout=30_000)
    expect(box(page)).to_have_value(re.compile("^word word"))
    expect_unlocked(page)


def test_a_blank_message_asks_for_words(page):
    send(page, "   ")
    expect(page.get_by_test_id("toast-body")).to_contain_text("Please type a message first.")
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_count(0)


@pytest.mark.parametrize(
    "typed", ["\\ud83d hello", "\\u0000\\u0007\\u001b[31m hello"], ids=["half an emoji", "control characters"]
)
def test_letters_that_are_none_are_answered_all_the_same(short_answers, typed):
    box(short_answers).evaluate(f"box => {{ box.value = '{typed}'; box.dispatchEvent(new Event('input')) }}")
    box(short_answers).press("Enter")
    expect(answers(short_answers)).to_have_count(1, timeout=20_000)
    expect_unlocked(short_answers)


def test_a_setting_that_makes_no_sense_is_refused_in_words_and_nothing_is_lost(page):
    open_settings(page)
    page.get_by_role("textbox", name="Seed").fill("lucky")
    send(page, SHORT)
    expect(page.get_by_test_id("toast-body")).to_contain_text("seed must be a whole number")
    expect(box(page)).to_have_value(SHORT)


def test_while_the_model_loads_the_page_shows_how_far_it_is_and_a_message_waits(browser, settings):
    chat = ScriptedChat(Status(phase="download", done_bytes=120_000_000, total_bytes=269_000_000))
    with serving(chat, settings) as address, browser.new_page() as page:
        page.goto(address)
        expect(page.locator("#status")).to_have_text("Downloading the model: 120 of 269 MB")
        send(page, SHORT)
        expect(answers(page).last).to_contain_text("Downloading the model: 120 of 269 MB")
        chat.status = READY
        expect_unlocked(page)
        expect(answers(page)).to_have_text(["Hello!"])
        expect(page.locator("#status")).to_have_text("scripted · paper on desk. A test wrote it.")


def test_a_model_that_could_not_be_loaded_is_said_on_the_page_and_at_every_question(browser, settings):
    reason = "The licence of Llama 2 is not accepted yet."
    chat = ScriptedChat(Status(state="failed", error=reason))
    chat.stream_reply = raising(ModelUnavailable(reason))
    with serving(chat, settings) as address, browser.new_page() as page:
        page.goto(address)
        expect(page.locator("#status")).to_have_text(f"No model. {reason}")
        send(page, SHORT)
        expect(answers(page).last).to_have_text(reason)
        expect_unlocked(page)


def test_a_server_that_takes_its_time_to_accept_a_message_is_waited_for_in_words(browser, settings):
    accepted = threading.Event()
    chat = ScriptedChat(capabilities=replace(HERE, knows_queue=False), reply=Scripted("Hello!", accepted=accepted))
    with serving(chat, settings) as address, browser.new_page() as page:
        page.goto(address)
        send(page, SHORT)
        expect(answers(page).last).to_contain_text("Reading …")
        accepted.set()
        expect_unlocked(page)
        expect(answers(page)).to_have_text(["Hello!"])


@pytest.mark.slow
def test_the_page_names_the_server_that_answers_and_marks_what_it_breaks_off(browser, settings):
    with ExitStack() as leaving:
        odd = leaving.enter_context(closing(OddServer()))
        remote = RemoteModel(replace(settings, inference_url=odd.url)).load()
        leaving.callback(remote.close)
        address = leaving.enter_context(serving(remote, settings))
        page = leaving.enter_context(browser.new_page())
        page.goto(address)
        expect(page.locator("#status")).to_contain_text(f"odd · answered by a server. {OWN_TEMPLATE}")
        ask(page)
        expect(answers(page).last).to_have_text("Hello!")
        odd.answer = [HEAD, event("Once upon"), 0.2, reset]
        ask(page)
        expect(answers(page).nth(-2)).to_have_text("Once upon")
        expect(answers(page).last).to_have_text(f"{CUT} {INCOMPLETE}")
        odd.answer = status(400, {"error": {"message": "maximum context length is 4096 tokens", "code": 400}})
        send(page, "far too long")
        expect(answers(page)).to_have_count(3)
        expect(box(page)).to_have_value("far too long")  # nothing typed is lost
        odd.answer = [HEAD, silence]
        box(page).press("Enter")
        expect(answers(page).last).to_contain_text("Reading …")
        stop(page)
        assert not remote.servers[0].running


def test_two_visitors_never_see_each_others_words(short_answers, browser, address, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    with browser.new_page() as other:
        other.goto(address)
        ask(short_answers, "My secret is 4711. Reply with one word.")
        ask(other, SHORT)
        expect(other.get_by_text("4711")).to_have_count(0)
    assert "4711" in str(asked[0])
    assert "4711" not in str(asked[1])


def test_programs_get_the_answer_alone_and_the_server_remembers_their_conversation(address, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    client = Client(address, verbose=False)
    first = client.predict("Say one word.", api_name="/chat", max_new_tokens=4, system_prompt="Be brief.")
    client.predict("And another.", api_name="/chat", max_new_tokens=4, system_prompt="")
    assert isinstance(first, str)
    assert asked == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say one word."}],
        [
            {"role": "user", "content": "Say one word."},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And another."},
        ],
    ]


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 99}, {"top_p": 0}, {"top_k": "many"}, {"max_new_tokens": None}, {"seed": "-1"}],
    ids=lambda setting: next(iter(setting)),
)
def test_programs_get_a_sentence_for_a_setting_out_of_range(address, setting):
    with pytest.raises(AppError, match=f"{next(iter(setting))} must be a"):
        Client(address, verbose=False).predict(SHORT, api_name="/chat", **setting)


def test_not_a_number_is_refused_in_words(address):
    asked = httpx.post(
        f"{address}gradio_api/call/chat",
        content=f'{{"data": ["{SHORT}", "", 8, NaN, 0.9, 50, 1.1, ""]}}',
        headers={"Content-Type": "application/json"},
    )
    answer = httpx.get(f"{address}gradio_api/call/chat/{asked.json()['event_id']}")
    assert "temperature must be a number from 0 to 5; it was nan." in answer.text


def test_chat_is_the_only_endpoint_that_programs_see(address):
    assert list(Client(address, verbose=False).view_api(return_format="dict")["named_endpoints"]) == ["/chat"]
