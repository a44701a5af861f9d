"""Nothing is lost: reloads, restarts and dropped lines in mid-answer, branches, drafts, two tabs, private chats."""

import threading
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect

from llama2_chat.errors import Busy
from llama2_chat.page import answering
from llama2_chat.types import Status
from tests.support.browser import (
    answers,
    ask,
    box,
    edit,
    expect_unlocked,
    open_page,
    open_settings,
    press,
    questions,
    remarks,
    send,
    stop,
    toast,
    waiting,
)
from tests.support.scripted import READY, Scripted, ScriptedChat, raising
from tests.support.serving import serving
from tests.support.waiting import until

WORDS = [f"word{number} " for number in range(40)]


class Gate:
    """Lets the first pieces of every answer out, and the rest when it is opened."""

    def __init__(self, first=3):
        self._open, self._left = threading.Event(), first
        self.open = self._open.set

    def __call__(self):
        self._left -= 1
        return self._left >= 0 or self._open.is_set()


class EchoChat(ScriptedChat):
    """Repeats the question; what begins with "long" in forty words, which wait for the gate after three."""

    def __init__(self):
        super().__init__(say=self._echo)
        self.gate, self.replies = Gate(), []

    def _echo(self, messages):
        said = messages[-1]["content"]
        long = said.startswith("long")
        self.replies.append(Scripted(*WORDS, gate=self.gate) if long else Scripted(f"You said {said}"))
        return self.replies[-1]


@pytest.fixture
def echo():
    return EchoChat()


@pytest.fixture
def site(echo, perform):
    return perform(echo)


def wait_for_gradio(page):
    """What it cannot fetch any more once the line is down, it says on the console."""
    page.locator("#setting-seed").wait_for(state="attached")


def drop_line(page):
    wait_for_gradio(page)
    page.context.set_offline(True)


@pytest.fixture
def context(browser):
    context = browser.new_context()
    yield context
    context.close()


def test_an_answer_under_way_survives_a_reload_still_streams_and_can_be_stopped(visit, site, echo):
    page = visit(site)
    send(page, "long")
    expect(answers(page)).to_contain_text("word2")
    page.reload()
    expect(answers(page)).to_contain_text("word2")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    stop(page)
    expect(remarks(page)).to_contain_text("stopped")


@pytest.mark.slow
def test_an_answer_is_whole_after_a_reload_in_the_middle_of_it(visit, site, echo):
    page = visit(site)
    send(page, "long")
    expect(answers(page)).to_contain_text("word2")
    page.reload()
    expect(answers(page)).to_contain_text("word2")
    echo.gate.open()
    expect(answers(page)).to_have_text("".join(WORDS).strip())
    assert len(echo.asked) == 1


@pytest.mark.slow
def test_an_answer_survives_a_dropped_line(visit, site, echo):
    page = visit(site)
    send(page, "long")
    expect(answers(page)).to_contain_text("word2")
    drop_line(page)
    echo.gate.open()
    page.wait_for_timeout(500)
    page.context.set_offline(False)
    expect(answers(page)).to_have_text("".join(WORDS).strip())
    expect_unlocked(page)
    assert len(echo.asked) == 1


@pytest.mark.slow
def test_a_message_sent_while_the_line_is_down_goes_out_when_it_is_back(visit, site, echo):
    page = visit(site)
    drop_line(page)
    send(page, "Hello?")
    page.wait_for_timeout(500)
    page.context.set_offline(False)
    expect(answers(page)).to_have_text("You said Hello?")
    assert len(echo.asked) == 1


@pytest.mark.slow
def test_a_restart_of_the_server_loses_no_word_and_the_answer_can_be_continued(visit, settings, echo, free_port):
    with serving(echo, settings, port=free_port) as address:
        page = visit(address)
        ask(page, "First.")
        send(page, "long")
        expect(answers(page).last).to_contain_text("word2")
    with serving(echo, settings, port=free_port):
        expect(remarks(page).last).to_contain_text("interrupted")
        expect(answers(page).first).to_have_text("You said First.")
        expect(answers(page).last).to_contain_text("word2")
        expect_unlocked(page)
        page.get_by_role("button", name="Continue").click()
        expect_unlocked(page)
        expect(answers(page).last).to_contain_text("word2 You said word0")


