"""store.js and tree.js in a browser: what is written stays, for all tabs, and what is broken still opens."""

import pytest

from tests.support.static_page import static_page

# What every script here may use: a store, and conversations and messages with short names instead of random ids.
HELPERS = """
window.use = async ({ private: hidden = false } = {}) => {
  const store = await import("./store.js");
  const tree = await import("./tree.js");
  const id = (name) => Array.from(name, (c) => c.charCodeAt(0).toString(16)).join("").padEnd(32, "0").slice(0, 32);
  const conversation = (name, more = {}) => ({
    id: id(name), title: name, renamed: false, pinned: false, createdAt: 1, updatedAt: 1, leafId: null, ...more,
  });
  const message = (conversationName, name, more = {}) => ({
    id: id(name), conversationId: id(conversationName), parentId: null, role: "user", text: name, createdAt: 1, ...more,
  });
  return { ...store, ...tree, id, conversation, message, store: await store.openStore({ private: hidden }) };
};
"""


@pytest.fixture(scope="module")
def address():
    with static_page() as address:
        yield address


@pytest.fixture
def context(browser):
    context = browser.new_context()
    context.add_init_script(HELPERS)
    yield context
    context.close()


@pytest.fixture
def open_tab(context, address):
    """Opens one more tab of the same browser."""
    errors = []

    def open_tab():
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address)
        return page

    yield open_tab
    assert not errors


@pytest.fixture
def tab(open_tab):
    return open_tab()


def titles(page):
    return page.evaluate("async () => (await (await use()).store.conversations()).map(({ title }) => title)")


# ---- the store


def test_what_is_written_is_there_after_a_reload(tab):
    written = tab.evaluate("""async () => {
      const { store, conversation, message } = await use();
      const end = { reason: "stop", promptTokens: 3, tokensPerS: 1.5 };
      await store.putConversation(conversation("a", { draft: "half a se" }));
      await store.putMessage(message("a", "hello"));
      await store.putMessage(message("a", "answer", { role: "assistant", createdAt: 2, end }));
      return [await store.conversations(), await store.messages((await use()).id("a")), store.persistent];
    }""")
    tab.reload()
    read = tab.evaluate("""async () => {
      const { store, id } = await use();
      return [await store.conversations(), await store.messages(id("a")), store.persistent];
    }""")
    assert read == written
    assert read[0][0]["draft"] == "half a se"
    assert [message["text"] for message in read[1]] == ["hello", "answer"]
    assert read[2] is True


def test_messages_and_their_conversation_are_written_together_or_not_at_all(tab):
    kept, gone, torn, begun, deleted = tab.evaluate("""async () => {
      const { store, conversation, message, id } = await use();
      const write = async (name, conversationId, change, begun) => {
        const pair = [message(name, `${name} asks`), message(name, `${name} answers`, { createdAt: 2 })];
        const writing = store.putMessages(pair, id(conversationId), change, begun);
        const written = await writing.catch((error) => error.message);
        return [written, (await store.messages(id(name))).map(({ text }) => text)];
      };
      await store.putConversation(conversation("a"));
      await store.putConversation(conversation("deleted"));
      await store.deleteConversation(id("deleted"));
      return [
        await write("a", "a", (kept) => { kept.leafId = "the answer"; }),
        await write("gone", "gone", () => {}),
        await write("torn", "a", () => { throw new Error("no"); }),
        await write("begun", "begun", (kept) => { kept.leafId = "the answer"; }, conversation("begun")),
        await write("deleted", "deleted", () => {}),
      ];
    }""")
    assert kept[0]["leafId"] == "the answer"
    assert kept[1] == ["a asks", "a answers"]
    assert gone == [None, []]
    assert torn == ["no", []]
    assert begun[0]["leafId"] == "the answer"
    assert begun[1] == ["begun asks", "begun answers"]
    assert deleted == [None, []]


