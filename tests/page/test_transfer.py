"""transfer.js in a browser: what is exported comes back without loss, and a broken or hostile file does no harm."""

import json

import pytest

from tests.support.static_page import static_page

A, B, Q, R, S = ("a" * 32, "b" * 32, "1" * 32, "2" * 32, "3" * 32)
CONVERSATION = {
    "id": A,
    "title": "Greeting",
    "renamed": False,
    "pinned": True,
    "createdAt": 1,
    "updatedAt": 9,
    "leafId": R,
}
QUESTION = {"id": Q, "conversationId": A, "parentId": None, "role": "user", "text": "Hello?", "createdAt": 1}
END = {"reason": "length", "promptTokens": 7, "completionTokens": 3, "tokensPerS": 9.5, "model": "Llama 2", "seed": 4}
SETTINGS = {"systemPrompt": "Be brief.", "maxNewTokens": 9, "temperature": 0.8, "topP": 1, "topK": 0, "seed": ""}
ANSWER = {
    "id": R,
    "conversationId": A,
    "parentId": Q,
    "role": "assistant",
    "text": "# Hi\n\0 \U0001f600 ＜",
    "createdAt": 2,
}
OTHER = {
    "id": S,
    "conversationId": A,
    "parentId": Q,
    "role": "assistant",
    "text": "Hey",
    "createdAt": 3,
    "edited": True,
}
STEP = {"name": "calculator", "input": '"2 * 3"', "result": "6", "seconds": 0.25, "failed": False}
FAILED = {"name": "clock", "input": "{}", "result": "```\nThe tool failed.", "seconds": 2, "failed": True}
ABOUT = "file-" + "a" * 24
SOURCE = {"number": 1, "document": ABOUT, "name": "report.pdf", "page": 2, "text": "It says so."}
MESSAGES = [
    QUESTION,
    {**ANSWER, "end": END, "settings": {**SETTINGS, "useTools": True, "toolsMemory": 5}},
    {**OTHER, "answerId": S, "steps": [STEP, FAILED], "documents": [ABOUT], "sources": [SOURCE]},
]

HELPERS = """
window.use = async (options) => {
  const store = await (window.opened ??= (await import("./store.js")).openStore(options));
  const transfer = await import("./transfer.js");
  const dump = async () => Promise.all((await store.conversations()).map(
    async (conversation) => [conversation, await store.messages(conversation.id)]));
  const fill = async (conversations, messages) => {
    for (const conversation of conversations) await store.putConversation(conversation);
    for (const message of messages) await store.putMessage(message);
  };
  const imported = async (text) => {
    try { return await transfer.importChats(store, new Blob([text])); } catch (error) { return error.message; }
  };
  return { ...transfer, store, dump, fill, imported };
};
"""


CLEAR = """() => new Promise((resolve, reject) => {
  Object.assign(indexedDB.deleteDatabase("llama2-chat"), { onsuccess: resolve, onblocked: reject });
})"""


@pytest.fixture(scope="module")
def only_tab(browser):
    with static_page() as address:
        page = browser.new_page()
        page.add_init_script(HELPERS)
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address)
        yield page
        page.close()
        assert not errors


@pytest.fixture
def tab(only_tab):
    only_tab.evaluate(CLEAR)
    only_tab.reload()
    return only_tab


@pytest.fixture
def filled(tab):
    second = {**CONVERSATION, "id": B, "title": "Draft", "pinned": False, "leafId": None, "draft": "half a sen"}
    tab.evaluate("async ([c, m]) => (await use()).fill(c, m)", [[CONVERSATION, second], MESSAGES])
    return tab


def file_of(*conversations, **more):
    return json.dumps({"format": "llama2-chat", "version": 1, "conversations": conversations, **more})


def imported(page, text):
    return page.evaluate("async (text) => (await use()).imported(text)", text)


def dump(page):
    return page.evaluate("async () => (await use()).dump()")


