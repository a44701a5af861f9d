"""The sidebar in a browser, on a page of its own: list, search, menus, by mouse, touch and keyboard."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.support.axe import assert_accessible
from tests.support.sidebar_page import FILES
from tests.support.static_page import static_page


@pytest.fixture(scope="module")
def address():
    with static_page(FILES) as address:
        yield address


@pytest.fixture
def context(browser):
    context = browser.new_context(viewport={"width": 800, "height": 800})
    yield context
    context.close()


@pytest.fixture
def open_tab(context, address):
    """Opens one more tab of the same browser."""
    errors = []

    def open_tab(query=""):
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address + query)
        page.wait_for_function("() => window.ready")
        return page

    yield open_tab
    assert not errors


@pytest.fixture
def tab(open_tab):
    """Three chats; the second is open."""
    page = open_tab()
    page.evaluate("""async () => {
      await add("Cats", 0, ["Name my cat", "Call her Mímir"]);
      await add("Bread", 0.001, ["How do I bake bread?", "With flour. Give me a <b>minute</b>."]);
      await add("Old radios", 1, ["Which valve is broken?"]);
      await show(id("Bread"));
    }""")
    expect(chats(page)).to_have_count(3)
    return page


def chats(page):
    return page.locator("#sidebar .open")


def chat(page, title):
    return page.locator("#sidebar .open", has_text=title)


def choose(page, title, item):
    """An item of a chat's menu, by mouse."""
    chat(page, title).hover()
    page.get_by_role("button", name=f"Options for “{title}”").click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def delete_all(page):
    manage(page, "Delete all chats")
    question = page.get_by_role("dialog", name="Delete all chats of this browser?")
    question.get_by_role("button", name="Delete all").click()


def manage(page, item):
    page.get_by_role("button", name="Manage chats").click()
    page.get_by_role("menuitem", name=item).click()


def calls(page):
    return page.evaluate("() => calls")


def id_of(page, name):
    return page.evaluate("(name) => id(name)", name)


def focused(page):
    return page.evaluate(
        "() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
    )


def stored(page, name):
    return page.evaluate("(name) => store.conversation(id(name))", name)


# ---- the list


def test_chats_are_listed_by_day_with_the_open_one_marked(tab):
    headings = tab.locator("#sidebar h2").all_text_contents()
    assert headings[0] == "Today"
    assert headings[-1] == "Yesterday"
    assert chats(tab).all_text_contents() == ["Cats", "Bread", "Old radios"]
    assert tab.locator("#sidebar [aria-current]").all_text_contents() == ["Bread"]
    expect(tab.get_by_role("navigation", name="Conversations")).to_be_visible()


def test_a_click_opens_a_chat_and_the_buttons_begin_new_ones(tab):
    chat(tab, "Cats").click()
    tab.get_by_role("button", name="New chat").click()
    tab.get_by_role("button", name="Private chat").click()
    assert calls(tab) == [["open", id_of(tab, "Cats")], ["new"], ["private"]]


def test_a_title_is_shown_as_text_in_its_own_direction_and_never_under_the_menu(tab):
    tab.evaluate("async () => { await add('<img src=x onerror=alert(1)>'); await add('مرحبا بالعالم'); await add('') }")
    expect(chat(tab, "<img src=x onerror=alert(1)>")).to_be_visible()
    expect(chat(tab, "Untitled chat")).to_be_visible()
    title = chat(tab, "مرحبا").locator("span").bounding_box()
    menu = tab.get_by_role("button", name="Options for “مرحبا بالعالم”").bounding_box()
    assert title["x"] + title["width"] <= menu["x"]


def test_an_empty_list_says_where_chats_stay(open_tab):
    expect(open_tab().get_by_text("Your chats will be listed here. They stay in this browser.")).to_be_visible()
    expect(open_tab("?private").get_by_text("A private chat: nothing of it is kept.")).to_be_visible()


def test_a_menu_stays_on_a_screen_that_is_low(tab):
    """It opened above the button, and above the screen, where there was no room below."""
    tab.set_viewport_size({"width": 800, "height": 300})
    choose_from = tab.get_by_role("menu")
    for title in ("Cats", "Old radios"):
        chat(tab, title).hover()
        tab.get_by_role("button", name=f"Options for “{title}”").click()
        for item in choose_from.get_by_role("menuitem").all():
            expect(item).to_be_in_viewport(ratio=1)
        tab.keyboard.press("Escape")
    tab.set_viewport_size({"width": 800, "height": 160})
    tab.get_by_role("button", name="Manage chats").click()
    expect(choose_from).to_be_in_viewport(ratio=1)