def test_pinned_conversations_come_first_and_then_the_newest(tab):
    tab.evaluate("""async () => {
      const { store, conversation } = await use();
      for (const [name, updatedAt, pinned] of [["old", 1], ["new", 3], ["pinned", 2, true], ["older", 0]])
        await store.putConversation(conversation(name, { updatedAt, pinned: Boolean(pinned) }));
    }""")
    assert titles(tab) == ["pinned", "new", "old", "older"]


def test_two_tabs_that_write_at_once_lose_nothing(open_tab):
    one, two = open_tab(), open_tab()
    one.evaluate("async () => { const t = await use(); await t.store.putConversation(t.conversation('shared')) }")
    for page, name in ((one, "one"), (two, "two")):
        page.evaluate(
            """(name) => { window.writing = (async () => {
              const { store, conversation, message, id } = await use();
              for (let n = 0; n < 40; n++) await Promise.all([
                store.putConversation(conversation(`${name}${n}`)),
                store.putMessage(message("shared", `${name}-${n}`)),
                store.updateConversation(id("shared"), (c) => {
                  c[name] = (c[name] ?? 0) + 1;
                  c.both = (c.both ?? 0) + 1;
                }),
              ]);
            })() }""",
            name,
        )
    for page in (one, two):
        page.evaluate("() => window.writing")
    shared, messages, count = two.evaluate("""async () => {
      const { store, id } = await use();
      const all = await store.conversations();
      return [await store.conversation(id("shared")), (await store.messages(id("shared"))).length, all.length];
    }""")
    assert (shared["one"], shared["two"], shared["both"]) == (40, 40, 80)
    assert (messages, count) == (80, 81)


def test_a_title_changed_in_one_tab_and_a_pin_set_in_another_are_both_kept(open_tab):
    one, two = open_tab(), open_tab()
    one.evaluate("async () => { const t = window.t = await use(); await t.store.putConversation(t.conversation('a')) }")
    two.evaluate(
        "async () => { const t = window.t = await use(); window.seen = await t.store.conversation(t.id('a')) }"
    )
    one.evaluate("() => t.store.updateConversation(t.id('a'), (c) => { c.title = 'Renamed' })")
    two.evaluate("() => t.store.updateConversation(t.id('a'), (c) => { c.pinned = true })")
    read = one.evaluate("() => t.store.conversation(t.id('a'))")
    assert (read["title"], read["pinned"]) == ("Renamed", True)


def test_a_tab_hears_what_another_one_writes_and_deletes(open_tab):
    one, two = open_tab(), open_tab()
    listen = """async () => {
      const t = window.t = await use();
      window.heard = [];
      t.store.onChange((change) => heard.push(change));
    }"""
    one.evaluate(listen)
    two.evaluate(listen)
    one.evaluate("""async () => {
      await t.store.putConversation(t.conversation("a"));
      await t.store.putMessage(t.message("a", "hello"));
      await t.store.deleteConversation(t.id("a"));
    }""")
    a = one.evaluate("() => t.id('a')")
    two.wait_for_function("() => heard.length === 3")
    for page, here in ((one, True), (two, False)):
        changes = page.evaluate("() => heard")
        assert [change["kind"] for change in changes] == ["conversation", "message", "conversation"]
        assert {change["conversationId"] for change in changes} == {a}
        assert {change["here"] for change in changes} == {here}
    assert two.evaluate("() => t.store.conversations()") == []
    assert two.evaluate("async () => (await t.store.conversation(t.id('a'))) === undefined")


def test_a_listener_that_ended_hears_nothing_more(tab):
    heard = tab.evaluate("""async () => {
      const { store, conversation } = await use();
      const heard = [];
      const end = store.onChange(({ id }) => heard.push(id));
      await store.putConversation(conversation("a"));
      end();
      await store.putConversation(conversation("b"));
      return heard.length;
    }""")
    assert heard == 1


