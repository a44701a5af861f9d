"""The page on every screen: phones upright and on their side, touch, zoom, the keyboard's room, forced colours."""

import io
import re

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from llama2_chat.server import login
from llama2_chat.types import Status
from tests.support.axe import assert_accessible
from tests.support.browser import SHORT, answers, ask, box, expect_unlocked, open_settings, press, send, toast
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import serving

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
ON_ITS_SIDE, SMALL = {"width": 844, "height": 390}, {"width": 320, "height": 568}
TOUCH = {"is_mobile": True, "has_touch": True}
MARKDOWN = "<think>Hm.</think>\n\nSome `code`:\n\n```python\nprint(1)\n```\n\n- [x] done\n- [ ] not done"

pytestmark = pytest.mark.slow


@pytest.fixture
def site(perform):
    return perform(ScriptedChat(say=lambda messages: Scripted(MARKDOWN, reason="length")))


@pytest.fixture(scope="module")
def guarded(settings, tmp_path_factory):
    """The address of a page with a login, of anna's."""
    users = tmp_path_factory.mktemp("login") / "users.txt"
    users.write_text(f"anna:{login.hash_password('sesame')}\n")
    with serving(ScriptedChat(), settings, login.read_users(users)) as address:
        yield address


# What a finger cannot hit, or an iPhone would zoom in on.
TOO_SMALL = """[...document.querySelectorAll("button, input:not(:disabled), textarea, summary")]
  .filter((each) => each.checkVisibility())
  .map((each) => each.type === "checkbox" ? each.closest("label") : each)
  .filter((each) => each.offsetWidth < 44 || each.offsetHeight < 44
    || (/^(number|search|text|password|textarea)$/.test(each.type) && parseFloat(getComputedStyle(each).fontSize) < 16))
  .map((each) => each.outerHTML)"""
FONT = "element => getComputedStyle(element).fontFamily"
# A label that touches the edge of its button, or words without one.
BARE = """[...document.querySelectorAll(".middle button, .toast button, dialog button, #settings > header button")]
  .filter((each) => each.checkVisibility())
  .filter((each) => { const { paddingLeft, paddingTop, borderTopColor, borderTopWidth } = getComputedStyle(each);
    const isBordered = borderTopWidth !== "0px" && borderTopColor !== "rgba(0, 0, 0, 0)";
    const hasWords = each.matches(".examples button, .words, .editor button:not(.primary), .toast button:not(.quiet)");
    return parseFloat(paddingLeft) < 5 || parseFloat(paddingTop) < 3 || (hasWords && !isBordered);
  }).map((each) => each.outerHTML)"""


def test_a_finger_hits_every_control_and_no_field_makes_a_phone_zoom(visit, site):
    page = visit(site, viewport=PHONE, **TOUCH)
    assert page.evaluate(TOO_SMALL) == []
    say(page)
    press(page, "Edit")
    assert page.evaluate(TOO_SMALL) == []
    page.get_by_role("button", name="Cancel").click()
    open_settings(page)
    assert page.evaluate(TOO_SMALL) == []
    page.get_by_role("button", name="Close").click()
    open_menu(page)
    assert page.evaluate(TOO_SMALL) == []
    page.get_by_role("menuitem", name="Delete").click()
    expect(page.locator(".toast")).to_be_visible()
    assert page.evaluate(TOO_SMALL) == []


def test_every_button_looks_like_one(visit, site):
    page = visit(site, viewport=DESKTOP)
    assert page.evaluate(BARE) == []  # examples
    ask(page)
    press(page, "Edit")
    open_settings(page)
    assert page.evaluate(BARE) == []
    press(page, "Copy")
    assert page.locator(".toast").evaluate(FONT).startswith('"IBM Plex Sans"')  # it goes again by itself
    page.locator("#transcript").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    assert page.evaluate(BARE) == []
    assert page.get_by_role("dialog").evaluate(FONT).startswith('"IBM Plex Sans"')


