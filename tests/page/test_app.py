"""The page in a real browser, on the real embedded model: what a visitor sees, and that nothing ever locks it."""

import http.server
import os
import re
import threading
from contextlib import ExitStack, closing
from dataclasses import replace

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, expect, sync_playwright

from app import META_SYSTEM_PROMPT, SYSTEM_PROMPT, plain_messages, status_line
from llama2_chat.errors import Busy, ChatError
from llama2_chat.remote.remote import CUT, NOT_WHOLE, OWN_TEMPLATE, RemoteModel
from llama2_chat.types import SamplingParams, Status, Timing, Usage
from model import ChatModel
from tests.support.odd_server import HEAD, OddServer, event, reset, silence, status
from tests.support.serving import busy, serving

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# Gradio 6.31 uses what pandas 3 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
SHORT = "Say hello."
LONG = "Print the first 500 prime numbers."  # the likeliest words of the small model go on for a thousand tokens
BEGUN = re.compile(r"^(?!Reading …|Waiting in line)\s*\w")  # more than a word for who waits
LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1)


@pytest.fixture(scope="module")
def address(chat, settings):
    with serving(chat, replace(settings, sampling=LIKELIEST)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
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


@pytest.fixture
def short_answers(page):
    """A page whose answers end after a few words."""
    open_settings(page)
    page.get_by_role("spinbutton", name="Max new tokens").fill("8")
    page.get_by_role("spinbutton", name="Max new tokens").blur()
    return page


def test_the_page_streams_an_answer_and_stops_when_asked(page):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    begun = answers(page).last.inner_text()
    expect(answers(page).last).not_to_have_text(begun)  # it grows
    stop(page)
    kept = answers(page).last.inner_text()
    page.wait_for_timeout(500)
    assert answers(page).last.inner_text() == kept
    assert kept.startswith(begun[:5])


def test_the_next_question_after_a_stopped_one_is_answered(page, chat):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    stop(page)
    ask(page)
    expect(answers(page)).to_have_count(2)


def test_the_place_in_line_shows_and_stop_leaves_the_line(page, chat):
    question = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": LONG}]
    with busy(chat, question, replace(LIKELIEST, max_new_tokens=4096)):
        send(page, SHORT)
        expect(page.get_by_text("Waiting in line at place 1 …")).to_be_visible()
        stop(page)
        expect(page.get_by_text("Stopped before an answer began.")).to_be_visible()
        expect(page.get_by_text("Waiting in line")).to_be_hidden()


def test_stop_acts_while_a_long_message_is_read(page):
    send(page, "The tide comes in and the tide goes out. " * 600)
    expect(page.get_by_text("Reading …")).to_be_visible()
    stop(page)
    expect(page.get_by_text("Stopped before an answer began.")).to_be_visible()


def test_an_example_is_answered_with_the_box_locked_until_it_is_done(page):
    page.get_by_role("button", name="Explain in simple words").click()
    expect(page.get_by_test_id("user")).to_have_text(re.compile("Explain in simple words"))
    expect(box(page)).not_to_be_editable()
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    stop(page)


def test_a_double_click_asks_once(page, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    page.get_by_role("button", name="Explain in simple words").dblclick(force=True)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    stop(page)
    assert len(asked) == 1


def test_pressing_enter_twice_asks_once(short_answers, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    box(short_answers).fill(SHORT)
    box(short_answers).press("Enter")
    short_answers.keyboard.press("Enter")
    expect(answers(short_answers)).to_have_count(1)
    expect_unlocked(short_answers)
    assert len(asked) == 1


def test_retry_answers_the_same_question_again(short_answers):
    page = short_answers
    ask(page)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_test_id("stop-button")).to_be_visible()
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_count(1)


def test_undo_takes_the_last_exchange_back_into_the_box(short_answers):
    page = short_answers
    ask(page)
    ask(page, "Say goodbye.")
    page.get_by_role("button", name="Undo").click()
    expect(box(page)).to_have_value("Say goodbye.")
    expect(page.get_by_test_id("user")).to_have_count(1)


def edit(page: Page, number: int, text: str) -> None:
    page.get_by_role("button", name="Edit").nth(number).click()
    page.locator("#conversation textarea").fill(text)
    page.get_by_role("button", name="Submit").click()


def test_an_edited_message_is_answered_anew_and_what_followed_it_goes(short_answers):
    page = short_answers
    ask(page)
    ask(page, "Say goodbye.")
    edit(page, 0, "Say good night.")
    expect(page.get_by_test_id("user")).to_have_count(1)
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_text(re.compile("good night"))


def test_the_answer_to_an_edited_message_can_be_stopped(page):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    stop(page)
    edit(page, 0, LONG.replace("500", "400"))
    expect(box(page)).not_to_be_editable()
    stop(page)


def test_clear_empties_the_page_even_while_an_answer_runs(page):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    page.get_by_role("button", name="Clear").click()
    expect_unlocked(page)
    page.wait_for_timeout(500)
    expect(answers(page)).to_have_count(0)


def test_a_reload_in_the_middle_of_an_answer_gives_a_fresh_page_that_works(page, chat):
    send(page, LONG)
    expect(answers(page).last).to_have_text(BEGUN, timeout=20_000)
    page.reload()
    expect(answers(page)).to_have_count(0)
    ask(page)


def test_the_box_has_its_hint_and_the_keyboard_back_after_an_answer(short_answers):
    ask(short_answers)
    expect(box(short_answers)).to_be_focused()
    expect(box(short_answers)).to_have_attribute("placeholder", "Type a message")


def test_an_answer_that_hits_the_limit_says_so(short_answers):
    ask(short_answers, LONG)
    expect(short_answers.get_by_text("The answer reached 'Max new tokens'.")).to_be_visible()


def test_pasted_code_keeps_its_indentation(short_answers):
    ask(short_answers, "def f():\n    return 1")
    short_answers.get_by_role("button", name="Undo").click()
    expect(box(short_answers)).to_have_value("def f():\n    return 1")


class Scripted:
    """A reply that says what a test wants to see, and then perhaps fails."""

    queue_position = 0
    finish_reason = None
    usage = Usage()
    timing = Timing()

    def __init__(self, *pieces, error=None):
        self.pieces, self.error = list(pieces), error

    async def __anext__(self):
        if self.pieces:
            return self.pieces.pop(0)
        raise self.error or StopAsyncIteration

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        pass


def test_an_error_while_answering_keeps_what_was_written_and_unlocks_the_page(page, chat, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(chat, "stream_reply", lambda *_: Scripted("Once upon", error=RuntimeError("CUDA secret")))
        send(page, SHORT)
        expect(page.get_by_test_id("toast-body")).to_contain_text("Something went wrong on the server")
        expect_unlocked(page)
    expect(page.get_by_text("Once upon")).to_be_visible()
    expect(page.get_by_text("secret")).to_have_count(0)
    ask(page)


def test_a_message_that_finds_the_line_full_goes_back_into_the_box(page, chat, monkeypatch):
    monkeypatch.setattr(chat, "stream_reply", raising(Busy("The line is full.")))
    send(page, "A question that took long to write")
    expect(page.get_by_test_id("toast-body")).to_contain_text("The line is full.")
    expect(box(page)).to_have_value("A question that took long to write")
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_count(0)


def test_a_refused_edit_leaves_the_conversation_as_it_was(short_answers, chat, monkeypatch):
    ask(short_answers)
    ask(short_answers, "And now goodbye.")
    shown = short_answers.get_by_role("log").inner_text()
    monkeypatch.setattr(chat, "stream_reply", raising(Busy("The line is full.")))
    edit(short_answers, 0, "Say good night.")
    expect(short_answers.get_by_test_id("toast-body")).to_contain_text("The line is full.")
    expect_unlocked(short_answers)
    expect(box(short_answers)).to_have_value("Say good night.")
    assert short_answers.get_by_role("log").inner_text() == shown


def test_an_example_that_is_refused_comes_back_as_text(page, chat, monkeypatch):
    monkeypatch.setattr(chat, "stream_reply", raising(Busy("The line is full.")))
    page.get_by_role("button", name="Explain in simple words").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("The line is full.")
    expect_unlocked(page)
    expect(box(page)).to_have_value(re.compile("Explain in simple words"))


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


def raising(error):
    def stream_reply(*_):
        raise error

    return stream_reply


def test_a_megabyte_is_refused_with_its_size_and_comes_back_into_the_box(page):
    send(page, "word " * 200_000)
    expect(page.get_by_test_id("toast-body")).to_contain_text("tokens", timeout=30_000)
    expect(box(page)).to_have_value(re.compile("^word word"))
    expect_unlocked(page)


def test_a_blank_message_asks_for_words(page):
    send(page, "   ")
    expect(page.get_by_test_id("toast-body")).to_contain_text("Please type a message first.")
    expect_unlocked(page)
    expect(page.get_by_test_id("user")).to_have_count(0)


@pytest.mark.parametrize(
    "typed", ["\\ud83d hello", "\\u0000\\u0007\\u001b[31m hello"], ids=["half an emoji", "control characters"]
)
def test_letters_that_are_none_are_answered_all_the_same(short_answers, typed):
    box(short_answers).evaluate(f"box => {{ box.value = '{typed}'; box.dispatchEvent(new Event('input')) }}")
    box(short_answers).press("Enter")
    expect(answers(short_answers)).to_have_count(1, timeout=20_000)
    expect_unlocked(short_answers)


def test_a_setting_that_makes_no_sense_is_refused_in_words_and_nothing_is_lost(page):
    open_settings(page)
    page.get_by_role("textbox", name="Seed").fill("lucky")
    send(page, SHORT)
    expect(page.get_by_test_id("toast-body")).to_contain_text("seed must be a whole number")
    expect(box(page)).to_have_value(SHORT)


def test_metas_system_prompt_is_one_click_away(page):
    open_settings(page)
    page.get_by_role("button", name="Use Meta's prompt of 2023").click()
    expect(page.get_by_role("textbox", name="System prompt")).to_have_value(META_SYSTEM_PROMPT)


def test_the_page_says_how_many_old_messages_no_longer_fit(short_answers, chat, monkeypatch):
    monkeypatch.setattr(chat, "context_length", 600)
    ask(short_answers, "The tide comes in and the tide goes out. " * 40)
    ask(short_answers)
    expect(short_answers.get_by_text("no longer fit")).to_have_count(0)
    ask(short_answers, "The tide comes in and the tide goes out. " * 40)
    expect(short_answers.get_by_text("The oldest messages (2) no longer fit and were left out.")).to_be_visible()


def test_the_page_says_which_model_answers_and_why(page, chat):
    expect(page.locator("#status")).to_contain_text(chat.status.model)
    expect(page.locator("#status")).to_contain_text(chat.status.why)


def test_while_the_model_loads_the_page_shows_how_far_it_is_and_a_message_waits(browser, chat, settings):
    loading = ChatModel(settings)  # not started: it stays where it is
    loading.status = Status(phase="download", done_bytes=120_000_000, total_bytes=269_000_000)
    with serving(loading, settings) as address, browser.new_page() as page:
        page.goto(address)
        expect(page.locator("#status")).to_have_text("Downloading the model: 120 of 269 MB")
        send(page, SHORT)
        expect(answers(page).last).to_contain_text("Downloading the model: 120 of 269 MB")
        loading.stream_reply = chat.stream_reply
        loading.status = chat.status
        expect_unlocked(page)
        expect(answers(page).last).not_to_contain_text("Downloading")
        expect(page.locator("#status")).to_contain_text(chat.status.model)


def test_a_model_that_could_not_be_loaded_is_said_on_the_page_and_at_every_question(browser, settings):
    failed = ChatModel(settings)
    failed.status = Status(state="failed", error="The licence of Llama 2 is not accepted yet.")
    with serving(failed, settings) as address, browser.new_page() as page:
        page.goto(address)
        expect(page.locator("#status")).to_contain_text("The licence of Llama 2 is not accepted yet.")
        send(page, SHORT)
        expect(answers(page).last).to_contain_text("The licence of Llama 2 is not accepted yet.")
        expect_unlocked(page)


@pytest.mark.slow
def test_the_page_names_the_server_that_answers_and_marks_what_it_breaks_off(browser, settings):
    with ExitStack() as leaving:
        odd = leaving.enter_context(closing(OddServer()))
        remote = RemoteModel(replace(settings, inference_url=odd.url)).load()
        leaving.callback(remote.close)
        address = leaving.enter_context(serving(remote, settings))
        page = leaving.enter_context(browser.new_page())
        page.goto(address)
        expect(page.locator("#status")).to_contain_text(f"odd · answered by a server. {OWN_TEMPLATE}")
        ask(page)
        expect(answers(page).last).to_have_text("Hello!")
        odd.answer = [HEAD, event("Once upon"), 0.2, reset]
        ask(page)
        expect(answers(page).nth(-2)).to_have_text("Once upon")
        expect(answers(page).last).to_have_text(f"{CUT} {NOT_WHOLE}")
        odd.answer = status(400, {"error": {"message": "maximum context length is 4096 tokens", "code": 400}})
        send(page, "far too long")
        expect(answers(page)).to_have_count(3)
        expect(box(page)).to_have_value("far too long")  # nothing typed is lost
        odd.answer = [HEAD, silence]
        box(page).press("Enter")
        expect(answers(page).last).to_contain_text("Reading …")
        stop(page)
        assert not remote.servers[0].running


def pasted(page: Page) -> str:
    page.wait_for_timeout(200)
    box(page).fill("")
    box(page).press("Control+V")
    page.wait_for_timeout(200)
    return box(page).input_value()


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


@pytest.fixture
def elsewhere():
    """Another host and the paths it was asked for."""
    heard = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.path)
            self.send_error(404)

        do_POST = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", heard
        server.shutdown()


def test_images_and_forms_in_an_answer_reach_no_other_host(page, chat, monkeypatch, elsewhere):
    host, heard = elsewhere
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
    assert heard == []


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, address, scheme):
    with browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme) as page:
        page.goto(address)
        expect(box(page)).to_be_in_viewport()
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_role("textbox", name="Seed")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_programs_get_the_answer_alone_and_the_server_remembers_their_conversation(address, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    client = Client(address, verbose=False)
    first = client.predict("Say one word.", api_name="/chat", max_new_tokens=4, system_prompt="Be brief.")
    client.predict("And another.", api_name="/chat", max_new_tokens=4, system_prompt="")
    assert isinstance(first, str)
    assert asked == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say one word."}],
        [
            {"role": "user", "content": "Say one word."},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And another."},
        ],
    ]


