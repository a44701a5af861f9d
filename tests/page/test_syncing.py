"""syncing.js in the browsers of one login: what one of them writes the others have, whatever was down meanwhile.

Each device is a browser of its own on the page's modules; the server's side is the real one, without a page.
"""

import json
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest

from llama2_chat import database
from llama2_chat.page import history as module
from llama2_chat.page.history import Histories
from tests.support.histories import HistoryClient
from tests.support.static_page import static_page
from tests.support.waiting import until

pytestmark = pytest.mark.slow

HELPERS = """
window.use = async (more = { profile: "anna", history: { records: 1000, bytes: 1e6 } }) => {
  const store = await (window.opened ??= (await import("./store.js")).openStore(more));
  const id = (name) => Array.from(name, (c) => c.charCodeAt(0).toString(16)).join("").padEnd(32, "0").slice(0, 32);
  const talk = (name, more = {}) => store.putConversation({
    id: id(name), title: name, renamed: false, pinned: false, createdAt: 1, updatedAt: 1, leafId: null, ...more });
  const say = async (name, message, more = {}) => {
    await store.putMessage({
      id: id(message), conversationId: id(name), parentId: null, role: "user", text: message, createdAt: 1, ...more });
    await store.updateConversation(id(name), (c) => Object.assign(c, { leafId: id(message), updatedAt: Date.now() }));
  };
  const change = (name, fields) => store.updateConversation(id(name), (c) => Object.assign(c, fields));
  const edit = (name, fields) => store.updateMessage(id(name), (m) => Object.assign(m, fields));
  const all = async () => Object.fromEntries(await Promise.all((await store.conversations()).map(
    async ({ id, title }) => [title, (await store.messages(id)).map(({ text }) => text).sort()])));
  return { store, id, talk, say, change, edit, all };
};
"""


class Server:
    """The routes, whose line may be down."""

    def __init__(self, folder):
        self.histories, self.is_up, self.puts = Histories(folder / "history"), True, 0
        self.anna = HistoryClient(self.histories, "anna")
        self.client = self.anna  # whose cookie the browsers have

    def answer(self, route):
        if not self.is_up:
            return route.abort()
        request = route.request
        self.puts += request.method == "PUT"
        headers = {"X-Login": request.headers["x-login"], "Content-Type": "application/json"}
        answer = self.client.request(
            request.method, "/page/" + request.url.partition("/page/")[2], content=request.post_data, headers=headers
        )
        return route.fulfill(status=answer.status_code, json=answer.json())

    @property
    def file(self):
        return self.histories.of("login anna").path

    def records(self):
        """Of all that is there, in plain words."""
        if not self.file.exists():
            return []
        with closing(sqlite3.connect(self.file)) as db:
            bodies = db.execute("SELECT body FROM records WHERE body IS NOT NULL").fetchall()
        return sorted((body.get("title") or body["text"]) for body in (json.loads(body) for (body,) in bodies))


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path)


@pytest.fixture(scope="module")
def address():
    with static_page() as address:
        yield address


@pytest.fixture
def device(browser, server, address):
    """Opens the page in a browser of its own, or in another tab of the one of a page."""
    contexts, errors = [], []

    def device(beside=None):
        context = beside.context if beside else browser.new_context()
        if not beside:
            contexts.append(context)
            context.add_init_script(HELPERS)
            context.route("**/page/history*", server.answer)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address)
        return page

    yield device
    for context in contexts:
        context.close()
    assert not errors


def do(page, script):
    return page.evaluate(f"async () => {{ const t = await use(); {script} }}")


def look(*pages):
    """The line is back, or so the browser says."""
    for page in pages:
        page.evaluate("() => dispatchEvent(new Event('online'))")


def all_of(page):
    return do(page, "return t.all()")


def until_on(page, expected):
    """Once this is what a browser has: title -> texts."""

    def has():
        look(page)
        page.wait_for_timeout(50)
        return all_of(page) == expected

    until(has)


def until_kept(server, page, *expected):
    def has():
        page.wait_for_timeout(50)  # in which what it asks is answered
        return server.records() == sorted(expected)

    until(has)


def until_told(page, problem):
    """Until the page says what is wrong; or, with "", that nothing is any more."""

    def is_told():
        page.wait_for_timeout(50)
        told = do(page, "return t.store.problem")
        return problem in told if problem else not told

    until(is_told)