def test_a_conversation_that_is_there_is_not_replaced_by_a_stale_copy(tab):
    title = tab.evaluate("""async () => {
      const { store, conversation, id } = await use();
      await store.putConversation(conversation("a"));
      await store.updateConversation(id("a"), (c) => { c.title = "Renamed"; });
      return (await store.putConversation(conversation("a"))).title;
    }""")
    assert title == "Renamed"


def test_an_error_while_a_record_is_changed_leaves_it_as_it_was(tab):
    error, read = tab.evaluate("""async () => {
      const { store, conversation, id } = await use();
      await store.putConversation(conversation("a"));
      const failing = (c) => { c.title = "half"; throw new Error("no"); };
      const error = await store.updateConversation(id("a"), failing).catch((error) => error.message);
      return [error, await store.conversation(id("a"))];
    }""")
    assert error == "no"
    assert read["title"] == "a"


# ---- deleting


def test_a_deleted_conversation_can_be_brought_back_whole(tab):
    before, between, after = tab.evaluate("""async () => {
      const { store, conversation, message, id } = await use();
      await store.putConversation(conversation("a"));
      await store.putMessage(message("a", "hello"));
      const read = async () => [await store.conversations(), await store.messages(id("a"))];
      const before = await read();
      const undo = await store.deleteConversation(id("a"));
      const between = await store.conversations();
      await undo();
      return [before, between, await read()];
    }""")
    assert between == []
    assert after == before


def test_undo_of_deleting_all_brings_back_only_what_that_deleted(tab):
    names = tab.evaluate("""async () => {
      const { store, conversation, id } = await use();
      for (const name of ["a", "b", "c"]) await store.putConversation(conversation(name));
      await store.deleteConversation(id("a"));
      await new Promise((resolve) => setTimeout(resolve, 2)); // one millisecond later is another time of deletion
      const undo = await store.deleteAll();
      const none = (await store.conversations()).length;
      await undo();
      return [none, ...(await store.conversations()).map(({ title }) => title).sort()];
    }""")
    assert names == [0, "b", "c"]


COUNT_ALL = """() => new Promise((resolve) => {
  indexedDB.open("llama2-chat").onsuccess = ({ target: { result: db } }) => {
    const counts = db.transaction(["conversations", "messages"]);
    const conversations = counts.objectStore("conversations").count();
    const messages = counts.objectStore("messages").count();
    counts.oncomplete = () => { db.close(); resolve([conversations.result, messages.result]); };
  };
})"""


def test_ten_seconds_after_a_deletion_nothing_of_it_is_left(tab):
    tab.clock.install()
    tab.evaluate("""async () => {
      const t = window.t = await use();
      for (const name of ["a", "b"]) {
        await t.store.putConversation(t.conversation(name));
        await t.store.putMessage(t.message(name, `in ${name}`));
      }
      window.undo = await t.store.deleteConversation(t.id("a"));
    }""")
    assert tab.evaluate(COUNT_ALL) == [2, 2]
    gone = "() => new Promise((resolve) => t.store.onChange(({ id }) => id === t.id('a') && resolve()))"
    tab.evaluate(f"() => {{ window.gone = ({gone})() }}")
    tab.clock.run_for(11_000)
    tab.evaluate("() => window.gone")
    assert tab.evaluate(COUNT_ALL) == [1, 1]
    tab.evaluate("() => undo()")  # too late, and no harm
    assert tab.evaluate("async () => (await t.store.putMessage(t.message('a', 'late'))) === undefined")
    assert tab.evaluate(COUNT_ALL) == [1, 1]


def test_what_was_deleted_before_the_page_closed_is_gone_after_the_next_start(tab):
    tab.evaluate("""async () => {
      const { store, conversation, message, id } = await use();
      await store.putConversation(conversation("a", { deletedAt: 5 }));
      await store.putMessage(message("a", "hello"));
    }""")
    tab.reload()
    gone = """async () => {
      const { openStore } = await import("./store.js");
      const store = await openStore();
      await new Promise((resolve) => store.onChange(resolve));
    }"""
    tab.evaluate(gone)
    assert tab.evaluate(COUNT_ALL) == [0, 0]


