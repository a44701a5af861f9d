"""The page as a visitor uses it, through Playwright: what stands where, and whole exchanges."""

import os
import re

from playwright.sync_api import Page, expect

from llama2_chat.types import SamplingParams

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# chat.lan is this machine as a browser elsewhere on the network sees it: plain HTTP is no secure context there.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-proxy-server",
    "--host-resolver-rules=MAP chat.lan 127.0.0.1",
]
SHORT = "Say hello."
LONG = "Print the first 500 prime numbers."  # the likeliest words of the small model go on for a thousand tokens
BEGUN = re.compile(r"\w")
LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1)
PATIENCE_MS = 60_000  # a computer may be busy with other things
expect.set_options(timeout=PATIENCE_MS)


def box(page: Page):
    return page.get_by_role("textbox", name="Message", exact=True)


def questions(page: Page):
    return page.locator("article.user .body")


def answers(page: Page):
    return page.locator("article.assistant .body")


def remarks(page: Page):
    return page.locator("article.assistant .remark")


def waiting(page: Page):
    """What the newest answer, which has no text yet, waits for."""
    return page.locator("article.waiting").last


def toast(page: Page):
    return page.locator(".toast")


def send(page: Page, text: str) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def expect_unlocked(page: Page) -> None:
    """Send is back."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_have_count(0)


def ask(page: Page, text: str = SHORT) -> None:
    """A whole exchange."""
    count = answers(page).count()
    send(page, text)
    expect(answers(page)).not_to_have_count(count)
    expect_unlocked(page)


def stop(page: Page) -> None:
    page.get_by_role("button", name="Stop", exact=True).click()
    expect_unlocked(page)


def open_page(page: Page, address: str) -> Page:
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    expect(box(page)).to_be_editable()
    return page


def open_settings(page: Page) -> None:
    page.locator("#chat").get_by_role("button", name="Settings").click()
    expect(page.locator("#settings")).to_be_visible()  # beside the chat or, on a phone, over it


def press(page: Page, name: str, number: int = -1) -> None:
    """A button below a message, of the last one that has it."""
    button = page.locator("article").get_by_role("button", name=name, exact=True).nth(number)
    button.scroll_into_view_if_needed()
    button.click()


def edit(page: Page, number: int, text: str) -> None:
    """Send another text in place of a visitor's message."""
    page.locator("article.user").nth(number).get_by_role("button", name="Edit", exact=True).click()
    page.get_by_role("textbox", name="Edit the message").fill(text)
    page.get_by_role("textbox", name="Edit the message").press("Enter")