def test_what_a_browser_held_before_is_taken_over_and_every_device_has_all_of_it_once(device, server):
    laptop = device()
    laptop.evaluate("() => use({ profile: 'anna' })")  # as with HISTORY=browser
    do(laptop, "await t.talk('a', { draft: 'half a se' }); await t.say('a', 'hello'); await t.talk('b');")
    laptop.reload()
    do(laptop, "return t.store.shared")
    until_kept(server, laptop, "a", "hello", "b")
    phone, tab = device(), device(laptop)
    for page in (phone, tab):
        until_on(page, {"a": ["hello"], "b": []})
    do(phone, "await t.say('a', 'more', { parentId: t.id('hello') })")
    do(tab, "await t.talk('c')")
    for page in (laptop, tab, phone):
        until_on(page, {"a": ["hello", "more"], "b": [], "c": []})
    until_kept(server, laptop, "a", "b", "c", "hello", "more")
    # What a tab had no time to send, another one does.
    server.is_up = False
    do(tab, "await t.talk('d')")
    tab.close()
    server.is_up = True
    until_kept(server, laptop, "a", "b", "c", "d", "hello", "more")
    do(laptop, "await t.store.deleteConversation(t.id('d'))")
    until_kept(server, laptop, "a", "b", "c", "hello", "more")
    puts = server.puts
    for page in (laptop, phone):
        page.reload()
        until_on(page, {"a": ["hello", "more"], "b": [], "c": []})
    assert server.puts == puts  # there was nothing to tell
    assert "half a se" not in server.file.read_bytes().decode("latin-1")
    assert do(laptop, "return (await t.store.conversation(t.id('a'))).draft") == "half a se"


def test_who_answers_in_a_conversation_and_how_it_starts_is_the_same_on_every_device(device, server):
    laptop, phone = device(), device()
    start = {"systemPrompt": "Rhyme.", "examples": [], "reminder": ""}
    chosen = "return [(await t.store.conversation(t.id('a'))).adapter, (await t.store.conversation(t.id('a'))).start]"
    do(laptop, f"await t.talk('a', {{ adapter: 'poet', start: {json.dumps(start)} }}); await t.say('a', 'hello');")
    until_on(phone, {"a": ["hello"]})
    assert do(phone, chosen) == ["poet", start]  # the phone asked the model itself
    do(phone, "await t.store.updateConversation(t.id('a'), (kept) => (delete kept.adapter, delete kept.start))")
    do(phone, "await t.change('a', { title: 'b' })")
    until_on(laptop, {"b": ["hello"]})
    assert do(laptop, chosen) == [None, None]


def test_what_two_devices_write_while_the_line_is_down_is_all_kept(device, server):
    laptop, phone = device(), device()
    do(laptop, "await t.talk('a'); await t.say('a', 'hello');")
    until_on(phone, {"a": ["hello"]})
    server.is_up = False
    answer = "{ parentId: t.id('hello'), role: 'assistant', end: { reason: 'stop' } }"
    do(laptop, f"await t.say('a', 'from the laptop', {answer}); await t.change('a', {{ title: 'Renamed' }});")
    do(phone, f"await t.say('a', 'from the phone', {answer}); await t.change('a', {{ pinned: true }});")
    # The same message, too: no turn gives way to another.
    do(laptop, "await t.edit('hello', { text: 'hello, said the laptop' })")
    do(phone, "await t.edit('hello', { text: 'hello, said the phone' })")
    until_told(laptop, "cannot be reached")
    server.is_up = True
    texts = ["from the laptop", "from the phone", "hello, said the laptop", "hello, said the phone"]
    for page in (laptop, phone):
        until_on(page, {"Renamed": texts})
    until_told(laptop, "")
    assert [do(page, "return (await t.store.conversation(t.id('a'))).pinned") for page in (laptop, phone)] == [True] * 2


def test_an_answer_under_way_can_be_read_on_elsewhere_and_its_end_is_kept(device, server):
    laptop, phone = device(), device()
    do(laptop, "await t.talk('a'); await t.say('a', 'hello')")
    answer = "{ parentId: t.id('hello'), role: 'assistant', answerId: t.id('x') }"
    do(laptop, f"await t.say('a', 'wo', {{ ...{answer}, unasked: true }})")
    until_kept(server, laptop, "a", "hello")
    do(laptop, "await t.edit('wo', { unasked: undefined, text: 'word' })")
    until_on(phone, {"a": ["", "hello"]})
    assert do(phone, "return (await t.store.messages(t.id('a'))).map((m) => m.answerId).filter(Boolean)")
    puts = server.puts
    do(laptop, "await t.edit('wo', { text: 'word by' })")
    do(laptop, "await t.edit('wo', { text: 'word by word', answerId: undefined, end: { reason: 'stop' } })")
    # One that found no answer any more takes nothing from one that has it.
    do(phone, "await t.edit('wo', { answerId: undefined, end: { reason: 'interrupted' } })")
    for page in (laptop, phone):
        until_on(page, {"a": ["hello", "word by word"]})
    until_kept(server, laptop, "a", "hello", "word by word")
    assert server.puts - puts <= 3
    # What the model refused leaves every browser.
    do(laptop, "await t.say('a', 'too long')")
    until_on(phone, {"a": ["hello", "too long", "word by word"]})
    do(laptop, "await t.store.removeMessages(t.id('a'), [t.id('too long')])")
    until_on(phone, {"a": ["hello", "word by word"]})
    until_kept(server, phone, "a", "hello", "word by word")