@pytest.mark.slow
def test_two_visitors_through_a_dropped_line_and_a_restart_lose_and_mix_nothing(visit, settings, echo, free_port):
    with serving(echo, settings, port=free_port) as address:
        anna, bert = visit(address), visit(address)
        ask(anna, "I am Anna.")
        ask(bert, "I am Bert.")
        send(anna, "long")
        expect(answers(anna).last).to_contain_text("word2")
        drop_line(bert)
        send(bert, "Bert again.")
    with serving(echo, settings, port=free_port):
        bert.context.set_offline(False)
        expect(answers(bert)).to_have_text(["You said I am Bert.", "You said Bert again."])
        expect(remarks(anna).last).to_contain_text("interrupted")
        expect(answers(anna)).to_contain_text(["You said I am Anna.", "word2"])
        for page, other in ((anna, "Bert"), (bert, "Anna")):
            page.reload()
            expect(questions(page)).to_have_count(2)
            expect(page.get_by_text(other)).to_have_count(0)


@pytest.mark.slow
def test_a_message_that_lost_its_place_in_line_while_nobody_read_is_asked_again(visit, site, echo, monkeypatch):
    echo.gate = Gate(first=0)
    page = visit(site)
    send(page, "long")
    expect(page.locator("article.waiting")).to_be_visible()
    until(lambda: echo.replies)
    page.goto("about:blank")
    monkeypatch.setattr(answering, "UNREAD_WAITING_S", 0.2)
    until(lambda: echo.replies[0].finish_reason == "cancelled")
    echo.gate.open()
    page.go_back()
    expect(answers(page)).to_have_text("".join(WORDS).strip())
    assert len(echo.asked) == 2


@pytest.mark.slow
def test_a_message_refused_while_its_reader_looks_elsewhere_waits_in_the_box_of_its_conversation(visit, site, echo):
    echo.status = Status(phase="load")
    page = visit(site)
    send(page, "Refuse me")
    page.get_by_role("button", name="New chat").first.click()
    echo.stream_reply = raising(Busy("The line is full."))
    echo.status = READY
    expect(page.locator(".toast")).to_contain_text("The line is full.")
    page.get_by_role("navigation").get_by_text("Refuse me").click()
    expect(box(page)).to_have_value("Refuse me")


@pytest.mark.slow
def test_a_message_that_is_refused_is_gone_from_every_tab(context, site, echo):
    one = open_page(context.new_page(), site)
    errors = []
    ask(one, "First")
    echo.status = Status(phase="load")
    send(one, "Refuse me")
    two = open_page(context.new_page(), one.url)
    two.on("pageerror", lambda error: errors.append(str(error)))
    expect(questions(two)).to_have_text(["First", "Refuse me"])
    echo.stream_reply = raising(Busy("The line is full."))
    echo.status = READY
    for tab in (one, two):
        expect(questions(tab)).to_have_text(["First"])
        expect(answers(tab)).to_have_text(["You said First"])
        tab.reload()
        expect(answers(tab)).to_have_text(["You said First"])
        expect(box(tab)).to_have_value("Refuse me")
    assert not errors


@pytest.mark.slow
def test_what_is_sent_right_after_a_key_is_no_draft_any_more(visit, site):
    page = visit(site)
    ask(page, "First.")
    box(page).press_sequentially("Second.")
    box(page).press("Enter")
    expect(answers(page)).to_have_count(2)
    expect_unlocked(page)
    page.wait_for_timeout(600)
    page.reload()
    expect(questions(page)).to_have_count(2)
    expect(box(page)).to_have_value("")
    box(page).fill("Typed, and gone elsewhere at once")
    page.get_by_role("button", name="New chat").first.click()
    box(page).fill("Something else")
    page.get_by_role("navigation").get_by_text("First.").click()
    expect(box(page)).to_have_value("Typed, and gone elsewhere at once")
    page.get_by_role("button", name="New chat").first.click()
    expect(box(page)).to_have_value("Something else")


@pytest.mark.slow
def test_a_line_that_is_down_in_mid_answer_is_said_and_stop_is_kept_for_later(visit, settings, echo, free_port):
    with serving(echo, settings, port=free_port) as address:
        page = visit(address)
        send(page, "long")
        expect(answers(page)).to_contain_text("word2")
        wait_for_gradio(page)
    expect(remarks(page)).to_have_text("Connection lost. Trying again …")
    stop(page)
    expect(remarks(page)).to_contain_text("stopped")
    send(page, "Never mind")
    expect(page.locator("article.waiting")).to_be_visible()
    stop(page)
    with serving(echo, settings, port=free_port):
        ask(page, "Are you back?")
    assert [messages[-1]["content"] for messages, _ in echo.asked] == ["long", "Are you back?"]