def test_a_start_does_not_take_the_undo_from_another_tab(open_tab):
    one = open_tab()
    one.evaluate("""async () => {
      const t = await use();
      await t.store.putConversation(t.conversation("a"));
      window.undo = await t.store.deleteConversation(t.id("a"));
    }""")
    two = open_tab()
    assert two.evaluate("async () => (await (await use()).store.search('a')).length") == 0
    one.evaluate("() => undo()")
    assert titles(two) == ["a"]


# ---- where there is no disk, or no room on it


def test_a_private_store_leaves_no_trace_and_tells_no_other_tab(open_tab):
    one, two = open_tab(), open_tab()
    two.evaluate("async () => { const t = await use(); window.heard = []; t.store.onChange((c) => heard.push(c)); }")
    read = one.evaluate("""async () => {
      const { store, conversation, message, id } = await use({ private: true });
      await store.putConversation(conversation("a"));
      await store.putMessage(message("a", "secret"));
      await store.updateConversation(id("a"), (c) => { c.title = "Secret"; });
      await store.updateMessage(id("secret"), (m) => { m.text += "!"; });
      const found = await store.search("secret");
      const read = [await store.conversations(), await store.messages(id("a"))];
      return [...read, found.length, store.private, store.persistent];
    }""")
    assert read[0][0]["title"] == "Secret"
    assert read[1][0]["text"] == "secret!"
    assert read[2:] == [2, True, False]
    assert two.evaluate("async () => { const t = await use(); return [await t.store.conversations(), heard] }") == [
        [],
        [],
    ]
    assert one.evaluate(COUNT_ALL) == [0, 0]


def test_a_private_store_hands_out_copies_and_loses_no_change(tab):
    read = tab.evaluate("""async () => {
      const { store, conversation, id } = await use({ private: true });
      await store.putConversation(conversation("a"));
      (await store.conversations())[0].title = "not this way";
      (await store.conversation(id("a"))).title = "nor this";
      const count = () => store.updateConversation(id("a"), (c) => { c.count = (c.count ?? 0) + 1; });
      await Promise.all(Array.from({ length: 20 }, count));
      return store.conversation(id("a"));
    }""")
    assert (read["title"], read["count"]) == ("a", 20)


NO_DISK = {
    "no IndexedDB": "Object.defineProperty(window, 'indexedDB', { value: undefined })",
    "forbidden": "indexedDB.open = () => { throw new DOMException('no', 'SecurityError') }",
    "a broken one": """indexedDB.open = () => {
      const request = {};
      setTimeout(() => { request.error = new DOMException("no", "UnknownError"); request.onerror(); });
      return request;
    }""",
}


@pytest.mark.parametrize("sabotage", NO_DISK.values(), ids=NO_DISK)
def test_without_a_database_a_chat_lives_in_memory_and_the_page_can_say_so(tab, sabotage):
    read = tab.evaluate(
        f"""async () => {{
          {sabotage};
          const {{ store, conversation, message, id }} = await use();
          await store.putConversation(conversation("a"));
          await store.putMessage(message("a", "hello"));
          return [store.persistent, store.private, (await store.messages(id("a"))).length];
        }}"""
    )
    assert read == [False, False, 1]


def test_a_database_of_a_newer_page_is_left_alone(tab):
    persistent = tab.evaluate("""async () => {
      await new Promise((resolve) => {
        const request = indexedDB.open("llama2-chat", 99);
        request.onsuccess = () => { request.result.close(); resolve(); };
      });
      return (await use()).store.persistent;
    }""")
    assert persistent is False


