"""One server for the page on the real embedded model, for all tests of this folder, and a browser for each file."""

import re
import socket
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright

from tests.support.answers import answer_tab, empty
from tests.support.browser import ARGUMENTS, CHROMIUM, LIKELIEST, open_page, open_settings
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving

# How a browser says that a script or a style sheet of Gradio's did not come.
LOST_MODULE = r"Failed to fetch dynamically imported module: .*/(assets|page/again/\d+)/"
LOST_STYLES = r"Unable to preload CSS for .*/(assets|page/again/\d+)/"


@pytest.fixture(scope="session")
def address(chat, settings):
    with serving(chat, replace(settings, sampling=LIKELIEST, allowed_hosts="chat.lan")) as address:
        yield address


class Stage:
    """A chat that is another one for every test."""

    def __getattr__(self, name):
        return getattr(self.chat, name)


@pytest.fixture(scope="session")
def stage(settings, tmp_path_factory):
    stage = Stage()
    stage.chat = ScriptedChat()
    documents_dir = tmp_path_factory.mktemp("documents")
    with serving(stage, replace(settings, allowed_hosts="chat.lan", documents_dir=documents_dir)) as address:
        yield stage, address


@pytest.fixture
def perform(stage):
    """The address of a page on this chat; without a server of its own, which takes seconds to build."""

    def perform(chat):
        stage[0].chat = chat
        return stage[1]

    return perform


@pytest.fixture(scope="module")
def browser():
    # Not for the session: while Playwright runs, no test of another folder could start an event loop in this thread.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def has_ended(address):
    """Whether a test has ended its server before its page is closed."""
    try:
        socket.create_connection(("127.0.0.1", urlsplit(address).port), 1).close()
    except OSError:
        return True
    return False


@pytest.fixture
def visit(browser):
    """Opens the page at an address in a browser of its own; whatever goes wrong in its code fails the test.

    A part of Gradio's that is not there when a test cuts the line is asked for again (static/gradio.js).
    """
    pages, errors = [], []

    def note(error, address):
        is_lost = re.match(LOST_MODULE, str(error)) or (re.match(LOST_STYLES, str(error)) and has_ended(address))
        if not is_lost:
            errors.append(str(error))

    def visit(address, **options):
        page = browser.new_page(**options)
        pages.append(page)
        page.on("pageerror", lambda error: note(error, address))
        return open_page(page, address)

    yield visit
    for page in pages:
        page.close()
    assert not errors


@pytest.fixture
def page(visit, address):
    return visit(address)


@pytest.fixture
def short_answers(page):
    """A page whose answers end after a few words."""
    open_settings(page)
    page.get_by_role("spinbutton", name="Max new tokens").fill("8")
    page.get_by_role("spinbutton", name="Max new tokens").blur()
    return page


@pytest.fixture(scope="module")
def answer_page_and_errors(browser):
    with answer_tab(browser) as page_and_errors:
        yield page_and_errors


@pytest.fixture
def answer_page(answer_page_and_errors):
    """A tab with an empty answer. In the end nothing was said on its console, and no other host was asked."""
    page, errors = answer_page_and_errors
    errors.clear()
    page.set_viewport_size({"width": 1280, "height": 844})
    empty(page)
    yield page
    assert not errors


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