@pytest.mark.slow
def test_a_tab_in_the_background_leaves_the_line_to_others_and_misses_nothing(context, site, echo):
    page = open_page(context.new_page(), site)
    with open_streams(page) as running:
        send(page, "long")
        expect(answers(page)).to_contain_text("word2")
        page.evaluate(HIDE, True)
        page.wait_for_timeout(1500)
        assert not running
        echo.gate.open()
        page.evaluate(HIDE, False)
        expect(answers(page)).to_have_text("".join(WORDS).strip())
    assert len(echo.asked) == 1


HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.mark.slow
def test_what_waits_for_an_answer_is_sent_in_its_own_conversation_whatever_is_open_then(visit, site, echo):
    page = visit(site)
    ask(page, "Another chat")
    box(page).fill("A draft that nobody sends")
    page.get_by_role("button", name="New chat").first.click()
    send(page, "long")
    expect(answers(page)).to_contain_text("word2")
    send(page, "And then?")
    expect(page.get_by_text("Sent as soon as this answer ends.")).to_be_visible()
    page.reload()
    expect(box(page)).to_have_value("And then?")
    expect(page.get_by_text("Sent as soon as this answer ends.")).to_be_visible()
    page.get_by_role("navigation").get_by_text("Another chat").click()
    expect(box(page)).to_have_value("A draft that nobody sends")
    expect(page.get_by_text("Sent as soon as this answer ends.")).to_have_count(0)
    echo.gate.open()
    expect(page.locator("#sidebar .open").first).to_contain_text("long")
    page.get_by_role("navigation").get_by_text("long").click()
    expect(answers(page)).to_have_text(["".join(WORDS).strip(), "You said And then?"])
    expect(box(page)).to_have_value("")
    assert [messages[-1]["content"] for messages, _ in echo.asked] == ["Another chat", "long", "And then?"]


@pytest.mark.slow
def test_two_quick_clicks_ask_once_and_same_again_is_the_beginning_of_a_continued_answer(visit, site, echo):
    echo.say = lambda messages: Scripted("Once ", "upon", reason="length")
    page = visit(site)
    ask(page, "A story")
    page.get_by_role("button", name="Continue").click()
    expect(answers(page)).to_have_text("Once uponOnce upon")
    expect_unlocked(page)
    press(page, "Same again")
    expect(page.get_by_text("2/2")).to_be_visible()
    expect_unlocked(page)
    first, continued, again = (params.seed for _, params in echo.asked)
    assert (first == again, first == continued) == (True, False)
    page.locator("article").get_by_role("button", name="Retry").last.dblclick()
    expect(page.get_by_text("3/3")).to_be_visible()
    expect_unlocked(page)
    assert len(echo.asked) == 4


@pytest.mark.slow
def test_an_answer_that_is_asked_for_anew_while_another_is_written_waits_and_says_so(visit, site, echo):
    page = visit(site)
    ask(page, "First.")
    pace = threading.Event()
    echo.say = lambda messages: Scripted("Second.", gate=pace.is_set)
    send(page, "Next.")
    expect(page.locator("article")).to_have_count(4)
    for name in ("Retry", "Compare"):
        press(page, name, 0)
        expect(toast(page).last).to_contain_text("An answer is being written here.")
        expect(page.get_by_role("dialog")).to_have_count(0)
    pace.set()
    expect_unlocked(page)
    press(page, "Retry", 0)
    expect_unlocked(page)
    expect(page.locator("article.beside")).to_have_count(0)
    assert len(echo.asked) == 3


@pytest.mark.slow
def test_whoever_goes_elsewhere_while_a_conversation_opens_stays_there(visit, site):
    page = visit(site)
    ask(page, "A long one.")
    page.evaluate(
        """() => {
          const [fresh, old] = ["New chat", "A long one."].map((name) =>
            [...document.querySelectorAll("#sidebar button")].find(({ textContent }) => textContent.trim() === name));
          fresh.click(), old.click(), fresh.click();
        }"""
    )
    box(page).fill("Mine.")
    page.wait_for_timeout(500)
    expect(page).to_have_title("Llama 2 Chat")
    expect(box(page)).to_have_value("Mine.")


@pytest.mark.slow
def test_a_letter_with_thousands_of_marks_holds_up_nobody_and_is_kept_whole(visit, site, echo):
    page = visit(site)
    text = "e" + "\u0301" * 5000  # a browser's time grows with the square of it
    ask(page, text)
    expect(questions(page)).to_have_text("e" + "\u0301" * 64)
    assert echo.asked[-1][0][-1]["content"] == text
    page.reload()
    expect(questions(page)).to_have_text("e" + "\u0301" * 64)


