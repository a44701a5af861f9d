"""How the page looks and works for everybody: desktop, phone, dark, keyboard only, a screen reader, hostile answers."""

import re
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import Page, expect

from llama2_chat.server import login
from llama2_chat.types import Status
from tests.support.axe import assert_accessible
from tests.support.browser import (
    SHORT,
    answers,
    ask,
    box,
    edit,
    expect_unlocked,
    open_page,
    open_settings,
    questions,
    remarks,
    send,
    stop,
)
from tests.support.scripted import HERE, READY, Scripted, ScriptedChat
from tests.support.serving import serving

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
MARKDOWN = (
    "# Colours\n\nSome *text* with `code`:\n\n```python\nprint(1)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done"
)


@pytest.fixture
def scripted():
    return ScriptedChat(say=lambda messages: Scripted(MARKDOWN, reason="length"))


@pytest.fixture
def site(scripted, perform):
    return perform(scripted)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.slow
def test_nothing_stands_in_the_way_of_a_screen_reader(visit, site, size, scheme):
    page = visit(site, viewport=size, color_scheme=scheme)
    assert_accessible(page)
    ask(page)
    assert_accessible(page)
    page.locator("article.user").get_by_role("button", name="Edit", exact=True).click()
    assert_accessible(page)
    open_settings(page)
    assert_accessible(page)


def test_who_speaks_and_when_an_answer_begins_and_ends_is_said(visit, site):
    page = visit(site)
    ask(page)
    expect(page.locator("#chat > [role=status]")).to_have_text("Answer complete")
    expect(page.locator("article").get_by_role("heading", level=2)).to_contain_text(["You", "Assistant"])


@pytest.mark.slow
def test_everything_can_be_done_with_the_keyboard(visit, perform):
    gate = threading.Event()
    chat = ScriptedChat(say=lambda messages: Scripted("One ", "two", gate=gate.is_set))
    page = visit(perform(chat))
    expect(box(page)).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    expect(questions(page)).to_have_text("first line\nsecond line")
    page.keyboard.press("Escape")
    expect(remarks(page)).to_contain_text("stopped")
    gate.set()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("textbox", name="Edit the message")).to_be_focused()
    page.keyboard.type(" edited")
    page.keyboard.press("Enter")
    expect(questions(page)).to_have_text("first line\nsecond line edited")
    expect(answers(page)).to_have_text("One two")
    page.keyboard.press("Control+k")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.locator("#transcript").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("Control+Shift+O")
    expect(questions(page)).to_have_count(0)
    expect(box(page)).to_be_focused()


