"""Every way to ask but typing, in a real browser: examples, retry, undo, edit, clear, and hands that are too quick."""

import re

from playwright.sync_api import expect

from llama2_chat.errors import Busy
from tests.support.browser import (
    BEGUN,
    LONG,
    SHORT,
    answers,
    ask,
    box,
    edit,
    expect_unlocked,
    send,
    stop,
)
from tests.support.scripted import raising, spy


def test_an_example_is_answered_with_the_box_locked_until_it_is_done(page):
    page.get_by_role("button", name="Explain in simple words").click()
    expect(page.get_by_test_id("user")).to_have_text(re.compile("Explain in simple words"))
    expect(box(page)).not_to_be_editable()
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    stop(page)


def test_an_example_that_is_refused_comes_back_as_text(page, chat, monkeypatch):
    monkeypatch.setattr(chat, "stream_reply", raising(Busy("The line is full.")))
    page.get_by_role("button", name="Explain in simple words").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("The line is full.")
    expect_unlocked(page)
    expect(box(page)).to_have_value(re.compile("Explain in simple words"))


def test_a_double_click_asks_once(page, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    page.get_by_role("button", name="Explain in simple words").dblclick(force=True)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    stop(page)
    assert len(asked) == 1


def test_pressing_enter_twice_asks_once(short_answers, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    box(short_answers).fill(SHORT)
    box(short_answers).press("Enter")
    short_answers.keyboard.press("Enter")
    expect(answers(short_answers)).not_to_have_count(0)  # the answer, and soon a remark below it
    expect_unlocked(short_answers)
    expect(short_answers.get_by_test_id("user")).to_have_count(1)
    assert len(asked) == 1


def test_retry_answers_the_same_question_again(short_answers):
    page = short_answers
    ask(page)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_test_id("stop-button")).to_be_visible()
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_count(1)


def test_undo_takes_the_last_exchange_back_into_the_box(short_answers):
    page = short_answers
    ask(page)
    ask(page, "Say goodbye.")
    page.get_by_role("button", name="Undo").click()
    expect(box(page)).to_have_value("Say goodbye.")
    expect(page.get_by_test_id("user")).to_have_count(1)


def test_an_edited_message_is_answered_anew_and_what_followed_it_goes(short_answers):
    page = short_answers
    ask(page)
    ask(page, "Say goodbye.")
    edit(page, 0, "Say good night.")
    expect(page.get_by_test_id("user")).to_have_count(1)
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_text(re.compile("good night"))


def test_the_answer_to_an_edited_message_can_be_stopped(page):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    stop(page)
    edit(page, 0, LONG.replace("500", "400"))
    expect(box(page)).not_to_be_editable()
    stop(page)


def test_a_refused_edit_leaves_the_conversation_as_it_was(short_answers, chat, monkeypatch):
    ask(short_answers)
    ask(short_answers, "And now goodbye.")
    shown = short_answers.get_by_role("log").inner_text()
    monkeypatch.setattr(chat, "stream_reply", raising(Busy("The line is full.")))
    edit(short_answers, 0, "Say good night.")
    expect(short_answers.get_by_test_id("toast-body")).to_contain_text("The line is full.")
    expect_unlocked(short_answers)
    expect(box(short_answers)).to_have_value("Say good night.")
    assert short_answers.get_by_role("log").inner_text() == shown


def test_clear_empties_the_page_even_while_an_answer_runs(page):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    page.get_by_role("button", name="Clear").click()
    expect_unlocked(page)
    page.wait_for_timeout(500)
    expect(answers(page)).to_have_count(0)


def test_a_reload_in_the_middle_of_an_answer_gives_a_fresh_page_that_works(page, chat):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    page.reload()
    expect(answers(page)).to_have_count(0)
    ask(page)


def test_the_box_has_its_hint_and_the_keyboard_back_after_an_answer(short_answers):
    ask(short_answers)
    expect(box(short_answers)).to_be_focused()
    expect(box(short_answers)).to_have_attribute("placeholder", "Type a message")
