"""The page with "Use tools": steps above the answer, which stay, can be read by everybody, and are in nobody's way."""

import json
import re
import threading

import pytest
from playwright.sync_api import expect

from llama2_chat.agent import Calculator
from tests.support.axe import assert_accessible
from tests.support.browser import (
    answers,
    ask,
    box,
    edit,
    expect_unlocked,
    open_page,
    open_settings,
    press,
    remarks,
    send,
    stop,
)
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.tool_users import QUESTION, computing

pytestmark = pytest.mark.slow


def use_tools(page):
    open_settings(page)
    page.get_by_role("checkbox", name="Use tools").check()
    page.locator("#chat").get_by_role("button", name="Settings").click()
    return page


def steps(page):
    return page.locator("article.assistant .steps")


def test_without_the_switch_no_tool_is_offered_and_with_it_the_steps_stand_above_the_answer(visit, perform):
    chat = computing()
    page = visit(perform(chat))
    ask(page, "Good morning")
    assert chat.asked[0][0][1:] == [{"role": "user", "content": "Good morning"}]
    use_tools(page)
    ask(page, QUESTION)
    expect(answers(page).last).to_have_text("It is 36.")
    expect(steps(page).last.locator("summary")).to_have_text("calculator: 15% of 240 → 36")
    expect(steps(page).last).not_to_have_attribute("open", "")
    steps(page).last.locator("summary").press("Enter")
    expect(steps(page).last.locator("li")).to_contain_text(re.compile("calculator.* s15% of 24036"))
    assert [params.temperature for _, params in chat.asked[1:]] == [0, 0]


def test_a_reload_in_mid_answer_and_one_after_it_find_the_steps_again(visit, perform):
    answering = threading.Event()
    chat = computing("It is {}. " + "Slowly. " * 9)
    compute = chat.say

    def say(messages):
        reply = compute(messages)
        if messages[-1]["content"].startswith("Result"):
            reply.gate = answering.is_set
        return reply

    chat.say = say
    page = use_tools(visit(perform(chat)))
    send(page, QUESTION)
    expect(steps(page).locator("li")).to_have_count(1)
    page.reload()
    expect(steps(page).locator("li")).to_be_visible()  # not folded: there is no answer yet
    answering.set()
    expect_unlocked(page)
    expect(steps(page)).not_to_have_attribute("open", "")
    page.reload()
    expect(steps(page).locator("summary")).to_have_text("calculator: 15% of 240 → 36")
    expect(answers(page)).to_contain_text("Slowly.")


def test_a_tool_that_hangs_is_seen_and_stop_ends_it_at_once(visit, perform, monkeypatch):
    hanging = threading.Event()
    monkeypatch.setattr(Calculator, "run", lambda self, input: str(hanging.wait(60)))
    monkeypatch.setattr(Calculator, "timeout_s", 60)
    page = use_tools(visit(perform(computing())))
    send(page, QUESTION)
    expect(steps(page).locator("summary")).to_have_text("Using calculator …")
    expect(steps(page).locator("li .time")).to_have_text("1 s …")
    stop(page)
    hanging.set()
    expect(remarks(page)).to_contain_text("stopped")
    expect(steps(page)).to_be_hidden()


def test_a_tool_that_fails_is_one_red_step_and_there_is_an_answer(visit, perform):
    page = use_tools(visit(perform(computing("Not defined."))))
    ask(page, "What is 1/0?")
    expect(answers(page)).to_have_text("Not defined.")
    line = steps(page).locator("summary .failed")
    expect(line).to_have_text("calculator failed: Nothing can be divided by zero.")
    reds = line.evaluate("line => [getComputedStyle(line).color, getComputedStyle(line.closest('article')).color]")
    assert reds[0] != reds[1]


