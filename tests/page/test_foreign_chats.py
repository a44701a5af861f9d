"""Files of other pages in a browser: ChatGPT's export and that of llama.cpp's page, whole, in a ZIP, and broken."""

import base64
import io
import json
import zipfile

import pytest

from tests.support.static_page import static_page

pytestmark = pytest.mark.slow

HELPERS = """
window.imported = async (base64) => {
  const store = await (window.opened ??= (await import("./store.js")).openStore({ private: true }));
  const { importChats } = await import("./transfer.js");
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const counts = await importChats(store, new Blob([bytes])).catch((error) => error.message);
  const { pathTo, leafToShow } = await import("./tree.js");
  const chats = await Promise.all((await store.conversations()).map(async (chat) => {
    const messages = await store.messages(chat.id);
    const texts = pathTo(messages, leafToShow(chat, messages)).map(({ role, text }) => `${role}: ${text}`);
    return [chat.title, texts, messages];
  }));
  return [counts, chats];
};
"""
NOT_OURS = "This is not a file of exported chats."


@pytest.fixture(scope="module")
def tab(browser):
    with static_page() as address, browser.new_page() as page:
        page.add_init_script(HELPERS)
        page.goto(address)
        yield page


def imported(tab, content, *, anew=True):
    """What is said of a file, and then title, shown texts and messages of each chat."""
    content = content if isinstance(content, bytes) else content.encode()
    if anew:
        tab.reload()
    return tab.evaluate("(content) => imported(content)", base64.b64encode(content).decode())