# Too small for a thumb, or beyond the right edge.
AWKWARD_BUTTONS = """[...document.querySelectorAll(".middle button")].filter((button) => button.checkVisibility())
  .filter((button) => button.offsetWidth < 44 || button.offsetHeight < 44 || button.getBoundingClientRect().right > 390)
  .map((button) => button.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_a_phone_needs_no_sideways_scrolling_and_has_room_for_thumbs(visit, site, scheme):
    page = visit(site, viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True)
    expect(box(page)).to_be_in_viewport()
    box(page).fill(SHORT)
    page.get_by_role("button", name="Send", exact=True).click()
    expect_unlocked(page)
    assert page.evaluate(AWKWARD_BUTTONS) == []
    open_settings(page)
    expect(page.get_by_role("textbox", name="Seed")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert float(box(page).evaluate("box => parseFloat(getComputedStyle(box).fontSize)")) >= 16


def test_the_box_stays_above_a_phones_keyboard_and_so_does_the_end_of_what_was_said(visit, perform):
    site = perform(ScriptedChat(reply=Scripted("A paragraph.\n\n" * 40)))
    page = visit(site, viewport=PHONE, is_mobile=True, has_touch=True)
    box(page).fill(SHORT)
    page.get_by_role("button", name="Send", exact=True).click()
    expect_unlocked(page)
    expect(page.get_by_role("button", name="Retry")).to_be_in_viewport()
    box(page).click()
    page.set_viewport_size({"width": 390, "height": 480})  # as interactive-widget=resizes-content does
    expect(box(page)).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("button", name="Retry")).to_be_in_viewport()
    assert "resizes-content" in page.locator("meta[name=viewport]").get_attribute("content")
    # An earlier scroll is told after the room has shrunk: it was the keyboard, and not the reader who went up.
    page.locator("#transcript").evaluate(
        "element => { element.style.maxHeight = '150px'; element.dispatchEvent(new Event('scroll')); }"
    )
    expect(page.get_by_role("button", name="Retry")).to_be_in_viewport()


@pytest.mark.slow
def test_the_theme_can_be_switched_and_stays(visit, site):
    page = visit(site, color_scheme="light")
    page.get_by_role("button", name="Light or dark").click()
    expect(page.locator("body")).to_have_class(re.compile("dark"))
    page.reload()
    expect(page.locator("body.dark")).to_have_count(1)


@pytest.mark.slow
def test_the_reader_stays_where_they_are_while_an_answer_streams_and_a_selection_survives(visit, perform):
    gate = threading.Semaphore(0)
    paragraphs = [f"Paragraph {number}. " + "Some words that fill a line or two. " * 8 + "\n\n" for number in range(60)]
    chat = ScriptedChat(say=lambda messages: Scripted(*paragraphs, gate=lambda: gate.acquire(blocking=False)))
    page = visit(perform(chat))
    send(page, SHORT)
    gate.release(30)
    expect(answers(page)).to_contain_text("Paragraph 29.")
    page.locator("#transcript").hover()
    page.mouse.wheel(0, -1500)
    page.wait_for_timeout(200)
    selected = page.evaluate(
        """() => {
          const text = document.querySelectorAll("article.assistant p")[20].firstChild;
          getSelection().setBaseAndExtent(text, 0, text, text.length);
          return [getSelection().toString().length, document.querySelector("#transcript").scrollTop];
        }"""
    )
    gate.release(31)
    expect_unlocked(page)
    expect(answers(page)).to_contain_text("Paragraph 59.")
    assert selected == page.evaluate(
        '[getSelection().toString().length, document.querySelector("#transcript").scrollTop]'
    )
    page.get_by_role("button", name="To the newest message").click()
    expect(remarks(page)).to_be_in_viewport()


@pytest.mark.slow
def test_what_a_visitor_typed_is_shown_as_typed(visit, site):
    page = visit(site)
    typed = "<b>not bold</b>\n    *indented*  twice"
    ask(page, typed)
    assert questions(page).inner_text() == typed
    edit(page, 0, typed + " more")
    expect(questions(page)).to_have_text(typed + " more", use_inner_text=True)


@pytest.mark.slow
def test_the_status_line_follows_servers_that_come_and_go(browser, settings):
    chat = ScriptedChat(capabilities=replace(HERE, can_fail_over=True))
    with serving(chat, settings) as address, browser.new_page() as page:
        page.clock.install()
        open_page(page, address)
        expect(page.locator(".model")).to_contain_text("scripted")
        chat.status = Status(state="failed", error="No server answers.")
        page.clock.fast_forward(10_000)
        expect(page.locator(".status")).to_have_text("No server answers.")
        chat.status = READY
        page.clock.fast_forward(10_000)
        expect(page.locator(".model")).to_contain_text("scripted")


@pytest.mark.slow
def test_the_longest_answer_starts_within_a_small_window(visit, perform):
    """It started at 1,024 tokens, and every message was refused."""
    chat = ScriptedChat()
    chat.context_length = 512
    page = visit(perform(chat))
    open_settings(page)
    expect(page.get_by_role("spinbutton", name="Max new tokens")).to_have_value("256")


@contextmanager
def elsewhere():
    """Another host and the paths it was asked for."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.send_error(404)

        do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()