@pytest.mark.slow
def test_another_title_is_the_title_of_the_page_too(visit, site):
    page = visit(site)
    ask(page, "First.")
    page.locator("#sidebar .open").press("F2")
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Renamed")
    expect(page).to_have_title("Renamed – Llama 2 Chat")


@pytest.mark.slow
def test_a_conversation_is_there_after_reload_and_back(visit, site):
    page = visit(site)
    ask(page, "The first one.")
    page.get_by_role("button", name="New chat").first.click()
    expect(questions(page)).to_have_count(0)
    ask(page, "The second one.")
    page.reload()
    expect(questions(page)).to_have_text(["The second one."])
    page.go_back()
    page.go_back()
    expect(questions(page)).to_have_text(["The first one."])


@pytest.mark.slow
def test_edits_and_retries_keep_the_other_branch(visit, site):
    page = visit(site)
    ask(page, "One")
    ask(page, "Two")
    edit(page, 0, "Three")
    expect_unlocked(page)
    expect(questions(page)).to_have_text(["Three"])
    expect(answers(page)).to_have_text(["You said Three"])
    press(page, "Previous version")
    expect(questions(page)).to_have_text(["One", "Two"])
    press(page, "Next version")
    expect(questions(page)).to_have_text(["Three"])
    page.reload()
    expect(questions(page)).to_have_text(["Three"])
    expect(page.get_by_text("2/2")).to_be_visible()


@pytest.mark.slow
def test_an_answer_can_be_edited_and_the_model_reads_it_so(visit, site, echo):
    page = visit(site)
    ask(page, "One")
    page.locator("article.assistant").get_by_role("button", name="Edit", exact=True).click()
    page.get_by_role("textbox", name="Edit the message").fill("I never said that.")
    page.get_by_role("button", name="Save").click()
    expect(answers(page)).to_have_text(["I never said that."])
    ask(page, "Two")
    assert [message["content"] for message in echo.asked[-1][0][-3:]] == ["One", "I never said that.", "Two"]


@pytest.mark.slow
def test_what_is_typed_and_not_sent_is_there_after_a_reload_in_mid_word(visit, site):
    page = visit(site)
    box(page).fill("A question I have not sent")
    page.reload()
    expect(box(page)).to_have_value("A question I have not sent")
    ask(page, "Sent.")
    box(page).fill("A second one")
    page.reload()
    expect(box(page)).to_have_value("A second one")
    box(page).fill("")
    page.reload()
    expect(questions(page)).to_have_text(["Sent."])
    expect(box(page)).to_have_value("")


@pytest.mark.slow
def test_a_message_is_answered_once_though_the_page_is_reloaded_in_the_moment_it_is_sent(visit, site, echo):
    page = visit(site)
    at_once = "location.reload()"
    once_kept = """new BroadcastChannel('llama2-chat').onmessage = ({ data, target }) => {
      if (data.kind === 'message') target.close(), location.reload(); // once: a second one would abort the first
    }"""
    texts = []
    for leave in [at_once, once_kept] * 3:
        texts.append(text := f"Message {len(texts)}")
        box(page).fill(text)
        with page.expect_navigation():
            page.evaluate(f"() => {{ document.querySelector('#composer form').requestSubmit(); {leave} }}")
        in_box = "document.querySelector('#composer textarea')?.value === text"
        sent = "[...document.querySelectorAll('article.user .body')].at(-1)?.textContent === text"
        page.wait_for_function(f"(text) => {in_box} || {sent}", arg=text)
        if box(page).input_value():  # it was not taken yet
            box(page).press("Enter")
        expect(answers(page).last).to_have_text(f"You said {text}")
        expect_unlocked(page)
        expect(box(page)).to_have_value("")
    expect(questions(page)).to_have_text(texts)
    assert [messages[-1]["content"] for messages, _ in echo.asked] == texts


HOLD_DATABASE = """async () => {
  const opening = indexedDB.open("llama2-chat");
  await new Promise((resolve) => (opening.onsuccess = resolve));
  const held = opening.result.transaction(["conversations", "messages", "known"], "readwrite").objectStore("known");
  let isHeld = true;
  (function hold() { if (isHeld) held.get("none").onsuccess = hold; })();
  window.releaseDatabase = () => (isHeld = false);
}"""