def spy(chat, monkeypatch) -> list:
    """What the model is asked from now on."""
    asked, stream_reply = [], chat.stream_reply
    monkeypatch.setattr(
        chat, "stream_reply", lambda messages, params: asked.append(messages) or stream_reply(messages, params)
    )
    return asked


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 99}, {"top_p": 0}, {"top_k": "many"}, {"max_new_tokens": None}, {"seed": "-1"}],
    ids=lambda setting: next(iter(setting)),
)
def test_programs_get_a_sentence_for_a_setting_out_of_range(address, setting):
    with pytest.raises(AppError, match=f"{next(iter(setting))} must be a"):
        Client(address, verbose=False).predict(SHORT, api_name="/chat", **setting)


def test_not_a_number_is_refused_in_words(address):
    asked = httpx.post(
        f"{address}gradio_api/call/chat",
        content=f'{{"data": ["{SHORT}", "", 8, NaN, 0.9, 50, 1.1, ""]}}',
        headers={"Content-Type": "application/json"},
    )
    answer = httpx.get(f"{address}gradio_api/call/chat/{asked.json()['event_id']}")
    assert "temperature must be a number from 0 to 5; it was nan." in answer.text


def test_chat_is_the_only_endpoint_that_programs_see(address):
    assert list(Client(address, verbose=False).view_api(return_format="dict")["named_endpoints"]) == ["/chat"]