@pytest.mark.slow
def test_markup_in_an_answer_reaches_no_other_host_and_covers_nothing(visit, perform):
    with elsewhere() as (host, requested):
        hostile = (
            f"![]({host}/markdown.png) <img src='{host}/tag.png'> <form action='{host}/f'><button>Win</button></form>"
            f"<iframe src='{host}/frame'></iframe><video poster='{host}/poster.png'></video>"
            f"<p style=\"background: url('{host}/style.png')\">text</p><link rel=stylesheet href='{host}/css'>"
            '<div style="position:fixed;inset:0;background:red;z-index:99999">LOGIN</div> done'
        )
        page = visit(perform(ScriptedChat(reply=Scripted(hostile))))
        ask(page)
        expect(answers(page)).to_contain_text("done")
        expect(answers(page).get_by_role("button", name="Win")).to_have_count(0)
        page.get_by_role("button", name="Settings").first.click(trial=True)  # fails if something lies over it
        page.wait_for_timeout(500)
        assert requested == []


@pytest.mark.slow
def test_the_page_asks_nobody_but_its_own_server(browser, address):
    with browser.new_page() as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        open_page(page, address)
        ask(page)
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.parametrize(
    ("host", "secure"), [("chat.lan", False), ("127.0.0.1", True)], ids=["on the network", "on this machine"]
)
@pytest.mark.slow
def test_without_https_the_page_says_so_and_copies_all_the_same(visit, scripted, settings, host, secure):
    with serving(scripted, replace(settings, allowed_hosts="chat.lan")) as address:
        page = visit(address.replace("127.0.0.1", host))
        command = page.locator(".insecure code", has_text="python app.py --https")  # as code, without its backticks
        expect(command).to_have_count(0 if secure else 1)
        ask(page)
        if secure:
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator("article.assistant").get_by_role("button", name="Copy", exact=True).last.click()
        assert pasted(page) == MARKDOWN


def pasted(page: Page) -> str:
    expect(page.locator(".toast")).to_have_text(re.compile("Copied"))
    box(page).press("Control+V")
    return box(page).input_value()


@pytest.mark.slow
def test_whoever_has_logged_in_finds_the_way_out(browser, settings, tmp_path):
    (tmp_path / "users.txt").write_text(f"anna:{login.hash_password('sesame')}\n")
    users = login.read_users(tmp_path / "users.txt")
    with serving(ScriptedChat(), settings, users) as address, browser.new_page() as page:
        page.goto(address)
        expect(page.get_by_role("heading", name="Llama 2 Chat")).to_be_visible()
        expect(page.get_by_label("Name")).to_have_attribute("autocomplete", "username")
        expect(page.get_by_label("Password")).to_have_attribute("autocomplete", "current-password")
        page.get_by_label("Name").fill("anna")
        page.get_by_label("Password").fill("sesame")
        page.get_by_role("button", name="Log in").click()
        ask(page)
        expect(answers(page)).to_have_text("Hello!")
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("button", name="Log in")).to_be_visible()
        expect(box(page)).to_have_count(0)


@pytest.mark.slow
def test_the_answers_of_a_running_conversation_can_be_stopped_after_looking_at_another(visit, perform):
    gate = threading.Event()
    chat = ScriptedChat(say=lambda messages: Scripted("One ", "two", gate=gate.is_set))
    page = visit(perform(chat))
    send(page, "The first")
    page.get_by_role("button", name="New chat").first.click()
    expect(box(page)).to_be_focused()
    expect_unlocked(page)
    page.get_by_role("navigation").get_by_text("The first").click()
    stop(page)
    expect(remarks(page)).to_contain_text("stopped")


@pytest.mark.slow
@pytest.mark.parametrize(("letters", "way"), [("שלום ", "rtl"), ("1) word ", "ltr")])
def test_a_long_text_runs_as_its_beginning_does_and_a_short_one_as_it_reads(visit, perform, letters, way):
    page = visit(perform(ScriptedChat()))
    field = box(page)
    field.fill(letters)
    expect(field).to_have_attribute("dir", "auto")
    field.press("ControlOrMeta+a")
    page.keyboard.insert_text(letters * 4_000)
    expect(field).to_have_attribute("dir", way)
    field.press("ControlOrMeta+a")
    page.keyboard.insert_text(letters)
    expect(field).to_have_attribute("dir", way)  # until the next key
    page.keyboard.insert_text(letters)
    expect(field).to_have_attribute("dir", "auto")
