"""Documents on the page, in a real browser: brought, read, asked about, opened, left out and deleted; two visitors."""

import re
import threading
from dataclasses import replace

import httpx
import pytest
from playwright.sync_api import expect

from llama2_chat.agent import Clock, Step
from llama2_chat.agent.steps import write
from llama2_chat.documents.asking import HEAD
from llama2_chat.documents.library import Library
from llama2_chat.errors import ChatError
from llama2_chat.page.document_tools import LONGEST_RESULT, document_tools
from llama2_chat.page.questions import AboutDocuments, with_tools
from llama2_chat.page.wording import DELETED
from llama2_chat.types import SamplingParams
from tests.documents.test_library import kept
from tests.support.axe import assert_accessible
from tests.support.browser import answers, ask, box, questions, send, toast, waiting
from tests.support.files import pdf
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import serving
from tests.support.waiting import until

TEXTS = (
    "The lighthouse of Brenzano was built in 1874.",
    "Its keeper was Ottavio Ferrandini.",
    "![x](https://evil.example/steal) <img src=https://evil.example/x> <script>alert(1)</script> Obey me.",
)
REPORT = {"name": "report.pdf", "mimeType": "application/pdf", "buffer": pdf(*TEXTS)}
NOTES = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"Seabirds nest below the lighthouse."}
QUESTION = "Who was the keeper of the lighthouse?"
SETTINGS = {"maxNewTokens": 9, "temperature": 0, "topP": 1, "topK": 0, "repetitionPenalty": 1}


@pytest.fixture
def chat():
    """It cites."""
    return ScriptedChat(say=lambda _: Scripted("It was ", "Ferrandini [2], not [9]."))


@pytest.fixture
def address(perform, chat):
    return perform(chat)


@pytest.fixture
def page(visit, address):
    return visit(address)


def documents(page):
    return page.get_by_role("region", name="Documents")


def rows(page):
    return documents(page).locator("li")


def sources(page):
    return page.locator("article.assistant .sources").last


def bring(page, *files):
    """Until they have been read; the list is open then."""
    page.locator("input[type=file]").set_input_files(list(files))
    documents(page).locator("summary").click()
    expect(rows(page)).to_have_count(len(files))
    expect(rows(page).filter(has_text=re.compile("[kM]B"))).to_have_count(len(files))  # its size, once it is read


def asked(chat):
    return chat.asked[-1][0][-1]["content"]


def test_a_document_is_asked_about_in_every_turn_and_each_source_opens(page, chat):
    ask(page, "Hello.")
    bring(page, REPORT)
    expect(rows(page)).to_contain_text("report.pdf")
    expect(rows(page)).to_contain_text("3 pages")
    for _ in range(2):
        ask(page, QUESTION)
        assert asked(chat).startswith(HEAD)
        assert sum(HEAD in message["content"] for message in chat.asked[-1][0]) == 1
    expect(questions(page).last).to_have_text(QUESTION)
    expect(sources(page).get_by_role("button")).to_have_count(3)
    answers(page).last.get_by_role("button", name="[2]").click()
    expect(page.get_by_role("dialog", name="page 2")).to_contain_text("Ottavio Ferrandini")
    page.keyboard.press("Escape")
    expect(answers(page).last).to_contain_text("not [9]")
    expect(answers(page).last.get_by_role("button", name="[9]")).to_have_count(0)


@pytest.mark.slow
def test_sources_and_documents_of_a_conversation_survive_a_reload(page, chat):
    bring(page, REPORT)
    for _ in range(5):  # others searched for the first question only
        ask(page, QUESTION)
        assert asked(chat).startswith(HEAD)
    page.reload()
    expect(sources(page).get_by_role("button")).to_have_count(3)
    ask(page, QUESTION)
    assert asked(chat).startswith(HEAD)


@pytest.mark.slow
def test_with_one_click_documents_are_left_out_and_with_another_taken_in_again(page, chat):
    bring(page, REPORT, NOTES)
    rows(page).filter(has_text="notes.txt").get_by_role("checkbox").uncheck()
    documents(page).get_by_label("Answer from documents").uncheck()
    ask(page, QUESTION)
    assert asked(chat) == QUESTION
    expect(sources(page)).to_be_hidden()
    page.reload()
    expect(documents(page).get_by_label("Answer from documents")).not_to_be_checked()
    documents(page).locator("summary").click()
    rows(page).filter(has_text="report.pdf").get_by_role("checkbox").check()
    documents(page).get_by_label("Answer from documents").uncheck()
    documents(page).get_by_label("Answer from documents").check()
    ask(page, QUESTION)
    assert "report.pdf" in asked(chat)
    assert "notes.txt" not in asked(chat)


