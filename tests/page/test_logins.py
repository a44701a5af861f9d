"""A page behind a login: whose conversations a browser shows, and what happens to words when the login has ended."""

from dataclasses import replace

import pytest
from playwright.sync_api import expect

from llama2_chat.server import login
from tests.support.browser import answers, ask, box, expect_unlocked, open_settings, questions, send
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import serving

pytestmark = pytest.mark.slow


@pytest.fixture
def address(settings, tmp_path):
    with serve(settings, tmp_path) as address:
        yield address


def serve(settings, tmp_path, words=200):
    names = "".join(f"{name}:{login.hash_password('sesame')}\n" for name in ("anna", "bert"))
    (tmp_path / "users.txt").write_text(names)
    chat = ScriptedChat(say=lambda messages: Scripted(*["word "] * words, gate=Slow()))
    return serving(chat, settings, login.read_users(tmp_path / "users.txt"))


class Slow:
    """Lets a piece out at every fifth look."""

    looks = 0

    def __call__(self):
        self.looks += 1
        return self.looks % 5 == 0


@pytest.fixture
def page(browser, address):
    with browser.new_page() as page:
        page.goto(address)
        yield page


def log_in(page, name):
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill("sesame")
    page.get_by_role("button", name="Log in").click()
    expect(box(page)).to_be_editable()


def log_out(page):
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("button", name="Log in")).to_be_visible()


def test_two_who_share_a_browser_see_nothing_of_each_other(page):
    log_in(page, "anna")
    open_settings(page)
    page.get_by_role("textbox", name="System prompt").fill("Anna's prompt")
    send(page, "Anna's secret")
    expect(answers(page)).to_contain_text("word")
    box(page).fill("Anna's draft")
    page.wait_for_timeout(500)
    log_out(page)
    log_in(page, "bert")
    expect(page.get_by_text("Anna's")).to_have_count(0)
    expect(questions(page)).to_have_count(0)
    expect(box(page)).to_have_value("")
    expect(page.get_by_role("textbox", name="System prompt")).not_to_have_value("Anna's prompt")
    log_out(page)
    log_in(page, "anna")
    page.get_by_role("navigation").get_by_text("Anna's secret").click()
    expect(box(page)).to_have_value("Anna's draft")
    expect(answers(page)).to_have_text("word " * 200)


def test_a_message_sent_after_the_login_has_ended_waits_for_the_next(page):
    log_in(page, "anna")
    page.context.clear_cookies()
    send(page, "The first words of a chat")
    expect(page.locator(".toast")).to_contain_text("Please log in first.")
    expect(box(page)).to_have_value("The first words of a chat")
    page.get_by_role("button", name="Log in").click()
    log_in(page, "anna")
    expect(box(page)).to_have_value("The first words of a chat")


def test_stop_says_why_it_does_not_once_the_login_has_ended(page):
    log_in(page, "anna")
    send(page, "Go on and on")
    expect(answers(page)).to_contain_text("word")
    cookies = page.context.cookies()
    page.context.clear_cookies()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator(".toast")).to_contain_text("Please log in first.")
    page.context.add_cookies(cookies)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect_unlocked(page)
    ask(page, "And now?")


def test_another_device_of_a_login_has_its_conversations_and_nobody_elses(browser, settings, tmp_path):
    kept = replace(settings, history="server", history_dir=tmp_path / "history", auth_file=tmp_path / "users.txt")
    with (
        serve(kept, tmp_path, words=60) as address,
        browser.new_page() as laptop,
        browser.new_page() as phone,
        browser.new_page() as berts,
    ):
        for page, name in ((laptop, "anna"), (phone, "anna"), (berts, "bert")):
            page.goto(address)
            log_in(page, name)
        send(laptop, "From the laptop")
        expect(answers(laptop)).to_contain_text("word")
        phone.evaluate("() => dispatchEvent(new Event('online'))")  # or ten seconds later
        phone.get_by_role("navigation").get_by_text("From the laptop").click()
        expect(answers(phone)).to_contain_text("word")  # while it is being written
        for page in (laptop, phone):
            expect(answers(page)).to_have_text("word " * 60, timeout=60_000)
        ask(phone, "And from the phone")
        laptop.evaluate("() => dispatchEvent(new Event('online'))")
        expect(questions(laptop)).to_have_text(["From the laptop", "And from the phone"])
        expect(answers(laptop)).to_have_count(2)
        berts.reload()
        expect(berts.get_by_text("Your chats will be listed here, on each device")).to_be_visible()
        expect(berts.get_by_text("From the laptop")).to_have_count(0)
