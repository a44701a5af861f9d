"""Two answers to one question side by side: asked for with other settings or of another server, and gone on with."""

import re
from dataclasses import replace

import pytest
from playwright.sync_api import expect

from llama2_chat.types import ServerStatus
from tests.support.axe import assert_accessible
from tests.support.browser import answers, ask, expect_unlocked, questions
from tests.support.scripted import READY, Scripted, ScriptedChat

pytestmark = pytest.mark.slow


@pytest.fixture
def chat():
    """Numbers its answers."""
    chat = ScriptedChat(say=lambda messages: Scripted(f"Answer {len(chat.asked)}, to {messages[-1]['content']}"))
    chat.servers = tuple(ServerStatus(f"gpu-{number}:8000", number != 3, 0) for number in (1, 2, 3))
    return chat


def dialog(page):
    return page.get_by_role("dialog", name="Another answer beside this one")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def test_two_answers_stand_side_by_side_until_the_visitor_goes_on_with_one(visit, perform, chat):
    page = visit(perform(chat), viewport={"width": 1280, "height": 800})
    ask(page, "Why?")
    press(page, "Compare")
    dialog(page).get_by_label("Answered by").select_option("gpu-2:8000")
    expect(dialog(page).get_by_role("option")).to_have_text(["Whichever server is free", "gpu-1:8000", "gpu-2:8000"])
    dialog(page).get_by_label("Temperature").fill("0.1")
    assert_accessible(page)
    press(dialog(page), "Answer")
    expect_unlocked(page)
    expect(answers(page)).to_have_text(["Answer 1, to Why?", "Answer 2, to Why?"])
    assert_accessible(page)
    (first, first_params), (second, second_params) = chat.asked
    assert first == second
    assert (second_params.temperature, second_params.server) == (0.1, "gpu-2:8000")
    assert replace(second_params, temperature=0.6, server="", seed=first_params.seed) == first_params
    expect(page.locator(".apart:visible")).to_have_text(
        ["Whichever server is free · Temperature: 0.6", "gpu-2:8000 · Temperature: 0.1"]
    )
    left, right = (page.locator("article.beside").nth(each).bounding_box() for each in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    page.set_viewport_size({"width": 390, "height": 844})
    upper, lower = (page.locator("article.beside").nth(each).bounding_box() for each in (0, 1))
    assert upper["y"] + upper["height"] <= lower["y"]
    page.set_viewport_size({"width": 1280, "height": 800})

    page.get_by_role("button", name="Go on with this one").first.click()
    expect(answers(page)).to_have_text(["Answer 1, to Why?"])
    ask(page, "And then?")
    said = [message["content"] for message in chat.asked[-1][0] if message["role"] != "system"]
    assert said == ["Why?", "Answer 1, to Why?", "And then?"]

    # A version that is there stands beside another without being asked for; a value out of range is refused in words.
    page.get_by_role("article").filter(has_text="Answer 1").hover()
    page.get_by_role("button", name="Compare", exact=True).first.click()
    press(dialog(page), "Show version 2 beside it")
    expect(answers(page)).to_have_text(["Answer 1, to Why?", "Answer 2, to Why?"])
    page.get_by_role("button", name="Go on with this one").last.click()
    expect(questions(page)).to_have_count(1)
    press(page, "Compare")
    expect(dialog(page).get_by_label("Temperature")).to_have_value("0.1")
    dialog(page).get_by_label("Temperature").fill("warm")
    press(dialog(page), "Answer")
    expect(page.locator(".toast")).to_contain_text(re.compile("temperature", re.IGNORECASE))
    expect(answers(page)).to_have_text(["Answer 2, to Why?"])
    expect_unlocked(page)


def test_where_adapters_can_be_chosen_one_may_answer(visit, perform, chat):
    chat.servers, chat.status = (), replace(READY, adapters=("poet", "lawyer"))
    page = visit(perform(chat))
    ask(page, "Why?")
    press(page, "Compare")
    dialog(page).get_by_label("Answered by").select_option("poet")
    press(dialog(page), "Answer")
    expect_unlocked(page)
    expect(answers(page)).to_have_count(2)
    assert chat.asked[-1][1].adapter == "poet"
    expect(page.locator(".apart:visible")).to_have_text(["The model without an adapter", "poet"])
    page.reload()
    expect(answers(page)).to_have_text(["Answer 2, to Why?"])  # both are there, as versions
    expect(page.locator(".version")).to_have_text("2/2")