def zipped(method=zipfile.ZIP_DEFLATED, **files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/").replace("_json", ".json"), text)
    return content.getvalue()


def node(id, parent, role, text, **more):
    """As ChatGPT has it; text: None for a part that it does not show."""
    content = {"content_type": "text", "parts": [text]} if text is not None else {"content_type": "thoughts"}
    message = {"author": {"role": role}, "content": content, "recipient": "all", "metadata": {}, **more}
    return {
        "id": id,
        "parent": parent,
        "message": {"id": id, "create_time": 1_700_000_000.5, **message},
        "children": [],
    }


def chat_gpt(**more):
    nodes = [
        {"id": "root", "parent": None, "message": None, "children": ["s"]},
        node("s", "root", "system", "Hidden rules", metadata={"is_visually_hidden_from_conversation": True}),
        node("q", "s", "user", "What is a quokka?"),
        node("thinking", "q", "assistant", None),
        node("call", "thinking", "assistant", "search(quokka)", recipient="browser"),
        node("found", "call", "tool", "A page"),
        node("a1", "found", "assistant", "A small \ue200cite\ue202turn0\ue201wallaby."),
        node("a2", "q", "assistant", "A marsupial.", metadata={"model_slug": "gpt-5"}),
        node("more", "a2", "tool", "A picture was made"),
        node("a3", "more", "assistant", "It smiles."),
        node("q2", "a3", "user", None, content={
            "content_type": "multimodal_text",
            "parts": [{"content_type": "image_asset_pointer"}, "Is this one?"],
        }),
    ]  # fmt: skip
    chat = {"title": "Quokkas", "create_time": 1.7e9, "update_time": 1.7e9 + 60, "current_node": "q2"}
    return {**chat, "conversation_id": "68a1-x", "mapping": {each["id"]: each for each in nodes}, **more}


def test_chat_gpts_export_keeps_what_was_said_with_all_branches_and_comes_twice_to_the_same(tab):
    counts, [(title, shown, messages)] = imported(tab, json.dumps([chat_gpt()]))
    assert counts == {"conversations": 1, "messages": 4, "skipped": 0, "unreadable": 0}
    assert title == "Quokkas"
    assert shown == [
        "user: What is a quokka?",
        "assistant: A marsupial.\n\nIt smiles.",
        "user: [picture]\n\nIs this one?",
    ]
    assert {message["text"] for message in messages} >= {"A small wallaby."}
    assert {message["createdAt"] for message in messages} == {1_700_000_000_500}
    again, chats = imported(tab, json.dumps([chat_gpt(), chat_gpt(conversation_id="other")]), anew=False)
    assert (again["conversations"], again["messages"]) == (1, 4)  # one with the same ids of messages loses none
    assert len(chats) == 2


@pytest.mark.parametrize("large", [False, True], ids=["", "with numbers in 64 bits"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED], ids=["packed", "stored"])
def test_the_zip_that_chat_gpt_sends_is_taken_as_it_comes(tab, method, large, monkeypatch):
    if large:
        for limit in ("ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT", "ZIP_MAX_COMMENT"):
            monkeypatch.setattr(zipfile, limit, 0)
    one, other = json.dumps([chat_gpt(), None]), json.dumps([chat_gpt(conversation_id="b", title="Other")])
    files = {"export__conversations-000_json": one, "export__conversations-001_json": other, "user_json": "{}"}
    counts, chats = imported(tab, zipped(method, **files))
    assert counts == {"conversations": 2, "messages": 8, "skipped": 1, "unreadable": 1}
    assert {title for title, *_ in chats} == {"Quokkas", "Other"}


LLAMA = [
    {"id": "r", "convId": "c", "type": "root", "role": "system", "content": "", "timestamp": 1, "parent": None},
    {"id": "q", "convId": "c", "type": "text", "role": "user", "content": "Read this", "timestamp": 2, "parent": "r",
     "extra": [{"type": "TEXT", "name": "a.txt", "content": "Its words"}, {"type": "IMAGE", "base64Url": "data:"}]},
    {"id": "a", "convId": "c", "type": "text", "role": "assistant", "content": "Done.", "timestamp": 3, "parent": "q",
     "model": "llama-3"},
    {"id": "b", "convId": "c", "type": "text", "role": "assistant", "content": "Read.", "timestamp": 4, "parent": "q"},
]  # fmt: skip
CONV = {"id": "c", "name": "A file", "lastModified": 9, "currNode": "a"}


def lines(*values):
    return "\n".join(map(json.dumps, values))


def said(message):
    return {"type": "message", "message": message}


LLAMA_FILES = {
    "one": json.dumps({"conv": CONV, "messages": LLAMA}),
    "all": json.dumps([{"conv": CONV, "messages": LLAMA}]),
    "lines": lines({"type": "session", "harness": "llama.cpp", **CONV}, *map(said, LLAMA)) + "\n",
}


@pytest.mark.parametrize("kind", LLAMA_FILES)
def test_what_the_page_of_llama_cpp_exports_comes_with_its_branches_and_files(tab, kind):
    counts, [(title, shown, messages)] = imported(tab, LLAMA_FILES[kind])
    assert counts == {"conversations": 1, "messages": 3, "skipped": 0, "unreadable": 0}
    assert (title, shown) == ("A file", ["user: Read this\n\na.txt\nIts words\n\n[picture]", "assistant: Done."])
    assert [message["end"].get("model") for message in messages if message["role"] == "assistant"] == ["llama-3", None]


def test_several_of_its_chats_in_a_zip_and_a_file_that_was_cut_off(tab):
    two = {name: LLAMA_FILES["lines"].replace('"c"', f'"{name}"') for name in ("x.jsonl", "y.jsonl")}
    counts, chats = imported(tab, zipped(**two))
    assert (counts["conversations"], len(chats)) == (2, 2)
    counts, [(_, shown, _)] = imported(tab, LLAMA_FILES["lines"][:-30])
    assert counts["unreadable"] == 1
    assert len(shown) == 2


NOT_CHATS = {
    "a broken ZIP": zipped(conversations_json="[]")[:-30],
    "a ZIP without chats": zipped(user_json="{}"),
    "a ZIP with something else": zipped(conversations_json="[1, {}]"),
    "an empty ZIP": zipped(),
    "a ZIP that lies": zipped(conversations_json=json.dumps([chat_gpt()])).replace(b"PK\3\4", b"PK\3\5"),
    "a list of things": b'[{"mapping": 1}, {"conv": {}}, null]',
    "lines of something": b'{"a": 1}\n{"b": 2}',
    "a session without words": b'{"type": "session"',
}


@pytest.mark.parametrize("content", NOT_CHATS.values(), ids=NOT_CHATS)
def test_what_holds_no_chats_is_refused_with_a_sentence(tab, content):
    counts, chats = imported(tab, content)
    assert str(counts).startswith(NOT_OURS)
    assert chats == []


ODD = {
    "parents in a circle": {"a": node("a", "b", "user", "x"), "b": node("b", "a", "assistant", "y")},
    "no parents": {"a": {"message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["x"]}}}},
    "odd values": {"a": None, "b": 1, "c": {"message": 5}, "d": node("d", "nowhere", "user", "x", create_time="never")},
    "odd parts": {"a": node("a", None, "user", None, content={"content_type": "text", "parts": [1, None, {}, "x"]})},
}


@pytest.mark.parametrize("mapping", ODD.values(), ids=ODD)
def test_an_odd_chat_gives_what_can_be_read_of_it(tab, mapping):
    counts, [(_, _, messages)] = imported(tab, json.dumps([chat_gpt(mapping=mapping, title=None, update_time=None)]))
    assert counts["conversations"] == 1
    assert "x" in [message["text"] for message in messages]