@pytest.mark.slow
def test_an_answer_can_be_stopped_before_it_was_asked_for_and_before_the_server_hears_of_it(visit, perform):
    page = visit(perform(ScriptedChat(say=lambda messages: Scripted("Never", gate=lambda: False))))
    page.evaluate(HOLD_DATABASE)  # as slow as a phone's can be
    send(page, "One")
    page.get_by_role("button", name="Stop").click()
    page.evaluate("releaseDatabase()")
    expect(remarks(page)).to_contain_text(["stopped"])
    expect_unlocked(page)
    held = []

    def hold(route):
        held.append(route) if route.request.method == "PUT" else route.fallback()

    page.route("**/page/answers/*", hold)
    send(page, "Two")
    expect(waiting(page)).to_be_visible()
    page.keyboard.press("Escape")
    page.wait_for_timeout(300)  # in which the server might hear of the end before the beginning
    held[0].fallback()
    expect(remarks(page)).to_contain_text(["stopped", "stopped"])
    expect_unlocked(page)


@pytest.mark.slow
def test_what_was_on_its_way_to_be_kept_and_what_was_typed_since_are_both_there_after_a_reload(visit, site, echo):
    page = visit(site)
    ask(page, "First")
    page.evaluate(HOLD_DATABASE)
    send(page, "Sent")
    box(page).fill("Typed since")
    page.reload()
    expect(box(page)).to_have_value("Sent\n\nTyped since")
    expect(questions(page)).to_have_text(["First"])


@pytest.mark.slow
def test_a_message_to_a_conversation_that_is_deleted_in_another_tab_comes_back_into_the_box(context, site):
    one = open_page(context.new_page(), site)
    ask(one, "First")
    two = open_page(context.new_page(), one.url)
    expect(answers(two)).to_have_count(1)
    one.evaluate(HOLD_DATABASE)
    delete = "(store) => void store.deleteConversation(location.hash.slice(1))"
    one.evaluate(f"import('/page/store.js').then(({{ openStore }}) => openStore()).then({delete})")
    send(two, "Not to be lost")
    one.evaluate("releaseDatabase()")
    expect(toast(two)).to_contain_text("deleted in another tab")
    expect(box(two)).to_have_value("Not to be lost")
    expect(questions(two)).to_have_count(0)


@pytest.mark.slow
def test_a_first_message_that_could_not_be_kept_begins_a_conversation_when_it_is_sent_again(context, site):
    page = open_page(context.new_page(), site)
    page.evaluate(FAIL_ONCE)
    send(page, "Hello")
    expect(toast(page)).to_contain_text("not this time")
    expect(box(page)).to_have_value("Hello")
    ask(page, "Hello")
    page.reload()
    expect(answers(page)).to_have_text("You said Hello")


FAIL_ONCE = """() => {
  const { put } = IDBObjectStore.prototype;
  IDBObjectStore.prototype.put = () => {
    IDBObjectStore.prototype.put = put;
    throw new DOMException("not this time", "InvalidStateError");
  };
}"""


@pytest.mark.slow
def test_of_what_waits_in_two_tabs_for_one_answer_the_newest_is_sent_and_the_other_stays(context, site, echo):
    one = open_page(context.new_page(), site)
    send(one, "long")
    expect(answers(one)).to_contain_text("word2")
    two = open_page(context.new_page(), one.url)
    expect(answers(two)).to_contain_text("word2")
    for tab, text in ((one, "From one"), (two, "From two")):
        send(tab, text)
        tab.wait_for_function(IS_DRAFT, arg=text)
    echo.gate.open()
    for tab in (one, two):
        expect(answers(tab).last).to_have_text("You said From two")
        expect_unlocked(tab)
    expect(box(one)).to_have_value("From one")
    expect(box(two)).to_have_value("")


IS_DRAFT = """async (text) => {
  const store = await (await import("/page/store.js")).openStore();
  return (await store.conversations())[0].draft === text;
}"""


@pytest.mark.slow
def test_a_question_that_the_line_swallowed_is_asked_by_the_page_that_comes_back(visit, site, echo):
    page = visit(site)
    page.route("**/page/answers/*", lambda route: route.abort())
    send(page, "Are you there?")
    expect(waiting(page)).to_have_attribute("data-waiting", "Connection lost. Trying again …")
    page.reload()
    expect(waiting(page)).to_have_attribute("data-waiting", "Connection lost. Trying again …")
    page.unroute("**/page/answers/*")
    expect(answers(page)).to_have_text("You said Are you there?")
    assert len(echo.asked) == 1