def test_a_rename_in_place_is_kept_with_enter_and_on_leaving_and_not_with_escape(tab):
    field = tab.get_by_role("textbox", name="Title")
    for typed, key, title in (
        ("  Kittens ", "Enter", "Kittens"),
        ("no", "Escape", "Kittens"),
        ("  ", "Enter", "Kittens"),
    ):
        choose(tab, stored(tab, "Cats")["title"], "Rename")
        field.fill(typed)
        field.press(key)
        expect(field).to_have_count(0)
        expect(chats(tab).first).to_have_text(title)
    choose(tab, "Kittens", "Rename")
    field.fill("Lions")
    tab.get_by_role("searchbox").click()
    expect(chats(tab).first).to_have_text("Lions")
    assert (stored(tab, "Cats")["title"], stored(tab, "Cats")["renamed"]) == ("Lions", True)


def test_a_rename_is_not_disturbed_by_another_tab(open_tab, tab):
    choose(tab, "Cats", "Rename")
    field = tab.get_by_role("textbox", name="Title")
    field.fill("Lions")
    other = open_tab()
    other.evaluate("async () => { await add('News'); await store.deleteConversation(id('Old radios')) }")
    tab.evaluate("() => refresh()")
    expect(field).to_be_focused()
    field.press("Enter")
    expect(chats(tab)).to_have_text(["News", "Lions", "Bread"])


def test_a_pinned_chat_stands_first_until_it_is_unpinned(tab):
    choose(tab, "Old radios", "Pin")
    expect(chats(tab)).to_have_text(["Old radios", "Cats", "Bread"])
    assert tab.locator("#sidebar h2").first.text_content() == "Pinned"
    choose(tab, "Old radios", "Unpin")
    expect(chats(tab)).to_have_text(["Cats", "Bread", "Old radios"])


def test_a_deleted_chat_comes_back_with_undo(tab):
    choose(tab, "Cats", "Delete")
    expect(chats(tab)).to_have_text(["Bread", "Old radios"])
    expect(tab.get_by_role("alert")).to_contain_text("Deleted “\u2068Cats\u2069”.")  # isolated: titles of any direction
    tab.get_by_role("button", name="Undo").click()
    expect(chats(tab)).to_have_text(["Cats", "Bread", "Old radios"])
    assert calls(tab) == []


def test_deleting_the_open_chat_begins_a_new_one_and_undo_opens_it_again(tab):
    choose(tab, "Bread", "Delete")
    expect(chats(tab)).to_have_count(2)
    tab.get_by_role("button", name="Undo").click()
    expect(tab.locator("#sidebar [aria-current]")).to_have_text(["Bread"])
    assert calls(tab) == [["new"], ["open", id_of(tab, "Bread")]]


def test_all_chats_are_deleted_after_a_question_and_come_back_with_undo(tab):
    delete_all(tab)
    expect(chats(tab)).to_have_count(0)
    tab.get_by_role("button", name="Undo").click()
    expect(chats(tab)).to_have_count(3)


def test_what_another_tab_writes_and_deletes_shows_here(open_tab, tab):
    other = open_tab()
    other.evaluate("() => add('News')")
    expect(chats(tab)).to_have_text(["News", "Cats", "Bread", "Old radios"])
    choose(other, "Cats", "Delete")
    expect(chats(tab)).to_have_text(["News", "Bread", "Old radios"])
    other.get_by_role("button", name="Undo").click()
    expect(chats(tab)).to_have_text(["News", "Cats", "Bread", "Old radios"])


def test_a_sidebar_that_was_replaced_lets_go_of_the_store(tab):
    counts = tab.evaluate("""async () => {
      document.querySelector("#sidebar").replaceChildren();
      let reads = 0;
      const read = store.conversations.bind(store);
      store.conversations = () => (reads++, read());
      await store.updateConversation(id("Cats"), (c) => { c.title = "x"; });
      await store.updateConversation(id("Cats"), (c) => { c.title = "y"; });
      await new Promise((resolve) => setTimeout(resolve));
      return reads;
    }""")
    assert counts == 0


FILL = """async () => {
  for (let n = 0; n < 200; n++) await add(`Chat number ${n}`, n / 2);
  await refresh();
}"""