@pytest.mark.parametrize("private", [False, True], ids=["on disk", "private"])
def test_what_was_exported_and_deleted_comes_back_equal_record_for_record(tab, private):
    before, counts, after, again = tab.evaluate(
        """async ([conversation, messages, hidden]) => {
          const t = await use({ private: hidden });
          await t.fill([conversation, { ...conversation, id: "b".repeat(32), draft: "half a sen" }], messages);
          const before = await t.dump();
          const file = await t.exportJson(t.store, null);
          await t.store.deleteAll();
          const counts = await t.importChats(t.store, file);
          const after = await t.dump();
          return [before, counts, after, await t.importChats(t.store, file)];
        }""",
        [CONVERSATION, MESSAGES, private],
    )
    assert len(before[0][1]) + len(before[1][1]) == 3
    assert after == before
    assert counts == {"conversations": 2, "messages": 3, "skipped": 0, "unreadable": 0}
    assert again == {"conversations": 0, "messages": 0, "skipped": 5, "unreadable": 0}


def test_an_export_of_one_conversation_holds_no_other(filled):
    exported = filled.evaluate(
        """async (id) => {
      const t = await use();
      return JSON.parse(await (await t.exportJson(t.store, [id])).text());
    }""",
        A,
    )
    assert [conversation["title"] for conversation in exported["conversations"]] == ["Greeting"]
    assert (exported["format"], exported["version"]) == ("llama2-chat", 1)


def test_an_undo_after_an_import_changes_nothing(filled):
    before = dump(filled)
    filled.evaluate("""async () => {
      const t = await use();
      const file = await t.exportJson(t.store, null);
      const undo = await t.store.deleteAll();
      await t.importChats(t.store, file);
      await undo();
    }""")
    assert dump(filled) == before


def test_an_import_adds_what_is_missing_and_changes_nothing_that_is_there(filled):
    new = {**QUESTION, "id": "4" * 32, "parentId": R, "text": "And then?", "createdAt": 5}
    changed = [{**QUESTION, "text": "Something else"}, new]
    counts = imported(filled, file_of({**CONVERSATION, "title": "Stale", "messages": changed}))
    assert counts == {"conversations": 0, "messages": 1, "skipped": 2, "unreadable": 0}
    [[conversation, messages], _] = dump(filled)
    assert conversation["title"] == "Greeting"
    assert [message["text"] for message in messages][0::3] == ["Hello?", "And then?"]


def test_a_file_cannot_replace_a_message_of_another_conversation(filled):
    before = dump(filled)
    stolen = {**CONVERSATION, "id": "c" * 32, "messages": [{**QUESTION, "conversationId": "c" * 32, "text": "stolen"}]}
    assert imported(filled, file_of(stolen)) == {"conversations": 1, "messages": 0, "skipped": 1, "unreadable": 0}
    assert [entry for entry in dump(filled) if entry[0]["id"] != "c" * 32] == before


NOT_OURS = "This is not a file of exported chats. Choose one that was exported here, by ChatGPT or by llama.cpp’s page."


NO_JSON = ["", "no JSON", "\0\x01PNG"]
OTHER_JSON = ["[]", "null", "1", '"a"', "{}", '{"format":"llama2-chat"}', '{"format":"llama2-chat","version":1}']
ALMOST = [file_of(version="1"), file_of(format="x"), file_of(conversations={})]


@pytest.mark.parametrize("text", [*NO_JSON, *OTHER_JSON, *ALMOST])
def test_what_is_no_such_file_is_refused_with_a_sentence(tab, text):
    assert imported(tab, text) == NOT_OURS
    assert dump(tab) == []


def test_a_file_of_a_newer_version_is_refused_with_what_to_do(tab):
    said = "This file was exported by a newer version. Update this program to import it."
    assert imported(tab, file_of(version=2)) == said


BROKEN_CONVERSATIONS = [None, 1, "a", [], {}, {**CONVERSATION, "id": "../x"}, {**CONVERSATION, "id": A.upper()}]
BROKEN_CONVERSATIONS += [{**CONVERSATION, "title": ["x"]}, {**CONVERSATION, "title": "x" * 1001}]
BROKEN_CONVERSATIONS += [{**CONVERSATION, name: value} for name, value in [("pinned", 1), ("createdAt", "now")]]
BROKEN_CONVERSATIONS += [
    {**CONVERSATION, name: value}
    for name, value in [("updatedAt", 1e300), ("leafId", {}), ("draft", 5), ("start", {"systemPrompt": "x"})]
]


