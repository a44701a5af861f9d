"""Who answers on the page: the model or one of its adapters, chosen in the settings for each conversation by itself."""

from dataclasses import replace

import pytest
from playwright.sync_api import expect

from tests.support.browser import ask, open_settings, press
from tests.support.scripted import READY, Scripted, ScriptedChat
from tests.support.waiting import until


@pytest.mark.slow
def test_each_conversation_says_who_answers_in_it(visit, perform):
    chat = ScriptedChat(replace(READY, adapters=("law", "poems")), say=lambda messages: Scripted("An answer."))
    page = visit(perform(chat))
    open_settings(page)
    model = page.get_by_label("Model of this chat")
    assert model.locator("option").all_inner_texts() == ["scripted", "law", "poems"]
    model.select_option("poems")
    page.reload()  # before it has begun
    expect(model).to_have_value("poems")
    ask(page, "One")
    model.select_option("law")
    ask(page, "Two")
    page.reload()
    expect(model).to_have_value("law")
    page.get_by_role("navigation").get_by_role("button", name="New chat", exact=True).click()
    expect(model).to_have_value("")
    ask(page, "Three")
    page.get_by_role("navigation").get_by_text("One", exact=True).click()
    expect(model).to_have_value("law")
    press(page, "Same again", 0)  # as it was asked, whoever is chosen now
    until(lambda: len(chat.asked) == 4)
    assert [params.adapter for _, params in chat.asked] == ["poems", "law", "", "poems"]
    chat.status = READY  # another start, without adapters
    page.reload()
    expect(model.locator("option")).to_have_text(["scripted", "\u2068law\u2069 (no longer here)"])
    model.select_option("")
    page.get_by_role("navigation").get_by_role("button", name="New chat", exact=True).click()
    expect(model).to_be_hidden()