def test_a_tab_with_an_older_page_makes_way_for_a_newer_one_and_says_what_to_do(open_tab):
    one, two = open_tab(), open_tab()
    one.evaluate("async () => { const t = window.t = await use(); await t.store.putConversation(t.conversation('a')) }")
    two.evaluate("""() => new Promise((resolve, reject) => {
      const request = indexedDB.open("llama2-chat", 3);
      request.onsuccess = () => { request.result.close(); resolve(); };
      request.onblocked = () => reject(new Error("blocked"));
    })""")
    said = one.evaluate("() => t.store.putMessage(t.message('a', 'b')).catch((error) => error.message)")
    assert said == "The page was updated in another tab. Reload this one to go on."


def test_a_tab_goes_on_after_its_database_was_cleared(open_tab):
    one, two = open_tab(), open_tab()
    one.evaluate("async () => { const t = window.t = await use(); await t.store.putConversation(t.conversation('a')) }")
    two.evaluate("""() => new Promise((resolve, reject) => {
      const request = indexedDB.deleteDatabase("llama2-chat");
      request.onsuccess = () => resolve();
      request.onblocked = () => reject(new Error("blocked"));
    })""")
    read = one.evaluate(
        "async () => { await t.store.putConversation(t.conversation('b')); return t.store.conversations() }"
    )
    assert [conversation["title"] for conversation in read] == ["b"]


def test_a_database_that_another_tab_blocks_does_not_keep_the_page_waiting(open_tab):
    one, two = open_tab(), open_tab()
    one.evaluate("""() => new Promise((resolve) => {
      indexedDB.open("llama2-chat", 1).onsuccess = ({ target }) => { window.held = target.result; resolve(); };
    })""")  # a connection that does not make way
    one.evaluate("() => { indexedDB.deleteDatabase('llama2-chat') }")
    two.clock.install()
    two.evaluate("() => { window.opening = use() }")
    two.evaluate("async () => { await import('./store.js'); await new Promise((resolve) => queueMicrotask(resolve)) }")
    two.clock.run_for(6000)
    assert two.evaluate("async () => (await window.opening).store.persistent") is False


# Every write to the database fails as on a full disk, while `full` is set.
FULL_DISK = """
window.full = false;
const put = IDBObjectStore.prototype.put;
IDBObjectStore.prototype.put = function (...args) {
  if (window.full) throw new DOMException("full", "QuotaExceededError");
  return put.apply(this, args);
};
"""


def test_a_chat_goes_on_when_the_disk_is_full_and_is_saved_once_there_is_room(context, open_tab):
    context.add_init_script(FULL_DISK)
    tab = open_tab()
    while_full, said = tab.evaluate("""async () => {
      const t = window.t = await use();
      window.said = [];
      t.store.onPersistence((persistent) => said.push(persistent));
      await t.store.putConversation(t.conversation("a"));
      await t.store.putMessage(t.message("a", "before"));
      full = true;
      await t.store.putMessages([t.message("a", "during", { createdAt: 2 })], t.id("a"), (c) => { c.updatedAt = 7; });
      await t.store.updateMessage(t.id("before"), (m) => { m.text = "changed"; });
      await t.store.updateConversation(t.id("a"), (c) => { c.leafId = t.id("during"); });
      return [[await t.store.conversation(t.id("a")), await t.store.messages(t.id("a")), t.store.persistent], said];
    }""")
    assert [message["text"] for message in while_full[1]] == ["changed", "during"]
    assert while_full[0]["leafId"] == while_full[1][1]["id"]
    assert while_full[0]["updatedAt"] == 7
    assert while_full[2] is False
    assert said == [False]
    said = tab.evaluate("""async () => {
      full = false;
      await t.store.updateConversation(t.id("a"), (c) => { c.pinned = true; });
      return [t.store.persistent, ...said];
    }""")
    assert said == [True, False, True]
    tab.reload()
    read = tab.evaluate("async () => { const t = await use(); return t.store.messages(t.id('a')) }")
    assert read == while_full[1]