@pytest.mark.parametrize("broken", BROKEN_CONVERSATIONS, ids=str)
def test_a_broken_conversation_is_left_out_and_the_next_one_is_not(tab, broken):
    counts = imported(tab, file_of(broken, {**CONVERSATION, "id": B, "messages": []}))
    assert counts == {"conversations": 1, "messages": 0, "skipped": 1, "unreadable": 1}
    assert [entry[0]["id"] for entry in dump(tab)] == [B]


BROKEN_FIELDS = [
    ("id", "x"),
    ("conversationId", B),
    ("parentId", 1),
    ("role", "system"),
    ("text", None),
    ("createdAt", -1),
]
BROKEN_FIELDS += [
    ("edited", "yes"),
    ("answerId", 1),
    ("answerId", "../../x"),
    ("end", "stop"),
    ("end", {"reason": "constructor"}),
    ("end", {}),
]
BROKEN_FIELDS += [
    ("end", {**END, "tokensPerS": "<b>"}),
    ("end", {**END, "completionTokens": -5}),
    ("settings", []),
    ("settings", {"topP": ["1"]}),
    ("settings", {"useTools": "yes"}),
    ("settings", {"examples": [{"question": "Hi"}]}),
    ("settings", {"today": "yesterday"}),
    ("steps", STEP),
    ("steps", [{**STEP, "input": {"a": 1}}]),
    ("steps", [{**STEP, "failed": None}]),
    ("steps", [STEP] * 51),
    ("sources", [{**SOURCE, "page": "<b>"}]),
    ("documents", ["../../x"]),
]


@pytest.mark.parametrize(("name", "value"), BROKEN_FIELDS, ids=str)
def test_a_broken_message_is_left_out_and_the_others_are_not(tab, name, value):
    counts = imported(tab, file_of({**CONVERSATION, "messages": [QUESTION, {**ANSWER, name: value}, 7]}))
    assert counts == {"conversations": 1, "messages": 1, "skipped": 2, "unreadable": 2}
    assert [message["text"] for message in dump(tab)[0][1]] == ["Hello?"]


START = {"systemPrompt": "Be brief.", "examples": [{"question": "Hi", "answer": "Hello!"}], "reminder": ""}
SENT = {
    **START,
    "today": "2026-11-28",
    "maxNewTokens": 1024,
    "temperature": None,
    "seed": "12",
}  # as the settings read themselves
ENDED = {"reason": "unread", "error": None, "refused": False, "promptTokens": 0, "firstTokenS": None, "seed": "7"}


def test_what_the_page_itself_writes_passes(tab):
    answer = {**ANSWER, "settings": SENT, "end": ENDED, "base": "So far", "seed": 5}
    conversation = {**CONVERSATION, "start": START}
    assert imported(tab, file_of({**conversation, "messages": [answer]})) == {
        "conversations": 1,
        "messages": 1,
        "skipped": 0,
        "unreadable": 0,
    }
    sent = {name: value for name, value in SENT.items() if value is not None}  # else Same again asked for null
    assert dump(tab) == [[conversation, [{**answer, "settings": sent}]]]


def test_what_a_file_says_is_null_is_not_there(tab):
    conversation = {**CONVERSATION, "draft": None, "editing": None}
    question = {**QUESTION, "steps": None, "answerId": None, "end": None}
    answer = {**ANSWER, "settings": {"systemPrompt": None, "temperature": 0.5, "examples": None, "seed": None}}
    imported(tab, file_of({**conversation, "messages": [question, answer]}))
    assert dump(tab) == [[CONVERSATION, [QUESTION, {**ANSWER, "settings": {"temperature": 0.5}}]]]


def test_what_comes_from_a_file_asks_the_model_nothing_by_itself(tab):
    answer = {**ANSWER, "answerId": S, "unasked": True}
    imported(tab, file_of({**CONVERSATION, "queuedAfter": R, "draft": "Send me", "messages": [QUESTION, answer]}))
    assert dump(tab) == [[{**CONVERSATION, "draft": "Send me"}, [QUESTION, {**ANSWER, "answerId": S}]]]


