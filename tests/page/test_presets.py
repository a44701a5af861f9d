"""How conversations start on the page: presets, one's own, examples and a reminder, each conversation by itself;
and what an operator decides of it."""

import json
import re
from dataclasses import replace

import pytest
from playwright.sync_api import expect

from llama2_chat.page.presets import BUILT_IN, first_preset, shown
from llama2_chat.page.wording import META_SYSTEM_PROMPT, SYSTEM_PROMPT
from llama2_chat.presets import NO_PRESETS, Example, Guidance, Preset, Presets, read_presets
from tests.support.axe import assert_accessible
from tests.support.browser import ask, box, open_settings, press, send, toast
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import serving
from tests.support.waiting import until

SUPPORT = Preset("Support", "You answer for Example Ltd.", Guidance((Example("Hi", "Hello!"),), "(Be kind.)"))


def test_every_preset_of_the_page_is_one_that_a_file_could_hold(tmp_path):
    file = tmp_path / "presets.json"
    entries = [{"name": each.pop("key"), **each} for each in shown(NO_PRESETS)]
    file.write_text(json.dumps({"presets": entries}))
    assert read_presets(file).all == tuple(BUILT_IN.values())


def test_conversations_start_short_and_neutral_or_as_the_operator_says():
    assert first_preset(NO_PRESETS).system_prompt == SYSTEM_PROMPT
    assert first_preset(Presets((SUPPORT,), SUPPORT)) == SUPPORT
    assert shown(Presets((SUPPORT,)))[0] == {
        "name": "Support",
        "systemPrompt": "You answer for Example Ltd.",
        "examples": [{"question": "Hi", "answer": "Hello!"}],
        "reminder": "(Be kind.)",
    }


@pytest.fixture
def chat():
    return ScriptedChat(say=lambda messages: Scripted("An answer."))


@pytest.fixture
def page(visit, perform, chat):
    page = visit(perform(chat))
    open_settings(page)
    return page


def prompt(page):
    return page.get_by_role("textbox", name="System prompt")


def preset(page):
    return page.get_by_label("Preset of this chat")


def asked(chat):
    return [message["content"] for message in chat.asked[-1][0]]


@pytest.mark.slow
def test_a_preset_its_examples_and_its_reminder_are_the_conversations_own(page, chat):
    door = page.get_by_role("button", name="Preset: ")
    expect(door).to_contain_text("Default")
    door.click()
    expect(preset(page)).to_be_focused()
    preset(page).select_option(label="Meta’s prompt of July 2023")
    expect(prompt(page)).to_have_value(META_SYSTEM_PROMPT)
    preset(page).select_option(label="JSON only")
    page.reload()  # before it has begun
    expect(door).to_contain_text("JSON only")
    assert_accessible(page)
    expect(preset(page).locator("option:checked")).to_have_text("JSON only")
    ask(page, "One")
    ask(page, "Two")
    reminder, examples = BUILT_IN["json"].guidance.reminder, BUILT_IN["json"].guidance.examples
    shown = [text for each in examples for text in (each.question, each.answer)]
    assert asked(chat) == [BUILT_IN["json"].system_prompt, *shown, "One", "An answer.", f"Two\n\n{reminder}"]
    # What is kept has nothing of it; the same again has all of it.
    assert page.locator("article.user .body").all_inner_texts() == ["One", "Two"]
    before = chat.asked[-1][0]
    page.get_by_role("navigation").get_by_role("button", name="New chat", exact=True).click()
    expect(preset(page).locator("option:checked")).to_have_text("Default")
    ask(page, "Three")
    assert asked(chat) == [SYSTEM_PROMPT, "Three"]
    page.get_by_role("navigation").get_by_text("One", exact=True).click()
    expect(preset(page).locator("option:checked")).to_have_text("JSON only")
    press(page, "Same again")
    until(lambda: len(chat.asked) == 4)
    assert chat.asked[-1][0] == before