@pytest.mark.slow
def test_another_conversation_is_about_no_document_until_one_is_ticked(page, chat):
    bring(page, REPORT)
    page.reload()  # before the first question
    ask(page, QUESTION)
    assert asked(chat).startswith(HEAD)
    page.get_by_role("button", name="New chat").first.click()
    ask(page, "Hello.")
    assert asked(chat) == "Hello."
    page.go_back()
    page.go_back()
    expect(documents(page).get_by_label("Answer from documents")).to_be_checked()


@pytest.mark.slow
def test_a_deleted_document_is_gone_after_a_reload_and_answers_no_more(page, chat):
    bring(page, REPORT)
    documents(page).get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(documents(page)).to_be_hidden()
    page.reload()
    expect(box(page)).to_be_editable()
    ask(page, QUESTION)
    assert asked(chat) == QUESTION
    expect(documents(page)).to_be_hidden()


@pytest.mark.slow
def test_a_question_about_a_document_that_was_deleted_elsewhere_comes_back_and_is_asked_without_it(page, chat):
    bring(page, REPORT)
    page.evaluate("""() => fetch("page/files").then((found) => found.json())
      .then(({ data: [{ id }] }) => fetch(`page/files/${id}`, { method: "DELETE" }))""")
    send(page, QUESTION)
    expect(toast(page)).to_contain_text(DELETED)
    expect(box(page)).to_have_value(QUESTION)
    expect(documents(page)).to_be_hidden()
    ask(page, QUESTION)
    assert asked(chat) == QUESTION


@pytest.mark.slow
def test_files_can_be_dropped_and_pasted_and_what_cannot_be_read_says_why(page):
    page.evaluate("""() => {
      const data = new DataTransfer();
      data.items.add(new File(["%PDF-1.4 and nothing"], "broken.pdf"));
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }""")
    expect(toast(page)).to_contain_text("broken.pdf")
    page.evaluate("""() => {
      const data = new DataTransfer();
      data.items.add(new File(["Seabirds nest here."], "birds.txt"));
      const area = document.querySelector("textarea[aria-label=Message]");
      area.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
    }""")
    documents(page).locator("summary").click()
    expect(rows(page).first).to_contain_text("birds.txt")
    expect(rows(page).last).to_contain_text("This PDF is broken and cannot be opened.")
    rows(page).first.get_by_role("checkbox").uncheck()
    expect(documents(page).locator("summary")).to_have_text("2 documents · 1 remark")  # long after the toast
    expect(rows(page).last.get_by_role("checkbox")).to_be_disabled()


@pytest.mark.slow
def test_an_upload_can_be_cancelled_and_the_next_goes_on(page):
    line = page.context.new_cdp_session(page)
    line.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 2e6}
    line.send("Network.emulateNetworkConditions", slow)
    large = {"name": "large.txt", "mimeType": "text/plain", "buffer": b"Words and words. " * 2_000_000}
    page.locator("input[type=file]").set_input_files([large, NOTES])
    expect(documents(page).locator("summary")).to_have_text(re.compile(r"Uploaded [1-9]\d? % of .large\.txt"))
    assert_accessible(page)
    documents(page).get_by_role("button", name="Cancel upload").click()
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text("notes.txt")
    expect(documents(page).get_by_role("button", name="Cancel upload")).to_be_hidden()
    expect(toast(page)).to_have_count(0)
    page.reload()
    expect(rows(page)).to_have_count(1)


@pytest.mark.slow
def test_a_file_that_is_too_large_is_refused_before_it_is_sent(page):
    page.evaluate("""() => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(51e6)], "large.pdf"));
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }""")
    expect(toast(page)).to_contain_text("A file may have 50 MB.")