@pytest.mark.slow
def test_a_question_whose_tab_is_closed_before_the_server_has_it_is_asked_by_another(context, site, echo):
    one = open_page(context.new_page(), site)
    ask(one, "First")
    two = open_page(context.new_page(), one.url)
    expect(answers(two)).to_have_count(1)
    one.route("**/page/answers/*", lambda route: route.abort())
    send(one, "Second")
    expect(questions(two)).to_have_text(["First", "Second"])
    one.close()
    expect(answers(two)).to_have_text(["You said First", "You said Second"])
    assert len(echo.asked) == 2


@pytest.mark.slow
def test_each_tab_keeps_its_own_draft_and_a_new_one_has_the_newest(context, site):
    first, second = (open_page(context.new_page(), site) for _ in range(2))
    box(first).fill("For the first tab")
    box(second).fill("For the second tab")
    first.reload()
    expect(box(first)).to_have_value("For the first tab")
    expect(box(open_page(context.new_page(), site))).to_have_value("For the second tab")


@pytest.mark.slow
def test_a_message_that_is_being_edited_is_so_still_after_another_conversation_and_a_reload(visit, site, echo):
    page = visit(site)
    ask(page, "One")
    ask(page, "Two")
    begin_editing(page, 0, "One, but")
    page.get_by_role("button", name="New chat").first.click()
    ask(page, "Elsewhere")
    expect(page.locator(".editor")).to_have_count(0)
    page.get_by_role("navigation").get_by_text("One").click()
    expect(page.get_by_role("textbox", name="Edit the message")).to_have_value("One, but")
    expect(page.get_by_role("textbox", name="Edit the message")).not_to_be_focused()
    page.reload()
    field = page.get_by_role("textbox", name="Edit the message")
    expect(field).to_have_value("One, but")
    field.press("Enter")
    expect(questions(page)).to_have_text(["One, but"])
    expect_unlocked(page)
    page.reload()
    expect(answers(page)).to_have_count(1)
    expect(page.locator(".editor")).to_have_count(0)
    press(page, "Previous version")
    expect(questions(page)).to_have_text(["One", "Two"])
    expect(page.locator(".editor")).to_have_count(0)


@pytest.mark.slow
def test_edits_of_two_messages_are_both_kept_and_one_that_is_given_up_is_not(visit, site, echo):
    page = visit(site)
    ask(page, "One")
    begin_editing(page, 0, "A question half changed")
    page.locator("article.assistant").get_by_role("button", name="Edit", exact=True).click()
    page.get_by_role("textbox", name="Edit the message").nth(1).fill("An answer half changed")
    page.reload()
    fields = page.get_by_role("textbox", name="Edit the message")
    expect(fields).to_have_count(2)
    fields.nth(0).press("Escape")
    page.wait_for_timeout(600)
    page.reload()
    expect(fields).to_have_count(1)
    expect(fields).to_have_value("An answer half changed")


@pytest.mark.slow
def test_an_edit_that_is_sent_while_an_answer_is_written_stays_in_its_field_and_is_told_to_wait(visit, site, echo):
    page = visit(site)
    send(page, "long")
    expect(answers(page)).to_contain_text("word2")
    begin_editing(page, 0, "Changed meanwhile")
    field = page.get_by_role("textbox", name="Edit the message")
    field.press("Enter")
    expect(toast(page)).to_contain_text("An answer is being written here.")
    expect(field).to_have_value("Changed meanwhile")
    echo.gate.open()
    expect_unlocked(page)
    field.press("Enter")
    expect(answers(page)).to_have_text("You said Changed meanwhile")


def begin_editing(page, number, text):
    page.locator("article.user").nth(number).get_by_role("button", name="Edit", exact=True).click()
    page.get_by_role("textbox", name="Edit the message").fill(text)


@pytest.mark.slow
def test_settings_are_there_after_a_reload_and_go_back_to_the_defaults(visit, site, echo):
    page = visit(site)
    page.locator("#chat").get_by_role("button", name="Settings").click()
    page.get_by_role("spinbutton", name="Temperature").fill("1.5")
    page.get_by_role("textbox", name="System prompt").fill("Talk like a pirate.")
    page.reload()
    ask(page, "Hello")
    messages, params = echo.asked[-1]
    assert (messages[0]["content"], params.temperature) == ("Talk like a pirate.", 1.5)
    if not page.get_by_role("region", name="Settings").is_visible():
        page.locator("#chat").get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the defaults").click()
    ask(page, "Hello again")
    assert echo.asked[-1][1].temperature == settings_default("temperature")


