"""Asking on the page, in a real browser, mostly with the real embedded model: streaming, stopping, trying again."""

import re
import threading
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
from gradio_client import Client
from playwright.sync_api import expect
from transformers import TextIteratorStreamer

from llama2_chat.errors import Busy, ModelUnavailable
from llama2_chat.page.answering import Answering
from llama2_chat.page.wording import SYSTEM_PROMPT
from llama2_chat.remote import RemoteModel
from llama2_chat.remote.faults import CUT, INCOMPLETE
from llama2_chat.types import Status
from tests.support.browser import (
    BEGUN,
    LIKELIEST,
    LONG,
    SHORT,
    answers,
    ask,
    box,
    edit,
    expect_unlocked,
    open_page,
    open_settings,
    press,
    questions,
    remarks,
    send,
    stop,
    toast,
    waiting,
)
from tests.support.odd_server import HEAD, OddServer, event, reset, silence, status
from tests.support.scripted import HERE, READY, Scripted, ScriptedChat, raising, spy
from tests.support.serving import busy, serving

SEND_WITH_A_CLICK = """(area, [button, text]) => {
  button.click();
  area.value = text;
  area.dispatchEvent(new Event("input", { bubbles: true }));
  area.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
}"""


def test_the_page_streams_an_answer_and_stops_when_asked(page):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN)
    begun = answers(page).last.inner_text()
    expect(answers(page).last).not_to_have_text(begun)  # it grows
    stop(page)
    kept = answers(page).last.inner_text()
    page.wait_for_timeout(500)
    assert answers(page).last.inner_text() == kept
    expect(remarks(page)).to_contain_text("stopped")
    ask(page)
    expect(answers(page)).to_have_count(2)


@pytest.mark.slow
def test_the_place_in_line_shows_and_stop_leaves_the_line(page, chat):
    question = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": LONG}]
    with busy(chat, question, replace(LIKELIEST, max_new_tokens=4096)):
        send(page, SHORT)
        expect(waiting(page)).to_have_attribute("data-waiting", "Waiting in line, position 1 …")
        stop(page)
        expect(page.get_by_text("Stopped before an answer began.")).to_be_visible()
        expect(waiting(page)).to_have_count(0)


def test_stop_acts_while_a_long_message_is_read(page):
    send(page, "The tide comes in and the tide goes out. " * 600)
    expect(waiting(page)).to_have_attribute("data-waiting", "Reading …")
    stop(page)
    expect(page.get_by_text("Stopped before an answer began.")).to_be_visible()


@pytest.mark.slow
def test_an_answer_that_hits_the_limit_says_so_and_goes_on_when_asked(short_answers):
    ask(short_answers, LONG)
    expect(remarks(short_answers)).to_contain_text("8 tokens")
    expect(remarks(short_answers)).to_contain_text("cut off at ‘Max new tokens’")
    first = answers(short_answers).inner_text()
    short_answers.get_by_role("button", name="Continue").click()
    expect(answers(short_answers)).not_to_have_text(first)
    expect_unlocked(short_answers)
    expect(answers(short_answers)).to_have_count(1)
    assert answers(short_answers).inner_text().startswith(first)