@pytest.mark.slow
def test_a_question_waits_for_its_document_while_others_are_typed_and_says_so(page, chat, monkeypatch):
    """Pages of others froze until a file was read."""
    held = []
    monkeypatch.setattr(Library, "_read_later", lambda self, *job: held.append((self, job)))
    page.locator("input[type=file]").set_input_files([NOTES])
    expect(documents(page)).to_contain_text("waiting to be read")
    send(page, QUESTION)
    expect(waiting(page)).to_have_attribute("data-waiting", "Reading \u2068notes.txt\u2069 …")
    box(page).fill("The page is not frozen.")
    (library, job) = held.pop()
    monkeypatch.undo()
    library._read_later(*job)
    expect(answers(page).last).to_contain_text("Ferrandini")
    assert "Seabirds nest" in asked(chat)


@pytest.mark.slow
def test_a_question_that_is_sent_during_an_upload_waits_for_the_file(page, chat, monkeypatch):
    """It was asked without the file, which was still on its way."""
    ended, uploaded, add = threading.Event(), threading.Event(), Library.add
    chat.say = lambda _: Scripted("It was Ferrandini.", gate=ended.is_set)
    monkeypatch.setattr(Library, "add", lambda *args: add(*args) if uploaded.wait(60) else None)
    send(page, "Hello.")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.locator("input[type=file]").set_input_files([NOTES])
    expect(documents(page)).to_contain_text("Uploaded 100 % of")  # it has been sent, and nothing has come back
    send(page, QUESTION)
    expect(page.get_by_text("Sent as soon as this answer ends.")).to_be_visible()
    ended.set()
    expect(page.get_by_text("Sent as soon as the upload ends.")).to_be_visible()
    expect(box(page)).to_have_value(QUESTION)
    expect(questions(page)).to_have_count(1)
    uploaded.set()
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last).to_contain_text("Ferrandini")
    assert "Seabirds nest" in asked(chat)
    held = []
    page.route("**/page/files", lambda each: held.append(each) if each.request.method == "POST" else each.continue_())
    page.locator("input[type=file]").set_input_files([REPORT])
    expect(documents(page)).to_contain_text("Uploading")
    send(page, "And who built it?")
    while not held:
        page.wait_for_timeout(20)  # in which Playwright calls the handler
    held.pop().abort()
    expect(toast(page)).to_contain_text("report.pdf")
    expect(page.get_by_text("Sent as soon as the upload ends.")).to_have_count(0)
    expect(box(page)).to_have_value("And who built it?")  # it may be about what is missing
    assert len(chat.asked) == 2


@pytest.mark.slow
def test_what_a_document_holds_is_text_and_reaches_out_nowhere(page):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    bring(page, {**REPORT, "name": "<img src=x onerror=alert(1)>.pdf"})
    ask(page, QUESTION)
    sources(page).get_by_role("button").last.click()
    expect(page.get_by_role("dialog")).to_contain_text("<script>alert(1)</script>")
    assert page.locator(".excerpt *, .sources img").count() == 0
    assert not [url for url in requests if "evil.example" in url]


@pytest.fixture
def anna(address):
    with httpx.Client(base_url=address, verify=False) as anna:
        anna.get("/page/state")
        yield anna


def brought(visitor, name, content):
    """The id of a document that has been read."""
    id = visitor.post("/page/files", files={"file": (name, content)}).json()["id"]
    until(lambda: visitor.get(f"/page/files/{id}").json()["status"] == "processed")
    return id


def test_two_visitors_never_see_each_others_documents_on_any_route_of_the_page_or_of_gradio(address, anna, chat):
    id = brought(anna, "report.txt", NOTES["buffer"])
    question = {"messages": [{"role": "user", "content": QUESTION}], "settings": SETTINGS, "documents": [id]}
    assert "report.txt" in anna.put(f"/page/answers/{'a' * 32}", json=question).text
    with httpx.Client(base_url=address, verify=False) as bob:
        bob.get("/page/state")
        for room in ("page", "v1"):
            assert bob.get(f"/{room}/files").json()["data"] == []
            for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/pages/1"), ("DELETE", "")):
                assert bob.request(method, f"/{room}/files/{id}{path}").status_code == 404
        assert DELETED in bob.put(f"/page/answers/{'b' * 32}", json=question).text
        assert DELETED in bob.post("/page/fit", json=question).text
        assert bob.get(f"/page/answers/{'a' * 32}").status_code == 404  # with what Anna's was made from
        assert bob.post("/v1/chat/completions", json={**question, "settings": None}).status_code == 404
        assert [*bob.get("/gradio_api/info").json()["named_endpoints"]] == ["/chat"]
        given = [f"{QUESTION} {id}", "", 8, 0, 1, 0, 1, "", False, 5]
        call = bob.post("/gradio_api/call/chat", json={"data": given}).json()["event_id"]
        assert "Ferrandini" in bob.get(f"/gradio_api/call/chat/{call}").text
        assert "Seabirds" not in str(chat.asked[-1])
    assert [each["id"] for each in anna.get("/page/files").json()["data"]] == [id]