def test_deleting_makes_room_on_a_full_disk(context, open_tab):
    context.add_init_script(FULL_DISK)
    tab = open_tab()
    tab.clock.install()
    tab.evaluate("""async () => {
      const t = window.t = await use();
      for (const name of ["a", "b"]) await t.store.putConversation(t.conversation(name));
      full = true;
      await t.store.putMessage(t.message("b", "unsaved"));
      await t.store.deleteConversation(t.id("a"));
      window.saved = new Promise((resolve) => t.store.onPersistence(resolve));
      const remove = IDBObjectStore.prototype.delete;
      IDBObjectStore.prototype.delete = function (...args) { full = false; return remove.apply(this, args); };
    }""")
    assert titles_here(tab) == ["b"]
    tab.clock.run_for(11_000)
    assert tab.evaluate("() => window.saved") is True
    assert tab.evaluate(COUNT_ALL) == [1, 1]


def titles_here(page):
    return page.evaluate("async () => (await t.store.conversations()).map(({ title }) => title)")


# ---- trees


def test_edits_and_retries_are_branches_and_each_can_be_shown(tab):
    read = tab.evaluate("""async () => {
      const { pathTo, siblings, leafBelow, message, id } = await use();
      const messages = [
        message("c", "q1", { createdAt: 1 }),
        message("c", "a1", { createdAt: 2, parentId: id("q1"), role: "assistant" }),
        message("c", "a2", { createdAt: 3, parentId: id("q1"), role: "assistant" }),
        message("c", "q2", { createdAt: 4, parentId: id("a1") }),
        message("c", "b1", { createdAt: 5 }),
      ].reverse();
      const names = (list) => list.map(({ text }) => text);
      const at = (name) => messages.find(({ text }) => text === name);
      const below = (name) => messages.find(({ id: it }) => it === leafBelow(messages, id(name))).text;
      const branches = (name) => [names(siblings(messages, at(name)).list), siblings(messages, at(name)).index];
      return {
        paths: [names(pathTo(messages, id("q2"))), names(pathTo(messages, id("a2"))), pathTo(messages, null)],
        branches: [branches("a2"), branches("q1"), branches("q2")],
        below: ["q1", "a1", "a2", "b1"].map(below),
      };
    }""")
    assert read["paths"] == [["q1", "a1", "q2"], ["q1", "a2"], []]
    assert read["branches"] == [[["a1", "a2"], 1], [["q1", "b1"], 0], [["q2"], 0]]
    assert read["below"] == ["q2", "q2", "a2", "b1"]


def test_a_conversation_opens_whatever_a_crash_left_of_it(tab):
    read = tab.evaluate("""async () => {
      const { pathTo, leafToShow, conversation, message, id } = await use();
      const q = message("c", "q", { createdAt: 1 });
      const a = message("c", "a", { createdAt: 2, parentId: id("q"), role: "assistant" });
      const lost = message("c", "lost", { createdAt: 3, parentId: id("never written") });
      const ring = [{ ...q, parentId: a.id }, a];
      const shown = (messages, leafId) => {
        const leaf = leafToShow(conversation("c", { leafId }), messages);
        return pathTo(messages, leaf).map(({ text }) => text);
      };
      return [
        shown([], null), shown([], id("gone")),       // nothing was written
        shown([q, a], null), shown([q, a], id("x")),   // the leaf was not, or is gone
        shown([q, a], q.id),                           // the answer was written, the leaf was not
        shown([q, a, lost], lost.id),                  // a parent is missing
        shown(ring, a.id),                             // parents in a circle
      ];
    }""")
    assert read == [[], [], ["q", "a"], ["q", "a"], ["q", "a"], ["lost"], ["q", "a"]]