@pytest.mark.parametrize("size", [PHONE, ON_ITS_SIDE, SMALL], ids=["phone", "on its side", "small"])
def test_everything_that_opens_stays_on_the_screen(visit, site, size):
    page = visit(site, viewport=size, **TOUCH)
    expect(page.get_by_role("heading", name="What would you like to talk about?")).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("button", name="To the newest message")).to_be_hidden()
    say(page)
    open_settings(page)
    page.get_by_role("button", name="Back to the defaults").scroll_into_view_if_needed()
    page.locator("#settings").get_by_role("button", name="Close").click()
    open_menu(page)
    for item in page.get_by_role("menuitem").all():
        expect(item).to_be_in_viewport(ratio=1)
    page.get_by_role("menuitem", name="Delete").click()
    toast = page.locator(".toast").bounding_box()
    assert toast["x"] >= 0
    assert toast["x"] + toast["width"] <= size["width"]
    assert toast["y"] + toast["height"] <= page.locator(".box").bounding_box()["y"]
    for button in page.locator(".toast button").all():
        assert button.evaluate("button => button.scrollWidth <= button.clientWidth")
    page.locator(".toast button").last.click()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="Manage chats").click()
    page.get_by_role("menuitem", name="Delete all").click()
    expect(page.get_by_role("dialog", name="Delete all chats")).to_be_in_viewport(ratio=1)


def test_two_fingers_zoom_in_and_a_keyboard_covers_nothing_that_is_open(visit, site):
    page = visit(site, viewport=PHONE, **TOUCH)
    devtools = page.context.new_cdp_session(page)
    with page.expect_event("console"):
        page.evaluate("visualViewport.addEventListener('resize', () => console.log('zoomed'), { once: true })")
        devtools.send("Emulation.setPageScaleFactor", {"pageScaleFactor": 2})
    assert page.evaluate("document.querySelector('.middle').clientHeight") == 844
    devtools.send("Emulation.setPageScaleFactor", {"pageScaleFactor": 1})
    say(page)
    press(page, "Copy")
    open_settings(page)
    page.evaluate("""() => {  // as an iPhone's keyboard does, which leaves the window as large as it was
      Object.defineProperty(visualViewport, "height", { value: 480, configurable: true });
      visualViewport.dispatchEvent(new Event("resize"));
    }""")
    for opened in (page.locator("#settings"), page.locator(".toast")):
        assert bottom(opened) <= 480
    page.get_by_role("button", name="Close").first.click()
    page.locator("#transcript").focus()
    page.keyboard.press("?")
    assert bottom(page.get_by_role("dialog")) <= 480


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, {"forced_colors": "active"}], ids=str)
def test_done_and_not_done_look_different_in_a_task_list(visit, site, options):
    page = visit(site, viewport=DESKTOP, **options)
    ask(page)
    done, not_done = answers(page).get_by_role("checkbox").all()
    assert pixels(done) != pixels(not_done)


def test_what_a_colour_tells_is_told_without_our_colours_too(visit, site):
    page = visit(site, viewport=DESKTOP, forced_colors="active")
    ask(page, "First")
    page.get_by_role("button", name="New chat").first.click()
    ask(page, "First")
    open_settings(page)
    chosen = pixels(page.locator("#sidebar .open[aria-current]"))
    assert chosen != pixels(page.locator("#sidebar .open:not([aria-current])"))
    for shown in ("#setting-temperature input[type=range]", ".gauge meter"):
        assert colours(page.locator(shown)) > 1, shown
    assert page.locator("article.user .body").evaluate("bubble => getComputedStyle(bubble).borderTopWidth") == "1px"
    for field, outlined in ((box(page), ".box"), (page.get_by_label("System prompt"), "#settings textarea")):
        field.focus()
        assert page.locator(outlined).first.evaluate("outlined => getComputedStyle(outlined).outlineStyle") == "solid"


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}], ids=["light", "dark"])
def test_a_login_that_failed_keeps_the_name_and_says_so_calmly(browser, guarded, options):
    with browser.new_page(viewport=PHONE, **TOUCH, **options) as page:
        page.goto(guarded)
        expect(page.get_by_role("main").get_by_role("heading", name="Llama 2 Chat", level=1)).to_be_visible()
        assert_accessible(page)
        assert page.evaluate(TOO_SMALL) == []
        page.get_by_label("Name").fill("anna")
        page.get_by_label("Password").fill("wrong")
        for _ in range(2):
            page.get_by_role("button", name="Log in").click()
            expect(page.get_by_role("alert")).to_have_text(re.compile("do not go together"))
            expect(page.get_by_label("Password")).to_be_focused()
        expect(page.get_by_label("Name")).to_have_value("anna")
        assert_accessible(page)
        page.keyboard.type("sesame")  # in place of the other, which is selected
        page.keyboard.press("Enter")
        expect(box(page)).to_be_editable()