def test_what_is_deleted_is_gone_everywhere_and_undo_brings_it_back(device, server):
    laptop, phone = device(), device()
    do(laptop, "await t.talk('Quetzalcoatlus'); await t.say('Quetzalcoatlus', 'Ferrandini'); await t.talk('b')")
    until_on(phone, {"Quetzalcoatlus": ["Ferrandini"], "b": []})
    do(laptop, "window.undo = await t.store.deleteConversation(t.id('Quetzalcoatlus'))")
    until_on(phone, {"b": []})
    content = b"".join(path.read_bytes() for path in server.file.parent.iterdir())
    assert b"Quetzal" not in content
    assert b"Ferrandini" not in content
    laptop.evaluate("() => undo()")
    until_on(phone, {"Quetzalcoatlus": ["Ferrandini"], "b": []})
    until_kept(server, laptop, "Quetzalcoatlus", "Ferrandini", "b")
    # Without a line, and the page closed before it is back.
    server.is_up = False
    laptop.clock.install()
    do(laptop, "await t.store.deleteConversation(t.id('Quetzalcoatlus'))")
    laptop.clock.run_for(11_000)
    do(phone, "await t.say('Quetzalcoatlus', 'late')")
    laptop.reload()
    server.is_up = True
    for page in (laptop, phone):
        until_on(page, {"b": []})
    until_kept(server, laptop, "b")


def test_where_the_server_has_no_room_the_browsers_copy_stays_and_deleting_helps(device, server, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 3_000)
    laptop = device()
    do(laptop, "await t.talk('a'); await t.say('a', 'x'.repeat(1500))")
    until_kept(server, laptop, "a", "x" * 1500)
    do(laptop, "await t.talk('b'); await t.say('b', 'y'.repeat(1000))")
    until_told(laptop, "stay in this browser")
    assert all_of(laptop) == {"a": ["x" * 1500], "b": ["y" * 1000]}
    do(laptop, "await t.store.deleteConversation(t.id('a'))")
    until_kept(server, laptop, "b", "y" * 1000)
    until_told(laptop, "")
    monkeypatch.setattr(database.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    do(laptop, "await t.say('b', 'z')")
    until_told(laptop, "disk of this server is full")


def test_a_message_too_large_for_the_server_holds_back_no_other(device, server):
    laptop = device()
    do(laptop, "await t.talk('a'); await t.say('a', 'x'.repeat(4_000_100)); await t.say('a', 'little')")
    until_kept(server, laptop, "a", "little")
    until_told(laptop, "more than 4 MB")
    assert len(all_of(laptop)["a"]) == 2


def test_private_chats_and_other_logins_send_nothing(device, server):
    laptop = device()
    do(laptop, "await t.talk('a')")
    until_kept(server, laptop, "a")
    laptop.evaluate("""async () => {
      const secret = await (await import("./store.js")).openStore({ private: true, profile: "anna", history: {} });
      await secret.putConversation({ id: "f".repeat(32), title: "secret", createdAt: 1, updatedAt: 1, leafId: null });
    }""")
    server.client = HistoryClient(server.histories, "bert")  # somebody else has logged in in another tab
    do(laptop, "await t.talk('b')")
    until_told(laptop, "Somebody else")
    assert server.records() == ["a"]
    assert not server.histories.of("login bert").path.exists()
    server.client = server.anna
    look(laptop)
    until_kept(server, laptop, "a", "b")


def test_a_server_that_has_lost_its_file_gets_all_of_it_again(device, server):
    laptop, phone = device(), device()
    do(laptop, "await t.talk('a'); await t.say('a', 'hello')")
    until_on(phone, {"a": ["hello"]})
    for path in list(server.file.parent.iterdir()):
        path.unlink()
    do(phone, "await t.talk('b')")
    for page in (phone, laptop):
        until_on(page, {"a": ["hello"], "b": []})
    until_kept(server, laptop, "a", "b", "hello")