def test_a_title_is_the_first_words_of_a_message(tab):
    texts = [
        "",
        " \n ",
        "Hello",
        "  What\n is\tthis? ",
        "word " * 30,
        "x" * 60,
        "👩‍👩‍👧" * 60,
        f"{'a' * 47} b",
        f"{'a' * 48}",
    ]
    made = tab.evaluate("async (texts) => texts.map((await use()).titleOf)", texts)
    assert made[:4] == ["", "", "Hello", "What is this?"]
    assert made[4] == "word word word word word word word word word…"
    assert made[5] == "x" * 47 + "…"
    assert made[6] == "👩‍👩‍👧" * 47 + "…"
    assert made[7] == "a" * 47 + "…"
    assert made[8] == "a" * 48


def test_conversations_are_grouped_by_the_day_as_the_calendar_has_it(tab):
    groups = tab.evaluate("""async () => {
      const { groupByDay, conversation } = await use();
      const now = new Date(2026, 10, 27, 0, 30).getTime();
      const late = [23, 59];
      const days = [[2026, 11, 1], [2026, 10, 27], [2026, 10, 26, ...late], [2026, 10, 20], [2026, 10, 19, ...late]];
      const times = [...days, [2025, 10, 3]];
      const conversations = times.map((time, n) => conversation(`c${n}`, { updatedAt: new Date(...time).getTime() }));
      conversations.unshift(conversation("p", { pinned: true }));
      const names = (list) => list.map(({ title }) => title);
      return groupByDay(conversations, now).map(({ label, conversations: list }) => [label, names(list)]);
    }""")
    assert groups == [
        ["Pinned", ["p"]],
        ["Today", ["c0", "c1"]],
        ["Yesterday", ["c2"]],
        ["Previous 7 days", ["c3"]],
        ["November 2026", ["c4"]],
        ["November 2025", ["c5"]],
    ]


def test_ids_are_random_and_made_without_a_secure_context(tab):
    ids = tab.evaluate("""async () => {
      crypto.randomUUID = undefined;
      const { newId } = await use();
      return Array.from({ length: 1000 }, newId);
    }""")
    assert len(set(ids)) == 1000
    assert all(len(id) == 32 and set(id) <= set("0123456789abcdef") for id in ids)


# ---- search


def found(page, words):
    return page.evaluate(
        """async (words) => (await (window.t ??= await use()).store.search(words)).map(
          ({ conversation, message, before, match, after }) =>
            [conversation.title, message?.text ?? null, before + "[" + match + "]" + after])""",
        words,
    )


@pytest.fixture
def library(tab):
    tab.evaluate("""async () => {
      const t = window.t = await use();
      await t.store.putConversation(t.conversation("Café culture", { updatedAt: 3 }));
      await t.store.putConversation(t.conversation("Streets", { updatedAt: 2 }));
      const put = (of, text, createdAt) => t.store.putMessage(t.message(of, text, { text, createdAt }));
      await put("Café culture", "Where does ESPRESSO come from?", 1);
      await put("Café culture", "From Milan:\\nan espresso of 1901", 2);
      await put("Streets", "Die Straße nach Łódź, ΣΟΦΟΣ, ﬁn", 3);
    }""")
    return tab


def test_search_finds_all_words_in_titles_and_texts_the_newest_first(library):
    assert found(library, "espresso") == [
        ["Café culture", "From Milan:\nan espresso of 1901", "From Milan: an [espresso] of 1901"],
        ["Café culture", "Where does ESPRESSO come from?", "Where does [ESPRESSO] come from?"],
    ]
    assert found(library, "espresso 1901") == [
        ["Café culture", "From Milan:\nan espresso of 1901", "From Milan: an [espresso] of 1901"]
    ]
    assert found(library, "milan nowhere") == []
    assert found(library, "cafe") == [["Café culture", None, "[Café] culture"]]
    assert [hit[1] for hit in found(library, "cafe milan")] == ["From Milan:\nan espresso of 1901"]
    assert found(library, "  ") == []