def test_the_login_is_in_the_visitors_language(browser, guarded):
    with browser.new_page(viewport=PHONE, **TOUCH, locale="fr-FR") as page:
        page.goto(guarded)
        page.get_by_label("Nom").fill("anna")
        page.get_by_label("Mot de passe").fill("wrong")
        page.get_by_role("button", name="Se connecter").click()
        expect(page.get_by_role("alert")).to_have_text(re.compile("ne correspondent pas"))
        expect(page.locator("html")).to_have_attribute("lang", "fr")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_an_answer_waits_for_is_said_once(visit, perform):
    chat = ScriptedChat(Status("loading", phase="download", done_bytes=1, total_bytes=93_000_000))
    page = visit(perform(chat), viewport=PHONE)
    progress = page.locator(".status", has_text="of 93 MB")
    expect(progress).to_be_visible()
    send(page, SHORT)
    expect(page.locator("article.waiting")).to_have_attribute("data-waiting", re.compile("of 93 MB"))
    expect(progress).to_be_hidden()


def test_words_stand_in_the_middle_of_their_line(visit, site):
    """As Gradio ships its font, capitals stand an eighth of a line too high."""
    page = visit(site)
    above, below, capital = page.evaluate("""async () => {
      await document.fonts.load('100px "IBM Plex Sans"');
      const context = document.createElement("canvas").getContext("2d");
      context.font = '100px "IBM Plex Sans"';
      const measured = context.measureText("H");
      return [measured.fontBoundingBoxAscent, measured.fontBoundingBoxDescent, measured.actualBoundingBoxAscent];
    }""")
    assert above - capital == pytest.approx(below, abs=6)


def say(page: Page) -> None:
    """A whole exchange, by touch."""
    box(page).fill(SHORT)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(answers(page)).to_have_count(1)
    expect_unlocked(page)


def open_menu(page: Page) -> None:
    page.get_by_role("button", name="Conversations").click()
    page.locator("#sidebar .more").first.click()


def bottom(element: Locator) -> float:
    place = element.bounding_box()
    assert place
    return place["y"] + place["height"]


def pixels(element: Locator) -> bytes:
    with Image.open(io.BytesIO(element.screenshot())) as picture:
        return picture.convert("RGB").tobytes()


def colours(element: Locator) -> int:
    with Image.open(io.BytesIO(element.screenshot())) as picture:
        return len(picture.convert("RGB").getcolors(1_000_000))


def test_nothing_shows_through_the_head_of_the_settings_and_a_toast_is_in_the_middle_of_the_chat(visit, site):
    page = visit(site, viewport={"width": 1280, "height": 800})
    open_settings(page)
    page.evaluate("document.querySelector('#settings').scrollTop = 300")
    shown = """() => {
      const head = document.querySelector("#settings > header");
      const { left, top, height } = head.getBoundingClientRect();
      const at = (y) => document.elementFromPoint(left + 30, top + y);
      return Array.from({ length: height - 2 }, (_, y) => at(y + 1)).every((each) => head.contains(each));
    }"""
    for _ in range(20):
        assert page.evaluate(shown)
        page.evaluate("document.querySelector('#settings').scrollTop += 7")
    page.get_by_role("textbox", name="Seed").fill("none")
    box(page).fill("Hi")
    box(page).press("Enter")
    middle = "(element) => { const { left, right } = element.getBoundingClientRect(); return (left + right) / 2; }"
    expect(toast(page)).to_be_visible()
    assert abs(toast(page).evaluate(middle) - page.locator("#composer").evaluate(middle)) < 10


def test_a_screen_that_is_very_low_leaves_room_to_read(visit, site):
    page = visit(site, viewport={"width": 320, "height": 256})  # four times as large as on 1280 by 1024
    say(page)
    assert page.locator("#transcript").bounding_box()["height"] >= 110
    expect(page.get_by_text("free")).to_be_hidden()


def test_all_of_a_conversation_is_printed_and_no_button(visit, perform):
    page = visit(
        perform(ScriptedChat(say=lambda messages: Scripted("**Line** of text.\n\n" * 60))), color_scheme="dark"
    )
    say(page)
    page.emulate_media(media="print")
    assert page.locator("strong").first.evaluate("(element) => getComputedStyle(element).color") == "rgb(0, 0, 0)"
    height = page.evaluate("document.querySelector('#transcript').offsetHeight")
    assert height == page.evaluate("document.querySelector('#transcript').scrollHeight") > 2000
    assert page.evaluate("document.documentElement.scrollHeight") >= height
    expect(page.get_by_role("button")).to_have_count(0)
