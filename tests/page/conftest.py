"""One server for the page on the real embedded model, for all tests of this folder, and a browser for each file."""

from dataclasses import replace

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.support.browser import CHROMIUM, LIKELIEST, box, open_settings
from tests.support.serving import serving

expect.set_options(timeout=20_000)  # a computer may be busy with other things


@pytest.fixture(scope="session")
def address(chat, settings):
    with serving(chat, replace(settings, sampling=LIKELIEST, allowed_hosts="chat.lan")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    # Not for the session: while Playwright runs, no test of another folder could start an event loop in this thread.
    with sync_playwright() as playwright:
        # chat.lan is this machine as a browser elsewhere on the network sees it: plain HTTP is no secure context there.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-proxy-server"]
        arguments += ["--host-resolver-rules=MAP chat.lan 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(address)
    expect(box(page)).to_be_editable()
    yield page
    page.close()
    assert not errors


@pytest.fixture
def short_answers(page):
    """A page whose answers end after a few words."""
    open_settings(page)
    page.get_by_role("spinbutton", name="Max new tokens").fill("8")
    page.get_by_role("spinbutton", name="Max new tokens").blur()
    return page