@pytest.mark.parametrize(
    ("words", "match"),
    [("STRASSE", "Straße"), ("sofo nothing", None), ("σοφος", "ΣΟΦΟΣ"), ("fin", "ﬁn"), ("lodz", None)],
)
def test_search_knows_letters_that_are_the_same_in_another_dress(library, words, match):
    assert [hit[2].split("[")[1].split("]")[0] for hit in found(library, words)] == ([match] if match else [])


def test_search_takes_any_character_as_it_is(library):
    for words in (".*", "(", "\\", "[a", "%", "__proto__", "\ud800"):
        assert found(library, words) == []


def test_an_excerpt_shows_the_place_within_a_long_text(library):
    library.evaluate("""() => t.store.putMessage(t.message("Streets", "long", {
      text: "é👍 ".repeat(2000) + "the Needle is here" + " 👍".repeat(2000), createdAt: 9 }))""")
    [[_, _, shown]] = found(library, "needle")
    assert "the [Needle] is here" in shown
    assert shown.startswith("…")
    assert shown.endswith("…")
    assert len(shown) < 250
    assert "\ufffd" not in shown


def test_search_knows_what_was_written_changed_and_deleted_a_moment_ago(library):
    assert found(library, "giraffe") == []
    library.evaluate("() => t.store.putMessage(t.message('Streets', 'm', { text: 'a giraffe' }))")
    assert len(found(library, "giraffe")) == 1
    library.evaluate("() => t.store.updateMessage(t.id('m'), (m) => { m.text = 'a zebra' })")
    assert found(library, "giraffe") == []
    library.evaluate("async () => { window.undo = await t.store.deleteConversation(t.id('Streets')) }")
    assert found(library, "zebra") == []
    library.evaluate("() => undo()")
    assert len(found(library, "zebra")) == 1


def test_search_knows_what_another_tab_wrote(open_tab):
    one, two = open_tab(), open_tab()
    two.evaluate("""async () => {
      const t = window.t = await use();
      window.heard = new Promise((resolve) => t.store.onChange(({ kind }) => kind === "message" && resolve()));
    }""")
    assert found(two, "giraffe") == []
    one.evaluate("""async () => {
      const t = await use();
      await t.store.putConversation(t.conversation("zoo"));
      await t.store.putMessage(t.message("zoo", "a giraffe"));
    }""")
    two.evaluate("() => window.heard")
    assert [hit[0] for hit in found(two, "giraffe")] == ["zoo"]


@pytest.mark.slow
def test_search_and_list_over_twenty_thousand_messages_are_fast(tab):
    times = tab.evaluate("""async () => {
      const { store, conversation, message, newId } = await use();
      const words = "the quick brown fox jumps over a lazy dog while métro trains run beneath Paris ".split(" ");
      const text = (n) => Array.from({ length: 80 }, (_, k) => words[(n * 7 + k * k) % words.length]).join(" ");
      for (let n = 0; n < 200; n++) {
        const c = { ...conversation(`chat ${n}`), id: newId(), updatedAt: n };
        const messages = Array.from({ length: 100 }, (_, m) => ({
          ...message("", text(n + m)), id: newId(), conversationId: c.id, createdAt: n * 100 + m }));
        messages[50].text += ` needle${n}`;
        await store.add(c, messages);
      }
      const timed = async (work) => {
        const start = performance.now();
        const result = await work();
        return [performance.now() - start, result.length];
      };
      return {
        first: await timed(() => store.search("metro")),
        rare: await timed(() => store.search("needle150")),
        frequent: await timed(() => store.search("metro fox")),
        letter: await timed(() => store.search("e")),
        list: await timed(() => store.conversations()),
      };
    }""")
    print({name: round(ms) for name, (ms, _) in times.items()})
    assert [count for _, count in times.values()] == [50, 1, 50, 50, 200]
    assert all(ms < 5000 for ms, _ in times.values())
