"""By keyboard: focus is neither lost nor stolen, Escape closes one thing, sheets are dialogs, words are composed."""

import pytest
from playwright.sync_api import expect

from llama2_chat.errors import Busy
from tests.support.axe import assert_accessible
from tests.support.browser import answers, ask, box, expect_unlocked, press, questions, remarks, send, toast
from tests.support.scripted import Scripted, ScriptedChat, raising

NARROW = {"width": 640, "height": 400}  # a laptop at 200 %
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


class Talk(ScriptedChat):
    """Greets; what begins with "wait" is answered by one word, and by another once the gate is open."""

    def __init__(self):
        super().__init__(say=self._say)
        self.is_open = False

    def _say(self, messages):
        if messages[-1]["content"].startswith("wait"):
            return Scripted("word ", "end", gate=Gate(self))
        return Scripted("Hello!", reason="length")


class Gate:
    def __init__(self, talk):
        self.talk, self.left = talk, 1

    def __call__(self):
        self.left -= 1
        return self.left >= 0 or self.talk.is_open


@pytest.fixture
def talk():
    return Talk()


@pytest.fixture
def site(talk, perform):
    return perform(talk)


def by_key(page, button):
    """Press a button as somebody without a mouse does."""
    button.press("Enter")  # at once: between focus and key the list beside it may be drawn anew


def below(page, name, number=-1):
    return page.locator("article").get_by_role("button", name=name, exact=True).nth(number)


def expect_box_focused(page):
    expect(box(page)).to_be_focused()


def asked_and_running(page):
    send(page, "wait")
    expect(answers(page).last).to_contain_text("word")


@pytest.mark.slow
def test_after_every_action_with_a_message_the_next_key_goes_into_the_box(visit, site, talk):
    page = visit(site)
    by_key(page, page.get_by_role("button", name="Explain in simple words"))
    expect_box_focused(page)
    expect_unlocked(page)
    for name in "Retry", "Same again", "Continue":
        by_key(page, below(page, name))
        expect_box_focused(page)
        expect_unlocked(page)
    by_key(page, below(page, "Edit", 0))
    page.keyboard.type(" Please.")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect_box_focused(page)
    expect_unlocked(page)
    page.keyboard.type("wait")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect_box_focused(page)
    expect(answers(page).last).to_contain_text("word")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect_unlocked(page)
    page.keyboard.type("typed on")
    expect(box(page)).to_have_value("typed on")


@pytest.mark.slow
def test_the_button_of_a_message_keeps_the_focus_through_versions_and_edits(visit, site):
    page = visit(site)
    ask(page)
    for version in "2/2", "3/3":
        press(page, "Retry")
        expect(page.get_by_text(version)).to_be_visible()
        expect_unlocked(page)
    for name, version in ("Previous", "2/3"), ("Previous", "1/3"), ("Next", "2/3"), ("Next", "3/3"):
        by_key(page, below(page, f"{name} version"))
        expect(page.get_by_text(version)).to_be_visible()
        expect(below(page, f"{name} version")).to_be_focused()
    page.keyboard.press("Enter")  # there is no fourth
    expect(page.get_by_text("3/3")).to_be_visible()
    for number in 0, 1:
        by_key(page, below(page, "Edit", number))
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(below(page, "Edit", number)).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type(" Better.")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Hello! Better.")
    expect(below(page, "Edit", 1)).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")  # from a button of the form as well
    expect(page.locator(".editor")).to_have_count(0)
    expect_box_focused(page)


@pytest.mark.slow
def test_what_closes_gives_the_focus_back_to_what_opened_it(visit, site):
    page = visit(site)
    ask(page, "First")
    manage = page.get_by_role("button", name="Manage chats")
    by_key(page, manage)
    expect(page.get_by_role("menuitem").first).to_be_focused()
    page.keyboard.press("End")
    expect(page.get_by_role("menuitem").last).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(manage).to_be_focused()
    settings = page.locator("#chat").get_by_role("button", name="Settings")
    for opener, open_it in (settings, "Enter"), (box(page), "Control+,"):
        opener.press(open_it)
        expect(page.locator("#settings").get_by_role("button", name="Close")).to_be_focused()
        page.keyboard.press("Enter")
        expect(opener).to_be_focused()
    for closed_by in "Undo", "Close", "Escape":
        page.locator("#sidebar .open").press("Delete")
        button = toast(page).get_by_role("button", name="Close" if closed_by == "Escape" else closed_by)
        button.press("Escape" if closed_by == "Escape" else "Enter")
        expect(toast(page)).to_have_count(0)
        expect_box_focused(page)
        ask(page, "Another")


@pytest.mark.slow
def test_nobody_who_types_elsewhere_meanwhile_is_taken_away(visit, site, talk):
    page = visit(site)
    asked_and_running(page)
    page.keyboard.type("typed ahead")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+k")
    talk.is_open = True
    expect(questions(page)).to_have_text(["wait", "typed ahead"])
    expect_unlocked(page)
    expect(page.get_by_role("searchbox")).to_be_focused()
    talk.is_open = False
    send(page, "wait again")
    expect(answers(page).last).to_have_text("word")
    talk.stream_reply = raising(Busy("The line is full."))
    send(page, "refused")
    page.locator("#sidebar .open").focus()
    page.keyboard.press("F2")
    talk.is_open = True
    expect(toast(page)).to_contain_text("The line is full.")
    expect(page.get_by_role("textbox", name="Title")).to_be_focused()