@pytest.mark.slow
def test_the_list_keeps_its_place_and_the_focus_when_chats_come_and_go(tab):
    tab.evaluate(FILL)
    line = chat(tab, "Chat number 60")
    line.focus()
    tab.evaluate("() => { document.querySelector('#sidebar .list').scrollTop += 40 }")
    before = tab.evaluate("() => document.querySelector('#sidebar .list').scrollTop")
    tab.evaluate("async () => { await store.deleteConversation(id('Chat number 150')); await refresh() }")
    expect(chats(tab)).to_have_count(202)
    assert tab.evaluate("() => document.querySelector('#sidebar .list').scrollTop") == before
    tab.evaluate("async () => { await store.updateConversation(id('Chat number 60'), (c) => { c.pinned = true }) }")
    expect(chats(tab).first).to_have_text("Chat number 60")
    expect(chats(tab).first).to_be_focused()


@pytest.mark.slow
def test_nothing_moves_when_the_pointer_passes_and_two_hundred_chats_are_drawn_at_once(tab):
    tab.evaluate(FILL)
    shifts, drawn = tab.evaluate("""async () => {
      window.shifts = [];
      new PerformanceObserver((list) => shifts.push(...list.getEntries().map(({ value }) => value)))
        .observe({ type: "layout-shift", buffered: false });
      const start = performance.now();
      document.querySelector("#sidebar").replaceChildren();
      await make().refresh();
      document.body.offsetHeight;
      return [shifts, performance.now() - start];
    }""")
    before = chat(tab, "Chat number 3").first.bounding_box()
    chat(tab, "Chat number 3").first.hover()
    tab.get_by_role("button", name="Options for “Chat number 3”", exact=True).click()
    assert chat(tab, "Chat number 3").first.bounding_box() == before
    print(f"200 chats drawn in {drawn:.0f} ms")
    assert drawn < 5000
    assert tab.evaluate("() => shifts") == shifts == []


# ---- search


def results(page):
    return page.locator("#sidebar .result")


def test_search_shows_the_words_in_their_place_and_a_click_leads_there(tab):
    tab.get_by_role("searchbox", name="Search chats").fill("minute flour")
    expect(results(tab)).to_have_count(1)
    expect(results(tab).locator(".where")).to_have_text("Bread")
    expect(results(tab).locator(".excerpt")).to_have_text("With flour. Give me a <b>minute</b>.")
    expect(results(tab).locator("mark")).to_have_text("flour")
    expect(chats(tab).first).not_to_be_visible()
    results(tab).click()
    assert calls(tab) == [["open", id_of(tab, "Bread"), id_of(tab, "Bread1")]]
    expect(results(tab)).to_have_count(1)  # for the next one of them


def test_search_by_keyboard_opens_results_and_escape_brings_the_list_back(tab):
    tab.evaluate("() => focusSearch()")
    tab.keyboard.type("bread")
    expect(results(tab)).to_have_count(2)
    expect(results(tab).locator("mark").first).to_have_text("Bread")  # no longer what the letters before found
    tab.keyboard.press("Enter")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    bread = id_of(tab, "Bread")
    assert calls(tab) == [["open", bread, None], ["open", bread, id_of(tab, "Bread0")]]  # a title, a message
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("ArrowUp")
    assert focused(tab) == "Search chats"
    tab.keyboard.press("Escape")
    expect(chats(tab)).to_have_count(3)
    expect(chats(tab).first).to_be_visible()
    expect(tab.get_by_role("searchbox")).to_have_value("")


def test_results_that_come_once_more_leave_the_focus_where_it_is(tab):
    # Those of the last letter may come when the arrow keys have left the field.
    field = tab.get_by_role("searchbox", name="Search chats")
    field.fill("bread")
    expect(results(tab)).to_have_count(2)
    field.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    before = focused(tab)
    drawn_anew = """() => {
        window.old = document.activeElement
        document.querySelector("[type=search]").dispatchEvent(new Event("input"))
    }"""
    tab.evaluate(drawn_anew)
    tab.wait_for_function("() => !old.isConnected")
    assert focused(tab) == before
    field.evaluate("field => { field.value = 'cat' }")
    tab.evaluate(drawn_anew)
    tab.wait_for_function("() => !old.isConnected")
    assert focused(tab) == "Search chats"