def test_names_that_mean_something_to_javascript_do_not_get_in(tab):
    hostile = '{"__proto__":{"admin":true},"constructor":{"prototype":{"admin":true}},"toString":"x","deletedAt":5,'
    hostile += '"tags":["x"],"colour":"red",'
    conversation = hostile + json.dumps({**CONVERSATION, "messages": [QUESTION]})[1:]
    text = '{"__proto__":{"admin":true},"format":"llama2-chat","version":1,"conversations":[' + conversation + "]}"
    assert imported(tab, text)["conversations"] == 1
    assert tab.evaluate("() => ({}).admin ?? null") is None
    own = tab.evaluate("async () => Object.keys((await use()).store && (await (await use()).store.conversations())[0])")
    assert set(own) == {*CONVERSATION, "colour"}  # a plain field, as a later page may write it, is kept


def test_a_full_disk_ends_an_import_with_a_sentence(tab):
    said = tab.evaluate(
        """async (text) => {
          const t = await use();
          IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };
          return t.imported(text);
        }""",
        file_of({**CONVERSATION, "messages": []}),
    )
    assert said == "The browser’s storage is full. Delete some chats and import the file again."


def markdown(page, title, *texts):
    """The Markdown of a conversation in which visitor and model say these in turn."""
    messages = [
        {
            "id": str(n) * 32,
            "conversationId": A,
            "parentId": str(n - 1) * 32 if n else None,
            "text": text,
            "createdAt": n,
        }
        | {"role": "assistant" if n % 2 else "user"}
        for n, text in enumerate(texts)
    ]
    conversation = {**CONVERSATION, "title": title, "leafId": messages[-1]["id"]}
    return page.evaluate(
        """async ([conversation, messages]) => {
          const t = await use({ private: true });
          await t.fill([conversation], messages);
          return (await t.exportMarkdown(t.store, conversation.id)).text();
        }""",
        [conversation, messages],
    )


def test_markdown_holds_the_shown_branch_with_the_models_own_words(filled):
    text = filled.evaluate(
        "async (id) => { const t = await use(); return (await t.exportMarkdown(t.store, id)).text() }", A
    )
    assert text == f"# Greeting\n\n## You\n\nHello?\n\n## Llama 2\n\n{ANSWER['text']}\n"


def test_markdown_lists_the_sources_below_their_answer(tab):
    answer = {**OTHER, "text": "It says so [1].", "sources": [{**SOURCE, "name": "<b>_x_</b>\n.pdf"}]}
    text = tab.evaluate(
        """async ([conversation, messages]) => {
          const t = await use({ private: true });
          await t.fill([conversation], messages);
          return (await t.exportMarkdown(t.store, conversation.id)).text();
        }""",
        [{**CONVERSATION, "leafId": S}, [QUESTION, answer]],
    )
    assert text.endswith("It says so [1].\n\nSources:\n\n- \\[1\\] \u2068\\<b\\>\\_x\\_\\</b\\> .pdf\u2069, page 2\n")


def test_markdown_shows_the_steps_above_their_answer(tab):
    text = tab.evaluate(
        """async ([conversation, messages]) => {
          const t = await use({ private: true });
          await t.fill([conversation], messages);
          return (await t.exportMarkdown(t.store, conversation.id)).text();
        }""",
        [{**CONVERSATION, "leafId": S}, [QUESTION, {**OTHER, "steps": [STEP, FAILED]}]],
    )
    assert text.endswith(
        "## Assistant\n\n```text\ncalculator (0.25 s)\n2 * 3\n→ 6\n```\n\n"
        "````text\nclock (2.0 s)\n{}\n→ failed: ```\nThe tool failed.\n````\n\nHey\n"
    )


def test_markdown_shows_what_was_typed_as_it_was_typed(tab):
    typed = "# no heading\n```py\n1 < 2\n```"
    text = markdown(tab, "A `b` <c>", typed, "*Yes* <b>&amp;")
    assert text == f"# A \\`b\\` \\<c\\>\n\n## You\n\n````text\n{typed}\n````\n\n## Assistant\n\n*Yes* <b>&amp;\n"


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ("```py\nx = 1\n```", ""),
        ("```py\nx = 1", "\n```"),
        ("~~~~\n```\n~~~\n", "~~~~"),
        ("```\na\n``` not the end", "\n```"),
        ("a ``` b", ""),
        ("``` `a` ```\nb", ""),
        ("    ```\nb", ""),
    ],
)
def test_markdown_ends_the_code_that_an_answer_left_open(tab, answer, end):
    assert markdown(tab, "T", "Hi", answer, "Next").endswith(f"## Assistant\n\n{answer}{end}\n\n## You\n\nNext\n")
