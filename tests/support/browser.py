"""The page as a visitor uses it, through Playwright: what stands where, and whole exchanges."""

import os
import re

from playwright.sync_api import Page, expect

from llama2_chat.types import SamplingParams

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SHORT = "Say hello."
LONG = "Print the first 500 prime numbers."  # the likeliest words of the small model go on for a thousand tokens
BEGUN = re.compile(r"^(?!Reading …|Waiting in line)\s*\w")  # more than a word for who waits
LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1)
# Gradio 6.31 uses what pandas 3 is about to drop.


def box(page: Page):
    return page.get_by_role("textbox", name="Message")


def answers(page: Page):
    return page.get_by_test_id("bot")


def send(page: Page, text: str) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def expect_unlocked(page: Page) -> None:
    """The box takes text, Send is back, and both work."""
    expect(box(page)).to_be_editable(timeout=30_000)
    expect(page.get_by_test_id("submit-button")).to_be_visible()
    expect(page.get_by_test_id("stop-button")).to_have_count(0)


def ask(page: Page, text: str = SHORT) -> None:
    """A whole exchange."""
    count = answers(page).count()
    send(page, text)
    expect(answers(page)).not_to_have_count(count)
    expect_unlocked(page)


def stop(page: Page) -> None:
    page.get_by_role("button", name="Stop").click()
    expect_unlocked(page)


def open_settings(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.wait_for_timeout(500)  # what is typed in the first instant is overwritten by the default


def edit(page: Page, number: int, text: str) -> None:
    page.get_by_role("button", name="Edit").nth(number).click()
    page.locator("#conversation textarea").fill(text)
    page.get_by_role("button", name="Submit").click()