@pytest.mark.slow
def test_an_error_while_answering_keeps_what_was_written_and_unlocks_the_page(page, chat, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(chat, "stream_reply", lambda *_: Scripted("Once upon", error=RuntimeError("CUDA secret")))
        send(page, SHORT)
        expect(remarks(page)).to_contain_text("Something went wrong on the server")
        expect_unlocked(page)
    expect(page.get_by_text("Once upon")).to_be_visible()
    expect(page.get_by_text("secret")).to_have_count(0)
    ask(page)


def test_a_message_that_finds_the_line_full_goes_back_into_the_box(page, chat, monkeypatch):
    monkeypatch.setattr(chat, "stream_reply", raising(Busy("The line is full.")))
    send(page, "A question that took long to write")
    expect(toast(page)).to_contain_text("The line is full.")
    expect(box(page)).to_have_value("A question that took long to write")
    expect_unlocked(page)
    expect(questions(page)).to_have_count(0)


@pytest.mark.slow
def test_a_megabyte_is_refused_with_its_size_and_comes_back_into_the_box(page):
    send(page, "word " * 200_000)
    expect(toast(page)).to_contain_text("tokens")
    expect(box(page)).to_have_value(re.compile("^word word"))
    expect_unlocked(page)


def test_a_blank_message_is_not_sent(page):
    send(page, "   ")
    expect_unlocked(page)
    expect(questions(page)).to_have_count(0)


@pytest.mark.parametrize(
    "typed", ["\\ud83d hello", "\\u0000\\u0007\\u001b[31m hello"], ids=["half an emoji", "control characters"]
)
@pytest.mark.slow
def test_letters_that_are_none_are_answered_all_the_same(short_answers, typed):
    box(short_answers).evaluate(f"box => {{ box.value = '{typed}'; box.dispatchEvent(new Event('input')) }}")
    box(short_answers).press("Enter")
    expect(answers(short_answers)).to_have_text(BEGUN)
    expect_unlocked(short_answers)


@pytest.mark.slow
def test_a_setting_that_makes_no_sense_is_refused_in_words_and_nothing_is_lost(page):
    open_settings(page)
    page.get_by_role("textbox", name="Seed").fill("lucky")
    send(page, SHORT)
    expect(toast(page)).to_contain_text("seed must be a whole number")
    expect(box(page)).to_have_value(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", " \n", "\u200b\u2060"], ids=ascii)
def test_an_answer_in_which_there_is_nothing_to_see_says_so(visit, perform, text):
    page = visit(perform(ScriptedChat(reply=Scripted(text))))
    send(page, "Well?")
    expect(page.locator("article.assistant .remark")).to_contain_text("The model gave an empty answer.")


@pytest.mark.slow
def test_pressing_enter_twice_asks_once(short_answers, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    box(short_answers).fill(SHORT)
    box(short_answers).press("Enter")
    short_answers.keyboard.press("Enter")
    expect(answers(short_answers)).to_have_text(BEGUN)
    expect_unlocked(short_answers)
    assert len(asked) == 1


def test_an_example_is_one_click(page, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    page.get_by_role("button", name="Explain in simple words").click()
    expect(questions(page)).to_have_text(re.compile("Explain in simple words"))
    expect(answers(page)).to_have_text(BEGUN)
    stop(page)
    assert len(asked) == 1


@pytest.mark.slow
def test_a_message_typed_ahead_goes_out_when_the_answer_has_ended(short_answers):
    send(short_answers, LONG)
    box(short_answers).fill("And the next one?")
    box(short_answers).press("Enter")
    expect(questions(short_answers)).to_have_text([LONG, "And the next one?"])
    expect(answers(short_answers).last).to_have_text(BEGUN)
    expect_unlocked(short_answers)
    expect(box(short_answers)).to_have_value("")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Retry", "Same again", "Send the edit"])
def test_a_message_sent_in_the_moment_an_answer_was_asked_for_again_waits_for_it(visit, perform, name):
    chat = ScriptedChat()
    page = visit(perform(chat))
    ask(page)
    if name == "Send the edit":
        page.locator("article.user").get_by_role("button", name="Edit", exact=True).click()
        button = page.locator(".editor").get_by_role("button", name="Send", exact=True)
    else:
        button = page.locator("article").get_by_role("button", name=name, exact=True)
    box(page).evaluate(SEND_WITH_A_CLICK, [button.element_handle(), "And the next one?"])
    expect(questions(page)).to_have_text([SHORT, "And the next one?"])
    expect(answers(page)).to_have_count(2)
    expect_unlocked(page)
    assert [messages[-1]["content"] for messages, _ in chat.asked] == [SHORT, SHORT, "And the next one?"]


@pytest.mark.slow
def test_retry_varies_and_same_again_repeats(visit, perform):
    chat = ScriptedChat()
    page = visit(perform(chat))
    ask(page)
    press(page, "Retry")
    expect(page.get_by_text("2/2")).to_be_visible()
    expect_unlocked(page)
    press(page, "Same again")
    expect(page.get_by_text("3/3")).to_be_visible()
    expect_unlocked(page)
    (first, second, third) = [params.seed for _, params in chat.asked]
    assert first != second
    assert second == third
    assert len({str(messages) for messages, _ in chat.asked}) == 1


@pytest.mark.slow
def test_a_refused_edit_leaves_the_conversation_as_it_was(visit, perform):
    chat = ScriptedChat()
    page = visit(perform(chat))
    ask(page)
    ask(page, "And now goodbye.")
    shown = page.get_by_role("region", name="Conversation").inner_text()
    chat.stream_reply = raising(Busy("The line is full."))
    edit(page, 0, "Say good night.")
    expect(toast(page)).to_contain_text("The line is full.")
    expect_unlocked(page)
    expect(box(page)).to_have_value("Say good night.")
    assert page.get_by_role("region", name="Conversation").inner_text() == shown


@pytest.mark.slow
def test_the_box_has_its_hint_and_the_keyboard_back_after_an_answer(short_answers):
    ask(short_answers)
    expect(box(short_answers)).to_be_focused()
    expect(box(short_answers)).to_have_attribute("placeholder", "Type a message")


@pytest.mark.slow
def test_while_the_model_loads_the_page_shows_how_far_it_is_and_a_message_waits(visit, perform):
    chat = ScriptedChat(Status(phase="download", done_bytes=120_000_000, total_bytes=269_000_000))
    page = visit(perform(chat))
    expect(page.locator(".status")).to_have_text("Downloading the model: 120 of 269 MB")
    send(page, SHORT)
    expect(waiting(page)).to_have_attribute("data-waiting", "Downloading the model: 120 of 269 MB")
    chat.status = READY
    expect_unlocked(page)
    expect(answers(page)).to_have_text(["Hello!"])
    expect(page.locator(".model")).to_have_text("scripted · paper on desk")
    expect(page.locator(".status")).to_be_hidden()


@pytest.mark.slow
def test_a_model_that_could_not_be_loaded_is_said_on_the_page_and_at_every_question(visit, perform):
    reason = "The licence of Llama 2 is not accepted yet."
    chat = ScriptedChat(Status(state="failed", error=reason))
    chat.stream_reply = raising(ModelUnavailable(reason))
    page = visit(perform(chat))
    expect(page.locator(".status")).to_have_text(reason)
    send(page, SHORT)
    expect(remarks(page)).to_contain_text(reason)
    expect_unlocked(page)


@pytest.mark.slow
def test_a_server_that_takes_its_time_to_accept_a_message_is_waited_for_in_words(visit, perform):
    accepted = threading.Event()
    chat = ScriptedChat(capabilities=replace(HERE, knows_queue=False), reply=Scripted("Hello!", accepted=accepted))
    page = visit(perform(chat))
    send(page, SHORT)
    expect(waiting(page)).to_have_attribute("data-waiting", "Reading …")
    accepted.set()
    expect_unlocked(page)
    expect(answers(page)).to_have_text(["Hello!"])


@pytest.mark.slow
def test_the_page_names_the_server_that_answers_and_marks_what_it_breaks_off(visit, settings):
    with ExitStack() as leaving:
        odd = leaving.enter_context(closing(OddServer()))
        remote = RemoteModel(replace(settings, inference_url=odd.url)).load()
        leaving.callback(remote.close)
        page = visit(leaving.enter_context(serving(remote, settings)))
        expect(page.locator(".model")).to_have_text("odd · answered by a server")
        ask(page)
        expect(answers(page).last).to_have_text("Hello!")
        odd.answer = [HEAD, event("Once upon"), 0.2, reset]
        ask(page)
        expect(answers(page).last).to_have_text("Once upon")
        expect(remarks(page).last).to_contain_text(f"{CUT} {INCOMPLETE}")
        odd.answer = status(400, {"error": {"message": "maximum context length is 4096 tokens", "code": 400}})
        send(page, "far too long")
        expect(toast(page)).to_contain_text("4,096")
        expect(answers(page)).to_have_count(2)
        expect(box(page)).to_have_value("far too long")  # nothing typed is lost
        odd.answer = [HEAD, silence]
        box(page).press("Enter")
        expect(waiting(page)).to_have_attribute("data-waiting", "Reading …")
        stop(page)
        assert not remote.servers[0].running


def test_send_retry_edit_and_programs_all_reach_the_one_generator(visit, monkeypatch, perform):
    asked, answer = [], Answering.answer
    monkeypatch.setattr(
        Answering, "answer", lambda *given: asked.append(given[1]().messages[-1]["content"]) or answer(*given)
    )
    address = perform(ScriptedChat())
    page = visit(address)
    ask(page, "Sent")
    press(page, "Retry")
    expect(page.get_by_text("2/2")).to_be_visible()
    expect_unlocked(page)
    edit(page, 0, "Edited")
    expect(questions(page)).to_have_text("Edited")
    expect_unlocked(page)
    assert Client(address, verbose=False).predict("Predicted", api_name="/chat") == "Hello!"
    assert asked == ["Sent", "Sent", "Edited", "Predicted"]


def test_local_answers_come_through_transformers_streamer(page, chat, monkeypatch):
    replies, stream_reply = [], chat.stream_reply
    monkeypatch.setattr(chat, "stream_reply", lambda *given: replies.append(stream_reply(*given)) or replies[-1])
    send(page, LONG)
    expect(answers(page)).to_have_text(BEGUN)
    stop(page)
    assert isinstance(replies[0], TextIteratorStreamer)


@pytest.mark.slow
def test_two_visitors_never_see_each_others_words(short_answers, browser, address, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    with browser.new_page() as other:
        open_page(other, address)
        ask(short_answers, "My secret is 4711. Reply with one word.")
        ask(other, SHORT)
        expect(other.get_by_text("4711")).to_have_count(0)
    assert "4711" in str(asked[0])
    assert "4711" not in str(asked[1])
