"""What stands on the page, in a real browser, and that nothing in an answer gets out of its bubble."""

import http.server
import threading
from dataclasses import replace

import pytest
from playwright.sync_api import Page, expect

from llama2_chat.page import layout
from llama2_chat.page.wording import META_SYSTEM_PROMPT
from llama2_chat.server import login
from llama2_chat.types import Status
from tests.support.browser import SHORT, answers, ask, box, expect_unlocked, open_settings, send
from tests.support.scripted import HERE, READY, Scripted, ScriptedChat
from tests.support.serving import serving


def test_the_page_says_which_model_answers_and_why(page, chat):
    expect(page.locator("#status")).to_contain_text(chat.status.model)
    expect(page.locator("#status")).to_contain_text(chat.status.why)


def test_the_status_line_follows_servers_that_come_and_go(browser, settings, monkeypatch):
    monkeypatch.setattr(layout, "STATUS_EVERY_S", 0.5)
    chat = ScriptedChat(capabilities=replace(HERE, can_fail_over=True))
    with serving(chat, settings) as address, browser.new_page() as page:
        page.goto(address)
        expect(page.locator("#status")).to_contain_text("scripted")
        chat.status = Status(state="failed", error="No server answers.")
        expect(page.locator("#status")).to_have_text("No model. No server answers.")
        chat.status = READY
        expect(page.locator("#status")).to_contain_text("scripted")


def test_the_longest_answer_starts_within_a_small_window(browser, settings):
    """It started at 1,024 tokens, and every message was refused."""
    chat = ScriptedChat()
    chat.context_length = 512
    with serving(chat, settings) as address, browser.new_page() as page:
        page.goto(address)
        open_settings(page)
        longest = page.get_by_role("spinbutton", name="Max new tokens")
        expect(longest).to_have_value("256")
        expect(longest).to_have_attribute("max", "512")


def test_metas_system_prompt_is_one_click_away(page):
    open_settings(page)
    page.get_by_role("button", name="Use Meta's prompt of 2023").click()
    expect(page.get_by_role("textbox", name="System prompt")).to_have_value(META_SYSTEM_PROMPT)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, address, scheme):
    with browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme) as page:
        page.goto(address)
        expect(box(page)).to_be_in_viewport()
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_role("textbox", name="Seed")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_pasted_code_keeps_its_indentation(short_answers):
    ask(short_answers, "def f():\n    return 1")
    short_answers.get_by_role("button", name="Undo").click()
    expect(box(short_answers)).to_have_value("def f():\n    return 1")


def test_markup_in_an_answer_cannot_act_as_the_page_or_cover_it(page, chat, monkeypatch):
    cover = '<div style="position:fixed;inset:0;background:red;z-index:99999">LOGIN</div>'
    pieces = f'fine <b class="refused REFUSED">words</b> {cover}'
    monkeypatch.setattr(chat, "stream_reply", lambda *_: Scripted(pieces))
    send(page, SHORT)
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_count(1)
    expect(page.get_by_text("fine words")).to_be_visible()
    page.get_by_role("button", name="Send").click(trial=True)  # fails if something lies over it
    title = page.get_by_role("heading", name="Llama 2 Chat")
    title.click(trial=True)


@pytest.fixture
def elsewhere():
    """Another host and the paths it was asked for."""
    requested = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.send_error(404)

        do_POST = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()


def test_images_and_forms_in_an_answer_reach_no_other_host(page, chat, monkeypatch, elsewhere):
    host, requested = elsewhere
    hostile = (
        f"![]({host}/markdown.png) <img src='{host}/tag.png'> <form action='{host}/form'><button>Win</button></form>"
        f"<iframe src='{host}/frame'></iframe><video poster='{host}/poster.png' src='{host}/video'></video>"
        f"<p style=\"background: url('{host}/style.png')\">text</p><link rel=stylesheet href='{host}/css'> done"
    )
    monkeypatch.setattr(chat, "stream_reply", lambda *_: Scripted(hostile))
    ask(page)
    expect(answers(page).last).to_contain_text("done")
    for button in answers(page).last.get_by_role("button", name="Win").all():
        button.dispatch_event("click")  # click() would wait for the page that the form asks for
    page.wait_for_timeout(500)
    assert requested == []


@pytest.mark.slow
def test_the_page_asks_nobody_but_its_own_server(browser, address):
    with browser.new_page() as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expect(box(page)).to_be_editable()
        ask(page)
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "works"), [("chat.lan", False), ("127.0.0.1", True)], ids=["on the network", "on this machine"]
)
def test_without_https_the_page_says_what_does_not_work_and_that_is_so(browser, address, host, works):
    with browser.new_page() as page:
        page.goto(address.replace("127.0.0.1", host))
        expect(page.locator("#insecure")).to_be_visible(visible=not works)
        expect(page.locator("#insecure")).to_contain_text("'Copy conversation' does not work. python app.py --https")
        open_settings(page)
        page.get_by_role("spinbutton", name="Max new tokens").fill("8")
        ask(page)
        page.get_by_role("button", name="Copy conversation").click()
        assert ("assistant:" in pasted(page)) is works
        page.get_by_role("button", name="Copy message").last.click()
        assert pasted(page).startswith(answers(page).first.inner_text().strip())


def pasted(page: Page) -> str:
    page.wait_for_timeout(200)
    box(page).fill("")
    box(page).press("Control+V")
    page.wait_for_timeout(200)
    return box(page).input_value()


def test_whoever_has_logged_in_finds_the_way_out(browser, settings, tmp_path):
    (tmp_path / "users.txt").write_text(f"anna:{login.hash_password('sesame')}\n")
    users = login.read_users(tmp_path / "users.txt")
    with serving(ScriptedChat(), settings, users) as address, browser.new_page() as page:
        page.goto(address)
        page.get_by_label("username").fill("anna")
        page.get_by_label("password").fill("sesame")
        page.get_by_role("button", name="Login").click()
        expect(box(page)).to_be_editable()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("button", name="Login")).to_be_visible()
        expect(box(page)).to_have_count(0)