@pytest.mark.slow
def test_examples_and_a_reminder_are_written_on_the_page_and_kept_as_a_preset_of_ones_own(page, chat, tmp_path):
    page.get_by_text("Examples and reminder").click()
    page.get_by_role("button", name="Add an example").click()
    table = page.get_by_role("table", name="Examples")
    table.get_by_role("textbox", name="Question").fill("Oslo?")
    send(page, "Too early")
    expect(toast(page)).to_contain_text("Each example needs a question and an answer.")
    table.get_by_role("textbox", name="Answer").fill("Norway. It is {{today}}.")
    page.get_by_role("button", name="Add an example").click()  # stays empty, and is not sent
    page.get_by_role("textbox", name="Reminder").fill("(In one word.)")
    prompt(page).fill("You know capitals.")
    expect(preset(page).locator("option:checked")).to_have_text("Changed")
    page.get_by_role("button", name="Save as…").click()
    page.get_by_role("textbox", name="Name").fill("  Capitals ")
    page.get_by_role("textbox", name="Name").press("Enter")
    expect(preset(page).locator("option:checked")).to_have_text("Capitals")
    expect(box(page)).to_have_value("Too early")
    ask(page, "Rome?")
    system, question, answer, newest = asked(chat)
    assert (system, question, newest) == ("You know capitals.", "Oslo?", "Rome?\n\n(In one word.)")
    assert re.fullmatch(r"Norway\. It is \w+day, \d+ \w+ \d{4}\.", answer)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    file = tmp_path / "presets.json"
    download.value.save_as(file)
    guidance = Guidance((Example("Oslo?", "Norway. It is {{today}}."),), "(In one word.)")
    assert read_presets(file).all == (Preset("Capitals", "You know capitals.", guidance),)
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(preset(page).locator("option:checked")).to_have_text("Changed")
    for content, said in ((b"[]", "This is not a file of presets."), (file.read_bytes(), "Imported 1 preset.")):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Import…").click()
        chooser.value.set_files({"name": "presets.json", "mimeType": "application/json", "buffer": content})
        expect(toast(page)).to_contain_text(said)
    expect(preset(page).locator("option:checked")).to_have_text("Capitals")


@pytest.mark.slow
def test_an_operators_preset_is_how_conversations_start(visit, chat, settings):
    with serving(chat, replace(settings, documents=False), presets=Presets((SUPPORT,), SUPPORT)) as address:
        page = visit(address)
        open_settings(page)
        expect(prompt(page)).to_have_value(SUPPORT.system_prompt)
        ask(page, "Who are you?")
    assert asked(chat) == [SUPPORT.system_prompt, "Hi", "Hello!", "Who are you?\n\n(Be kind.)"]


@pytest.mark.slow
def test_visitors_see_the_settings_that_the_operator_lets_them_see_and_a_notice(visit, chat, settings, tmp_path):
    chat.context_length = 512  # the longest answer has to fit, seen or not
    # Kept by a page that showed them; what is not shown stands at its default.
    kept = json.dumps({"systemPrompt": "Old.", "temperature": 1.5, "topP": 0.5})
    storage = [{"name": "llama2-chat.settings", "value": kept}, {"name": "llama2-chat.settings-open", "value": "yes"}]
    notice = "Down on Friday. <b>محادثة</b>"
    for choice, expected in (("basic", ("Old.", 1.5)), ("hidden", (SYSTEM_PROMPT, 0.6))):
        with serving(chat, replace(settings, settings=choice, notice=notice)) as address:
            state = {"cookies": [], "origins": [{"origin": address.rstrip("/"), "localStorage": storage}]}
            page = visit(address, storage_state=state)
            expect(page.get_by_text(notice)).to_be_visible()
            button = page.locator("#chat").get_by_role("button", name="Settings")
            if choice == "basic":
                expect(page.get_by_role("spinbutton", name="Temperature")).to_have_value("1.5")
                expect(page.get_by_role("spinbutton", name="Top-p")).to_have_count(0)
                expect(page.get_by_text("Examples and reminder")).to_have_count(0)
                expect(button).to_have_count(1)
            else:
                expect(button).to_have_count(0)
                expect(page.get_by_role("button", name="Preset")).to_have_count(0)
                assert page.locator(".middle").bounding_box()["width"] > 1000  # no room is left for a panel
            ask(page, "Hello")
        messages, params = chat.asked[-1]
        assert (messages[0]["content"], params.temperature) == expected
        assert (params.top_p, params.max_new_tokens) == (0.9, 256)