def settings_default(name):
    from llama2_chat.types import SamplingParams

    return getattr(SamplingParams(), name)


@pytest.mark.slow
def test_a_setting_changed_in_one_tab_leaves_those_changed_in_another(context, site):
    first, second = (open_page(context.new_page(), site) for _ in range(2))
    for page in (first, second):
        wait_for_gradio(page)
        open_settings(page)
    first.get_by_role("textbox", name="System prompt").fill("Answer in verse.")
    second.get_by_role("spinbutton", name="Temperature").fill("1.5")
    second.get_by_role("spinbutton", name="Temperature").blur()
    for page in (first, second):
        page.reload()
        expect(page.get_by_role("textbox", name="System prompt")).to_have_value("Answer in verse.")
        expect(page.get_by_role("spinbutton", name="Temperature")).to_have_value("1.5")


@pytest.mark.slow
def test_two_tabs_see_each_others_conversations_and_overwrite_nothing(context, site):
    one, two = (open_page(context.new_page(), site) for _ in range(2))
    ask(one, "Said in the first tab")
    expect(two.get_by_role("navigation").get_by_text("Said in the first tab")).to_be_visible()
    two.get_by_role("navigation").get_by_text("Said in the first tab").click()
    expect(questions(two)).to_have_text(["Said in the first tab"])
    ask(two, "Said in the second tab")
    expect(questions(one)).to_have_text(["Said in the first tab", "Said in the second tab"])
    ask(one, "Said in the first tab again")
    expect(questions(two)).to_have_count(3)
    expect(two.locator("article .version")).to_have_count(0)


@pytest.mark.slow
def test_five_tabs_that_send_at_once_come_to_rest(context, site, echo):
    # A tab that read more slowly wrote over the end of an answer, which others then read again, and so on for ever.
    tabs = [open_page(context.new_page(), site)]
    ask(tabs[0], "First")
    tabs += [open_page(context.new_page(), tabs[0].url) for _ in range(4)]
    for number, tab in enumerate(tabs):
        expect(answers(tab)).to_have_count(1)
        box(tab).fill(f"From tab {number}")
    for tab in tabs:  # as soon as the last of them has been told
        tab.evaluate("""() => {
          new BroadcastChannel("start").onmessage = () => document.querySelector("#composer form").requestSubmit();
        }""")
    reads = []
    context.on("request", lambda request: "/page/answers/" in request.url and reads.append(request))
    tabs[0].evaluate("new BroadcastChannel('start').postMessage('now')")
    for tab in tabs:
        expect(answers(tab)).to_have_count(2)
        expect(answers(tab).last).to_contain_text("You said From tab")
        expect_unlocked(tab)
    sent = [f"From tab {number}" for number in range(5)]
    assert sorted(messages[-1]["content"] for messages, _ in echo.asked) == ["First", *sent]
    assert len(reads) <= 100  # of five answers in five tabs: most tabs read each of them once


@pytest.mark.slow
def test_the_gauge_says_what_would_be_left_out_before_it_is_and_the_transcript_marks_it(visit, site, echo):
    echo.context_length = 30
    page = visit(site)
    ask(page, "one two three four")
    expect(page.locator(".gauge")).to_contain_text("answer of up to")
    ask(page, "five six seven eight")
    box(page).fill("word " * 20)
    expect(page.locator(".gauge")).to_contain_text("The 2 oldest messages will be left out.")
    expect(page.get_by_role("separator")).to_have_text("The model no longer remembers what stands above this line.")
    expect(page.locator("article").nth(2).locator("xpath=preceding-sibling::*[1]")).to_have_attribute(
        "role", "separator"
    )
    box(page).fill("word " * 40)
    expect(page.locator(".gauge")).to_contain_text("Too long: it does not fit beside 15 for the answer.")


@pytest.mark.slow
def test_the_gauge_says_how_long_an_answer_can_be_and_what_stays_free_as_the_setting_changes(visit, site, echo):
    echo.context_length = 100
    page = visit(site)
    ask(page, "one two three four")
    open_settings(page)
    most = page.get_by_role("spinbutton", name="Max new tokens")
    most.fill("40")
    expect(page.locator(".gauge")).to_contain_text("11 of 100 tokens · answer of up to 40 · 49 free")
    most.fill("2000")
    expect(page.locator(".gauge")).to_contain_text("11 of 100 tokens · answer of up to 89 · 0 free")