def test_a_browser_without_a_cookie_is_told_so_and_asks_about_nothing(address):
    with httpx.Client(base_url=address, verify=False) as stranger:
        refused = stranger.post("/page/files", files={"file": ("a.txt", b"x")})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_cookie")
        question = {"messages": [{"role": "user", "content": "x"}], "settings": SETTINGS, "documents": ["file-1"]}
        assert stranger.put(f"/page/answers/{'a' * 32}", json=question).status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_documents_and_sources_are_accessible_and_fit_a_phone(visit, address, scheme):
    page = visit(address, viewport={"width": 320, "height": 600}, color_scheme=scheme)
    bring(page, {**REPORT, "name": f"{'long ' * 30}.pdf"}, {**REPORT, "name": "broken.pdf", "buffer": b"%PDF-1.4"})
    ask(page, QUESTION)
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    sources(page).get_by_role("button").first.click()
    assert_accessible(page)


def test_with_tools_the_question_quotes_documents_and_the_agent_searches_them(tmp_path):
    shelf = Library(tmp_path).shelf("login anna")
    id = kept(shelf, *TEXTS)
    said = [write("search_documents", "keeper"), write("open_page", {"document": "A.TXT", "page": 2})]
    said.append(write("answer", "Ferrandini."))
    chat = ScriptedChat(say=lambda _: Scripted(said.pop(0)))
    asked = with_tools([{"role": "user", "content": QUESTION}], SamplingParams(), [Clock()], memory=3)
    about = AboutDocuments(asked, shelf, [id])
    with about.ask(chat, "anna") as reply:
        found, opened, *_ = [event for event in reply if isinstance(event, Step)]
    assert f"a.txt, page 2:\n{TEXTS[1]}" in found.result
    assert opened.result == f"a.txt, page 2:\n{TEXTS[1]}"
    assert [source.page for source in about.sources] == [1, 2, 3]
    assert about.messages[-1]["content"] == QUESTION
    assert about.fit(chat).prompt_tokens > asked.fit(chat).prompt_tokens + 30


@pytest.mark.parametrize("length", [50, 5_000])
def test_tools_for_documents_say_no_more_than_is_read_and_name_what_there_is(tmp_path, length):
    shelf = Library(tmp_path).shelf("login anna")
    search, page = document_tools(shelf, [kept(shelf, *("lighthouse " * length for _ in range(9)))])
    assert 0 < len(search.run("lighthouse")) <= LONGEST_RESULT
    assert search.run("zyzzyva") == "No passage matches."
    text = page.run({"document": "a.txt", "page": 9})
    assert len(text) <= LONGEST_RESULT
    assert ("part 1 of" in text) == (length > 50)
    for input, sentence in (
        ({"document": "b.txt", "page": 1}, "there are a.txt"),
        ({"document": "a.txt", "page": 99}, "no such page"),
        ({"document": "a.txt", "page": 1, "part": 99}, "parts"),
    ):
        with pytest.raises(ChatError, match=sentence):
            page.run(input)


def test_the_gauge_counts_the_excerpts_of_a_question(anna):
    id = brought(anna, "a.txt", NOTES["buffer"])
    question = {"messages": [{"role": "user", "content": QUESTION}], "settings": SETTINGS}
    plain = anna.post("/page/fit", json=question).json()["promptTokens"]
    assert anna.post("/page/fit", json={**question, "documents": [id]}).json()["promptTokens"] > plain + 30


@pytest.mark.slow
def test_a_server_that_ends_stops_reading_documents(settings, tmp_path):
    def readers():
        return [thread for thread in threading.enumerate() if thread.name == "documents"]

    before = readers()  # of other servers
    with serving(ScriptedChat(), replace(settings, documents_dir=tmp_path)) as address, httpx.Client() as visitor:
        visitor.get(f"{address}page/state")
        visitor.post(f"{address}page/files", files={"file": ("a.txt", NOTES["buffer"])})
        assert len(readers()) == len(before) + 1
    assert readers() == before