def test_two_visitors_never_see_each_others_words(short_answers, browser, address, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    with browser.new_page() as other:
        other.goto(address)
        ask(short_answers, "My secret is 4711. Reply with one word.")
        ask(other, SHORT)
        expect(other.get_by_text("4711")).to_have_count(0)
    assert "4711" in str(asked[0])
    assert "4711" not in str(asked[1])


def test_remarks_and_refused_messages_never_reach_the_model():
    shown = [
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": [{"type": "text", "text": "Answer"}]},
        {"role": "assistant", "content": "The answer reached the limit.", "metadata": {"id": "remark"}},
        {"role": "user", "content": "Too long"},
        {"role": "assistant", "content": "This message is 9,999 tokens.", "metadata": {"id": "refused"}},
        {"role": "user", "content": "Stopped before an answer"},
        {"role": "assistant", "content": "Waiting", "metadata": {"id": "remark"}},
    ]
    assert [message["content"] for message in plain_messages("Now", shown, None)] == [
        "First",
        "Answer",
        "Stopped before an answer",
        "Now",
    ]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool", "content": "x"},
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "file", "file": {"path": "/etc/passwd"}}]},
        {"role": "user", "content": None},
        {},
    ],
    ids=["unknown role", "system in the middle", "a file", "nothing", "empty"],
)
def test_a_history_that_no_chat_can_have_is_refused_in_words(turn):
    with pytest.raises(ChatError):
        plain_messages(SHORT, [turn], None)


def test_the_status_line_shows_markup_as_text():
    assert "<b>" not in status_line(Status(state="ready", model="<b>", precision="int8", device="cpu"))
