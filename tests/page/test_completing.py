"""The page in front of a base model: one text, which the model goes on with."""

import re
import threading

import pytest
from playwright.sync_api import expect

from llama2_chat.types import Capabilities
from tests.support.scripted import Scripted, ScriptedChat

pytestmark = pytest.mark.slow

BASE = Capabilities(supports_token_ids=True, knows_queue=True, can_fail_over=False, counts_tokens=True, chats=False)


class Base(ScriptedChat):
    """Goes on with the pieces of a test."""

    def __init__(self, *pieces, gate=lambda: True):
        super().__init__(capabilities=BASE)
        self.pieces, self.gate = pieces, gate

    def encode_text(self, text):
        self.asked.append(text)
        return [1] * len(text)

    def stream_completion(self, input_ids, params, *, to_the_end=False):
        self.asked.append(params)
        return Scripted(*self.pieces, gate=self.gate)


@pytest.fixture
def visit(browser, perform):
    """Opens the page in front of a base model; whatever goes wrong in its code fails the test."""
    errors, context = [], browser.new_context()

    def visit(chat):
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(perform(chat))
        return page

    yield visit
    context.close()
    assert not errors


def text(page):
    return page.get_by_role("textbox", name="Text", exact=True)


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def test_a_text_is_gone_on_with_in_place_and_undone_and_kept(visit):
    chat = Base(" a", " time")
    page = visit(chat)
    expect(page.get_by_text("completes text and does not chat")).to_be_visible()
    expect(page.locator(".notice")).to_contain_text("completes text, does not chat")
    expect(page.get_by_role("textbox", name="Message")).to_be_hidden()
    expect(button(page, "Complete")).to_be_disabled()
    text(page).fill("Once upon")
    button(page, "Complete").click()
    expect(text(page)).to_have_value("Once upon a time")
    assert chat.asked[0] == "Once upon"
    assert chat.asked[1].repetition_penalty == 1
    page.reload()
    expect(text(page)).to_have_value("Once upon a time")
    button(page, "Undo").click()
    expect(text(page)).to_have_value("Once upon")
    expect(button(page, "Undo")).to_be_disabled()
    text(page).press("Control+Enter")
    expect(text(page)).to_have_value("Once upon a time")


def test_stop_keeps_what_there_is(visit):
    chat = Base(" a", *[" b"] * 10_000)
    page = visit(chat)
    text(page).fill("x")
    button(page, "Complete").click()
    expect(text(page)).to_have_value(re.compile("^x a b b b"))
    assert not text(page).is_editable()
    button(page, "Stop").click()
    expect(button(page, "Complete")).to_be_enabled()
    assert text(page).input_value().startswith("x a b")


def test_stop_acts_at_once_while_the_line_is_down(visit):
    page = visit(Base(" a"))
    page.locator("#setting-seed").wait_for(state="attached")
    page.context.set_offline(True)
    text(page).fill("x")
    button(page, "Complete").click()
    expect(page.get_by_text("Connection lost. Trying again")).to_be_visible()
    button(page, "Stop").click()
    expect(button(page, "Complete")).to_be_enabled()
    expect(page.get_by_text("Connection lost. Trying again")).to_have_count(0)
    expect(text(page)).to_have_value("x")


def test_a_completion_under_way_survives_a_reload(visit):
    opened = threading.Event()
    pieces = iter(range(3))
    chat = Base(" a", " b", " c", gate=lambda: opened.is_set() or next(pieces, None) == 0)
    page = visit(chat)
    text(page).fill("x")
    button(page, "Complete").click()
    expect(text(page)).to_have_value("x a")
    page.reload()
    expect(text(page)).to_have_value("x a")
    opened.set()
    expect(text(page)).to_have_value("x a b c")
    button(page, "Undo").click()
    expect(text(page)).to_have_value("x")


def test_what_the_server_refuses_is_said_and_the_text_stays(visit):
    page = visit(Base())
    text(page).fill("x")
    page.get_by_role("button", name="Settings", exact=True).click() if not page.locator(
        "#settings"
    ).is_visible() else None
    page.get_by_role("textbox", name="Seed").fill("abc")
    button(page, "Complete").click()
    expect(page.get_by_text("seed must be")).to_be_visible()
    expect(text(page)).to_have_value("x")
    expect(button(page, "Complete")).to_be_enabled()


def test_two_tabs_show_one_text_and_neither_takes_back_what_the_other_made_of_it(visit):
    opened = threading.Event()
    pieces = iter(range(3))
    chat = Base(" a", " b", gate=lambda: opened.is_set() or next(pieces, None) == 0)
    page, other = visit(chat), visit(chat)
    text(page).fill("x")
    expect(text(other)).to_have_value("x")
    button(page, "Complete").click()
    expect(text(other)).to_have_value("x a")
    expect(button(other, "Complete")).to_be_disabled()
    opened.set()
    expect(text(page)).to_have_value("x a b")
    expect(text(other)).to_have_value("x a b")
    text(other).fill("another text")
    expect(text(page)).to_have_value("another text")
    page.reload()
    expect(text(page)).to_have_value("another text")


def test_a_text_for_which_the_browser_has_no_room_says_so_and_stays(visit):
    page = visit(Base(" a"))
    page.evaluate("() => void (Storage.prototype.setItem = () => { throw new Error('full'); })")
    text(page).fill("x")
    expect(page.get_by_text("no room to keep this text")).to_be_visible()
    button(page, "Complete").click()
    expect(button(page, "Complete")).to_be_enabled()
    expect(text(page)).to_have_value("x a")