def test_the_field_keeps_an_escape_for_itself_only_while_there_is_something_to_clear(tab):
    tab.evaluate("() => { window.heard = 0; addEventListener('keydown', ({ key }) => { heard += key === 'Escape' }) }")
    tab.get_by_role("searchbox").fill("cat")
    tab.keyboard.press("Escape")
    assert tab.evaluate("() => heard") == 0
    tab.keyboard.press("Escape")
    assert tab.evaluate("() => heard") == 1


def test_search_without_a_result_says_so_and_how_many_there_are_is_said_too(tab):
    tab.get_by_role("searchbox").fill("zebra")
    expect(tab.get_by_role("status")).to_have_text("No chat holds “zebra”.")
    expect(tab.locator("#sidebar .list .note")).to_be_visible()
    tab.get_by_role("searchbox").fill("mimir")
    expect(tab.get_by_role("status")).to_have_text("1 result")
    tab.get_by_role("button", name="Clear the search").click()
    expect(tab.get_by_role("status")).to_have_text("")
    expect(tab.get_by_role("searchbox")).to_be_focused()


def test_a_slow_search_does_not_replace_the_results_of_a_later_one(tab):
    tab.evaluate("""() => {
      const search = store.search.bind(store);
      window.finish = null;
      store.search = async (words) => {
        const hits = await search(words);
        if (words === "bread") await new Promise((resolve) => { window.finish = resolve; });
        return hits;
      };
    }""")
    tab.get_by_role("searchbox").fill("bread")
    tab.wait_for_function("() => window.finish")
    tab.get_by_role("searchbox").fill("mimir")
    expect(results(tab)).to_have_count(1)
    tab.evaluate("async () => { finish(); await new Promise((resolve) => setTimeout(resolve)) }")
    expect(results(tab).locator("mark")).to_have_text("Mímir")


# ---- files


def test_a_chat_is_exported_as_markdown_and_as_json_under_its_title(tab):
    tab.evaluate("() => store.updateConversation(id('Bread'), (c) => { c.title = 'Bread: how/why?' })")
    expect(chat(tab, "Bread: how/why?")).to_be_visible()
    with tab.expect_download() as markdown:
        choose(tab, "Bread: how/why?", "Export as Markdown")
    assert markdown.value.suggested_filename == "Bread how why.md"
    assert "With flour. Give me a <b>minute</b>." in markdown.value.path().read_text("utf-8")
    with tab.expect_download() as exported:
        choose(tab, "Bread: how/why?", "Export as JSON")
    assert exported.value.suggested_filename == "Bread how why.json"
    assert len(json.loads(exported.value.path().read_text("utf-8"))["conversations"]) == 1


