"""The page behind a guard: an answer is shown once it has been judged, and of an unsafe one nothing is."""

import asyncio
import threading

import pytest
from playwright.sync_api import expect

from tests.support.axe import assert_accessible
from tests.support.browser import answers, ask, box, expect_unlocked, remarks, send, toast
from tests.support.guards import BAD, GOOD, Guard, guarded, saying

pytestmark = pytest.mark.slow


def test_an_answer_is_shown_once_it_has_been_judged(visit, perform, settings):
    judged, guard = threading.Event(), Guard()
    judge = guard.judge

    async def slowly(question, answer=None):
        if answer is not None:
            while not judged.is_set():  # noqa: ASYNC110 - it is set in another thread
                await asyncio.sleep(0.01)
        return await judge(question, answer)

    guard.judge = slowly
    with guarded(saying("a fine ", "thing"), settings, guard) as behind:
        page = visit(perform(behind))
        send(page, GOOD)
        expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
        assert "a fine" not in page.content()
        judged.set()
        expect(answers(page).last).to_have_text("a fine thing")
        expect_unlocked(page)


def test_of_an_unsafe_answer_the_page_holds_nothing(visit, perform, settings):
    with guarded(saying("a zebra, ", BAD), settings) as behind:
        page = visit(perform(behind))
        send(page, GOOD)
        expect(remarks(page).last).to_contain_text("judged the answer unsafe")
        expect_unlocked(page)
        assert "zebra" not in page.content()


def test_an_unsafe_message_is_refused_and_stays_in_the_box(visit, perform, settings):
    chat = saying("fine")
    with guarded(chat, settings) as behind:
        page = visit(perform(behind))
        send(page, BAD)
        expect(toast(page).first).to_contain_text("judged this message unsafe")
        expect(box(page)).to_have_value(BAD)
        assert chat.asked == []
        ask(page, GOOD)
        expect(answers(page).last).to_have_text("fine")


def test_the_guide_to_responsible_use_is_a_click_away(visit, perform):
    page = visit(perform(saying(GOOD)))
    link = page.get_by_role("link", name="Responsible use")
    expect(link).to_have_attribute("href", "https://ai.meta.com/llama/responsible-use-guide/")
    assert_accessible(page)