def test_what_a_tool_says_is_shown_as_text_and_scrolls_where_it_is_long(visit, perform, monkeypatch):
    monkeypatch.setattr(Calculator, "run", lambda self, input: "<img src=x onerror=alert(1)>\n" * 60)
    page = use_tools(visit(perform(computing("Done."))))
    ask(page, QUESTION)
    steps(page).locator("summary").click()
    result = steps(page).get_by_role("group", name="Result of calculator")
    expect(result).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("img[src=x]")).to_have_count(0)
    assert result.evaluate("box => box.clientHeight < 250 && box.scrollHeight > box.clientHeight")
    result.focus()
    expect(result).to_be_focused()
    assert_accessible(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_steps_are_accessible_and_fit_a_phone(visit, perform, scheme):
    page = visit(perform(computing()), viewport={"width": 390, "height": 844}, color_scheme=scheme)
    open_settings(page)
    page.get_by_role("checkbox", name="Use tools").check()
    assert_accessible(page)
    page.keyboard.press("Escape")
    ask(page, "What is " + "1 + " * 60 + "1?")
    steps(page).locator("summary").click()
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_retry_same_again_edit_and_what_is_remembered(visit, perform):
    chat = computing()
    page = use_tools(visit(perform(chat)))
    ask(page, QUESTION)
    press(page, "Retry")
    expect_unlocked(page)
    expect(page.locator(".version")).to_have_text("2/2")
    assert [params.temperature for _, params in chat.asked] == [0, 0, 0.6, 0.6]
    press(page, "Same again")
    expect(page.locator(".version")).to_have_text("3/3")
    expect_unlocked(page)
    assert chat.asked[-1][1].seed == chat.asked[3][1].seed
    edit(page, 0, "What is 2 + 3?")
    expect(answers(page)).to_have_text("It is 5.")
    ask(page, "Thanks")
    remembered = [message["content"] for message in chat.asked[-1][0]][-5:]
    assert remembered[0] == "What is 2 + 3?"
    assert json.loads(remembered[1]) == {"action": "calculator", "action_input": "2 + 3"}
    assert remembered[4] == "Thanks"


def test_an_answer_that_was_cut_off_goes_on_without_tools_in_the_same_bubble(visit, perform):
    chat = computing("It is {}, " + "which is much. " * 9)
    page = use_tools(visit(perform(chat)))
    open_settings(page)
    page.get_by_role("spinbutton", name="Max new tokens").fill("8")
    page.get_by_role("spinbutton", name="Max new tokens").blur()
    ask(page, QUESTION)
    expect(remarks(page)).to_contain_text("cut off")
    begun = answers(page).inner_text()
    chat.say = lambda messages: Scripted("and", ' more."', "}")
    press(page, "Continue")
    expect_unlocked(page)
    expect(answers(page)).to_have_text(re.compile(re.escape(begun.strip()) + r"\s*and more\."))
    expect(steps(page).locator("summary")).to_have_text("calculator: 15% of 240 → 36")
    messages, params = chat.asked[-1]
    assert params.grammar is None
    assert messages[-1]["content"].startswith('{"action": "answer", "action_input": "It is 36')


def test_a_visitor_is_asked_before_a_call_until_they_allow_it_always_and_again_when_it_changes(
    visit, perform, monkeypatch
):
    monkeypatch.setattr(Calculator, "asks_first", True, raising=False)
    monkeypatch.setattr(Calculator, "version", "1", raising=False)
    page = use_tools(visit(perform(computing())))
    send(page, QUESTION)
    expect(steps(page).last.locator(".description")).to_have_text(Calculator.description)
    assert_accessible(page)
    page.get_by_role("button", name="Don’t allow").click()
    expect(answers(page).last).to_have_text("It is This call was not allowed..")
    expect_unlocked(page)
    send(page, QUESTION)
    page.get_by_role("checkbox", name="Always in this chat").check()
    page.get_by_role("button", name="Allow", exact=True).click()
    expect(answers(page).last).to_have_text("It is 36.")
    expect_unlocked(page)
    ask(page, "What is 1 + 1?")
    expect(answers(page).last).to_have_text("It is 2.")
    monkeypatch.setattr(Calculator, "version", "2")
    send(page, "What is 1 + 2?")
    expect(page.get_by_role("button", name="Allow", exact=True)).to_be_visible()
    page.get_by_role("button", name="Allow", exact=True).press("Enter")
    expect(answers(page).last).to_have_text("It is 3.")


def test_on_a_phone_the_question_has_room_for_thumbs_and_its_description_is_reached(visit, perform, monkeypatch):
    monkeypatch.setattr(Calculator, "asks_first", True, raising=False)
    monkeypatch.setattr(Calculator, "version", "1", raising=False)
    monkeypatch.setattr(Calculator, "shown_description", "It goes on and on. " * 100, raising=False)
    page = visit(perform(computing()), viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    open_settings(page)
    page.get_by_role("checkbox", name="Use tools").check()
    page.keyboard.press("Escape")
    box(page).fill(QUESTION)
    page.get_by_role("button", name="Send", exact=True).click()
    group = page.get_by_role("group", name="Description of calculator")
    group.focus()
    expect(group).to_be_focused()
    assert page.locator(".confirm label").bounding_box()["height"] >= 44
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_question_whether_a_tool_may_be_used_stays_while_the_page_draws_anew(visit, perform, monkeypatch):
    monkeypatch.setattr(Calculator, "asks_first", True, raising=False)
    monkeypatch.setattr(Calculator, "version", "1", raising=False)
    page = use_tools(visit(perform(computing())))
    send(page, QUESTION)
    allow = page.get_by_role("button", name="Allow", exact=True)
    expect(allow).to_be_visible()
    box(page).fill("Thanks")
    box(page).press("Enter")  # it waits for the answer, which is said below the box
    expect(page.locator(".below .note")).not_to_be_empty()
    expect(allow).to_be_visible()
    page.get_by_role("button", name="New chat").first.click()
    expect(allow).to_have_count(0)
    page.get_by_role("navigation").get_by_text(QUESTION).click()
    allow.click()
    expect(answers(page).first).to_have_text("It is 36.")


def test_the_gauge_counts_what_the_model_reads_with_tools(visit, perform):
    page = visit(perform(ScriptedChat()))
    box(page).fill("one two three")
    expect(page.locator(".gauge")).to_contain_text("3 of")
    use_tools(page)
    expect(page.locator(".gauge")).to_contain_text(re.compile(r"\b[1-9]\d\d of"))  # the examples


def test_conversations_with_steps_come_back_from_a_file(visit, perform, tmp_path):
    address = perform(computing())
    page = use_tools(visit(address))
    ask(page, QUESTION)
    page.get_by_role("button", name="Manage chats").click()
    with page.expect_download() as download:
        page.get_by_text("Export all chats").click()
    download.value.save_as(tmp_path / "chats.json")
    other = open_page(page.context.browser.new_page(), address)
    other.get_by_role("button", name="Manage chats").click()
    with other.expect_file_chooser() as chooser:
        other.get_by_text("Import…").click()
    chooser.value.set_files(tmp_path / "chats.json")
    other.get_by_role("navigation").get_by_text(QUESTION).click()
    expect(steps(other).locator("summary")).to_have_text("calculator: 15% of 240 → 36")
    other.get_by_role("searchbox").fill("It is 36")
    expect(other.get_by_text("1 result")).to_be_visible()
    other.close()