def test_all_chats_are_exported_and_a_file_is_imported_with_what_came_of_it(tab):
    with tab.expect_download() as exported:
        manage(tab, "Export all chats")
    assert re.fullmatch(r"llama2-chat \d{4}-\d\d-\d\d\.json", exported.value.suggested_filename)
    delete_all(tab)
    expect(chats(tab)).to_have_count(0)
    for said in ("Imported 3 chats with 5 messages.", "Everything in this file is here already."):
        with tab.expect_file_chooser() as chooser:
            manage(tab, "Import…")
        chooser.value.set_files(exported.value.path())
        expect(tab.get_by_role("alert")).to_contain_text(said)
        expect(chats(tab)).to_have_text(["Cats", "Bread", "Old radios"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{]", "This is not a file of exported chats"),
        (b'{"format": "llama2-chat", "version": 1, "conversations": [7]}', "Nothing was imported"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_with_a_sentence(tab, content, sentence):
    with tab.expect_file_chooser() as chooser:
        manage(tab, "Import…")
    chooser.value.set_files({"name": "cat.json", "mimeType": "application/json", "buffer": content})
    expect(tab.get_by_role("alert")).to_have_text(re.compile(f"^{sentence}"))


def test_an_error_inside_is_one_calm_sentence(tab):
    tab.evaluate("() => { store.updateConversation = async () => { throw new TypeError('x is undefined') } }")
    choose(tab, "Cats", "Pin")
    expect(tab.get_by_role("alert")).to_contain_text("That did not work. Reload the page and try again.")


def test_a_browser_that_keeps_nothing_says_so_beside_the_list(context, open_tab):
    context.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
    expect(open_tab().get_by_text("This browser is not keeping new chats")).to_be_visible()


# ---- keyboard, touch, screen readers


def test_the_list_is_one_stop_of_the_tab_key_and_arrows_lead_through_it(tab):
    stops = []
    for _ in range(6):
        tab.keyboard.press("Tab")
        stops.append(focused(tab))
    private = "Private chat: nothing is kept"
    assert stops == ["New chat", private, "Search chats", "Bread", "Options for “Bread”", "Manage chats"]
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("ArrowDown")
    assert focused(tab) == "Old radios"
    tab.keyboard.press("Home")
    assert focused(tab) == "Cats"
    tab.keyboard.press("ArrowRight")
    assert focused(tab) == "Options for “Cats”"
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("End")
    tab.keyboard.press("Enter")
    assert calls(tab) == [["open", id_of(tab, "Old radios")]]


def test_f2_renames_and_delete_deletes_and_the_focus_stays_in_the_list(tab):
    chat(tab, "Cats").focus()
    tab.keyboard.press("F2")
    tab.keyboard.type("Lions")
    tab.keyboard.press("Enter")
    expect(chats(tab).first).to_have_text("Lions")
    expect(chats(tab).first).to_be_focused()
    tab.keyboard.press("Delete")
    expect(chats(tab)).to_have_text(["Bread", "Old radios"])
    assert focused(tab) == "Bread"


def test_a_menu_is_walked_by_arrows_and_escape_gives_the_focus_back(tab):
    more = tab.get_by_role("button", name="Options for “Bread”")
    more.focus()
    tab.keyboard.press("Enter")
    assert focused(tab) == "Pin"
    expect(more).to_have_attribute("aria-expanded", "true")
    for key, item in (
        ("ArrowUp", "Delete"),
        ("ArrowDown", "Pin"),
        ("End", "Delete"),
        ("Home", "Pin"),
        ("ArrowDown", "Rename"),
    ):
        tab.keyboard.press(key)
        assert focused(tab) == item
    tab.evaluate("() => addEventListener('keydown', () => calls.push('a key that is not for the menu'))")
    tab.keyboard.press("Escape")
    assert calls(tab) == []
    expect(tab.get_by_role("menu")).to_have_count(0)
    expect(more).to_have_attribute("aria-expanded", "false")
    expect(more).to_be_focused()


def test_a_second_click_closes_a_menu_and_it_always_fits_into_the_window(tab):
    button = tab.get_by_role("button", name="Manage chats")
    button.click()
    box = tab.get_by_role("menu").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= button.bounding_box()["y"]
    button.click()
    expect(tab.get_by_role("menu")).to_have_count(0)


def test_on_touch_every_target_is_44_pixels_and_menus_need_no_hovering(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(address)
    page.wait_for_function("() => window.ready")
    page.evaluate("() => add('Cats', 0, ['Name my cat'])")
    page.get_by_role("button", name="Options for “Cats”").tap()
    size = "(all) => all.map((e) => [e.textContent || e.ariaLabel, e.offsetWidth, e.offsetHeight, e.checkVisibility()])"
    sizes = page.locator("#sidebar :is(button, input)").evaluate_all(size)
    page.keyboard.press("Escape")
    page.get_by_role("searchbox").fill("cat")
    expect(results(page)).to_have_count(2)
    sizes += page.locator("#sidebar :is(button, input)").evaluate_all(size)
    page.get_by_role("searchbox").fill("")
    opacity = page.get_by_role("button", name="Options for “Cats”").evaluate("(e) => getComputedStyle(e).opacity")
    font = page.get_by_role("searchbox").evaluate("(e) => getComputedStyle(e).fontSize")
    context.close()
    small = [(name, width, height) for name, width, height, visible in sizes if visible and min(width, height) < 44]
    assert not small
    assert opacity == "1"
    assert font == "16px"  # less makes iOS zoom in


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_grave_in_list_menu_rename_and_search(tab, theme):
    tab.evaluate("(dark) => document.body.classList.toggle('dark', dark)", theme == "dark")
    assert_accessible(tab)
    chat(tab, "Cats").hover()
    tab.get_by_role("button", name="Options for “Cats”").click()
    assert_accessible(tab)
    tab.get_by_role("menuitem", name="Rename").click()
    assert_accessible(tab)
    tab.keyboard.press("Escape")
    tab.get_by_role("searchbox").fill("bread")
    expect(results(tab)).to_have_count(2)
    assert_accessible(tab)
    tab.get_by_role("searchbox").fill("zebra")
    expect(tab.get_by_role("status")).to_have_text("No chat holds “zebra”.")
    assert_accessible(tab)