@pytest.mark.slow
def test_escape_closes_one_thing_at_a_time_and_stops_the_answer_last(visit, site):
    page = visit(site, viewport=NARROW)
    asked_and_running(page)
    page.keyboard.press("Control+k")
    page.keyboard.type("xyz")
    page.keyboard.press("Escape")
    expect(page.get_by_role("searchbox")).to_have_value("")
    expect(page.locator("#sidebar")).to_be_visible()
    options = page.locator("#sidebar .more")
    by_key(page, options)
    expect(page.get_by_role("menu")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("menu")).to_have_count(0)
    expect(options).to_be_focused()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(options).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect_box_focused(page)
    page.keyboard.press("Control+,")
    page.get_by_role("textbox", name="Seed").focus()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect_box_focused(page)
    page.set_viewport_size({"width": 1280, "height": 800})  # and where the settings stand beside the chat
    page.keyboard.press("Control+,")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect_box_focused(page)
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    expect(remarks(page)).to_contain_text("stopped")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Conversations", "Settings"])
def test_a_sheet_takes_the_focus_holds_it_and_gives_it_back(visit, site, name):
    page = visit(site, viewport=NARROW)
    opener = page.locator("#chat .bar").get_by_role("button", name=name)
    by_key(page, opener)
    sheet = page.get_by_role("dialog", name=name)
    inside = "sheet => sheet.contains(document.activeElement)"
    assert sheet.evaluate(inside)
    first = page.evaluate_handle("document.activeElement")
    for key in "Tab", "Shift+Tab":
        steps = 0
        while steps == 0 or not first.evaluate("first => first === document.activeElement"):
            page.keyboard.press(key)
            assert sheet.evaluate(inside)
            steps += 1
        assert steps > 3
    assert_accessible(page)
    by_key(page, sheet.get_by_role("button", name="Close"))
    expect(opener).to_be_focused()
    page.keyboard.press("Enter")
    page.mouse.click(630 if name == "Conversations" else 10, 10)  # beside it
    expect(sheet).to_have_count(0)
    expect(opener).to_be_focused()


@pytest.mark.slow
def test_on_a_phone_what_is_typed_while_an_answer_runs_can_be_sent_to_wait(visit, site, talk):
    page = visit(site, **PHONE)
    send_button = page.get_by_role("button", name="Send", exact=True)
    stop_button = page.get_by_role("button", name="Stop", exact=True)
    box(page).fill("wait")
    send_button.tap()
    expect(answers(page)).to_contain_text("word")
    expect(send_button).to_have_count(0)
    box(page).fill("And then?")
    sizes = [button.bounding_box() for button in (stop_button, send_button)]
    assert all(min(size["width"], size["height"]) >= 44 for size in sizes)
    assert sizes[0]["x"] + sizes[0]["width"] <= sizes[1]["x"]
    send_button.tap()
    expect(page.get_by_text("Sent as soon as this answer ends.")).to_be_visible()
    expect(stop_button).to_be_visible()
    expect_box_focused(page)
    talk.is_open = True
    expect(questions(page)).to_have_text(["wait", "And then?"])
    expect(answers(page).last).to_have_text("Hello!")
    expect(box(page)).to_have_value("")


# What browsers send when Enter takes a word from an input method: by the standard, by older ones, and by Safari.
COMPOSED = """(field) => {
  const init = { key: "Enter", bubbles: true, cancelable: true };
  const type = (name, more) => field.dispatchEvent(new KeyboardEvent(name, { ...init, ...more }));
  type("keydown", { isComposing: true, keyCode: 229 });
  type("keyup", {});
  type("keydown", { keyCode: 229 });
  type("keyup", {});
  field.dispatchEvent(new CompositionEvent("compositionend", { bubbles: true }));
  type("keydown", { keyCode: 13 });
  type("keyup", {});
}"""


@pytest.mark.slow
def test_the_enter_of_a_composition_sends_nothing_and_the_next_one_does(visit, site, talk):
    page = visit(site)
    page.keyboard.type("nihongo")
    box(page).evaluate(COMPOSED)
    expect(box(page)).to_have_value("nihongo")
    page.keyboard.press("Enter")
    expect_unlocked(page)
    expect(questions(page)).to_have_text("nihongo")
    page.keyboard.press("ArrowUp")
    editor = page.get_by_role("textbox", name="Edit the message")
    editor.evaluate(COMPOSED)
    expect(editor).to_be_focused()
    page.keyboard.press("Escape")
    page.locator("#sidebar .open").focus()
    page.keyboard.press("F2")
    title = page.get_by_role("textbox", name="Title")
    title.evaluate(COMPOSED)
    expect(title).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    page.keyboard.press("Control+k")
    page.keyboard.type("nihongo")
    expect(page.locator("#sidebar .result")).to_have_count(2)
    page.get_by_role("searchbox").evaluate(COMPOSED)
    expect(questions(page)).to_have_count(0)
    page.keyboard.press("Enter")
    expect(questions(page)).to_have_count(1)
    assert len(talk.asked) == 1