@pytest.mark.slow
def test_a_private_chat_leaves_no_trace(visit, site):
    page = visit(site)
    ask(page, "Everybody may know.")
    page.get_by_role("button", name="Private chat").click()
    expect(page.get_by_text("Private chat: nothing is kept")).to_be_visible()
    ask(page, "Nobody may know 4711.")
    expect(answers(page)).to_have_text(["You said Nobody may know 4711."])
    page.reload()
    expect(box(page)).to_be_editable()
    expect(page.get_by_text("4711")).to_have_count(0)
    assert "4711" not in page.evaluate(ALL_THAT_IS_KEPT)
    assert "Everybody" in page.evaluate(ALL_THAT_IS_KEPT)


@pytest.mark.slow
def test_what_goes_on_behind_a_private_chat_draws_nothing_in_it_and_is_kept(visit, site, echo):
    page = visit(site)
    send(page, "long")
    expect(answers(page)).to_contain_text("word2")
    box(page).fill("Thanks")
    box(page).press("Enter")
    expect(page.locator(".below .note")).not_to_be_empty()
    page.get_by_role("button", name="Private chat").click()
    expect(page.locator("body.private")).to_have_count(1)
    ask(page, "Nobody may know")
    box(page).fill("Nor this")
    echo.gate.open()
    page.evaluate(BOTH_ARE_ANSWERED)
    expect(questions(page)).to_have_text(["Nobody may know"])
    expect(answers(page)).to_have_text(["You said Nobody may know"])
    expect(box(page)).to_have_value("Nor this")


BOTH_ARE_ANSWERED = """async () => {
  const store = await (await import("/page/store.js")).openStore();
  const [{ id }] = await store.conversations();
  while ((await store.messages(id)).filter(({ end }) => end).length < 2) await new Promise(requestAnimationFrame);
}"""


@pytest.mark.slow
def test_the_draft_of_a_new_chat_outlives_a_message_that_is_sent_in_another(visit, site):
    page = visit(site)
    ask(page, "First")
    page.get_by_role("button", name="New chat").first.click()
    box(page).fill("Not sent yet")
    page.get_by_role("navigation").get_by_text("First").click()
    expect(questions(page)).to_have_text(["First"])
    ask(page, "Second")
    page.get_by_role("button", name="New chat").first.click()
    expect(box(page)).to_have_value("Not sent yet")
    page.locator(".examples button").first.click()
    expect(questions(page)).to_have_count(1)
    expect_unlocked(page)
    expect(box(page)).to_have_value("Not sent yet")  # with the conversation of the example
    page.get_by_role("button", name="New chat").first.click()
    expect(box(page)).to_have_value("")


@pytest.mark.slow
def test_whoever_leaves_a_private_chat_frees_the_model(visit, site, echo):
    left = threading.Event()
    reply = Scripted("Once ", "upon", gate=Gate(first=1))
    reply.close = left.set
    page = visit(site)
    ask(page, "Everybody may know.")
    echo.say = lambda messages: reply
    page.get_by_role("button", name="Private chat").click()
    send(page, "Nobody may know")
    expect(answers(page)).to_have_text("Once")
    page.go_back()
    expect(questions(page)).to_have_text(["Everybody may know."])
    expect(page.locator("body.private")).to_have_count(0)
    assert left.wait(10)


ALL_THAT_IS_KEPT = """async () => {
  const { openStore } = await import("/page/store.js");
  const store = await openStore();
  const conversations = await store.conversations();
  const messages = await Promise.all(conversations.map(({ id }) => store.messages(id)));
  return JSON.stringify([conversations, messages, { ...localStorage }, location.href, document.title]);
}"""


@contextmanager
def open_streams(page):
    """The requests of a page that have not ended, while it lasts."""
    running = set()
    page.on("request", lambda request: running.add(request))
    page.on("requestfinished", lambda request: running.discard(request))
    page.on("requestfailed", lambda request: running.discard(request))
    yield running


@pytest.mark.slow
def test_seven_tabs_load_and_stop_still_stops(context, site, echo):
    # Each held a stream open over HTTP/1.1: a sixth did not load, and Stop had no line left.
    tabs = [open_page(context.new_page(), site) for _ in range(7)]
    send(tabs[-1], "long")
    expect(answers(tabs[-1])).to_contain_text("word2")
    stop(tabs[-1])
    expect(remarks(tabs[-1])).to_contain_text("stopped")


@pytest.mark.slow
def test_an_idle_tab_holds_no_connection(browser, site):
    with browser.new_page() as page, open_streams(page) as running:
        open_page(page, site)
        wait_for_gradio(page)
        page.wait_for_load_state("networkidle")
        assert not running
