"""A line that goes down while the page loads: it comes all the same, or says what is wrong; and what browsers keep."""

import re

import httpx
import pytest
from playwright.sync_api import expect
from starlette.testclient import TestClient

from llama2_chat.page import assets
from llama2_chat.server.login import Users, hash_password
from tests.support.browser import answers, ask, box, open_page
from tests.support.lines import line_to
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import serving

MENDED_MS = 150_000  # where a connection hangs without a word, loading.js waits for it more than once
INCOMPLETE = "The page has not loaded completely. Trying again …"


@pytest.fixture
def site(perform):
    return perform(ScriptedChat())


@pytest.fixture
def context(browser):
    with browser.new_context() as context:
        yield context


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["main.js", "tree.js", "texts/en.js", "marked.esm.js"])
def test_a_page_without_one_of_its_modules_says_so_and_comes_once_it_can_be_had(context, site, lost):
    """It stayed empty, without a word: a browser asks for no module twice."""
    page = context.new_page()
    page.route(f"**/{lost}?*", lambda route: route.abort())
    page.goto(site)
    expect(page.get_by_text(INCOMPLETE)).to_be_visible()
    page.unroute_all()
    expect(box(page)).to_be_editable()
    expect(page.get_by_text(INCOMPLETE)).to_have_count(0)


@pytest.mark.slow
def test_a_style_sheet_that_was_lost_comes_where_it_stood_and_costs_no_reload(context, site):
    page, asked = context.new_page(), []
    page.route(
        "**/page/page.css?*", lambda route: asked.append(route) or (route.continue_ if asked[1:] else route.abort)()
    )
    open_page(page, site)
    box(page).fill("Typed before")
    expect(page.locator("#chat")).to_have_css("position", "fixed")
    first = page.locator("link[rel=stylesheet]").first
    assert "page.css" in first.get_attribute("href")
    expect(box(page)).to_have_value("Typed before")


@pytest.mark.slow
@pytest.mark.parametrize("bytes_that_come", [20_000, 90_000, 200_000, 400_000, 580_000])
def test_a_page_comes_wherever_the_line_went_down(context, site, bytes_that_come):
    """In the document, at a style sheet, in a module, in Gradio's code. One that was cut stayed empty for good."""
    with line_to(site, left=bytes_that_come) as (line, address):
        page = context.new_page()
        page.goto(address, wait_until="commit")
        while line.left:  # fewer than all that a visit takes, 640 KB
            page.wait_for_timeout(50)
        page.wait_for_timeout(500)
        line.left = None
        expect(page.locator("#setting-seed")).to_be_attached(timeout=MENDED_MS)
        ask(page)
        expect(answers(page)).to_have_text("Hello!")


@pytest.mark.slow
@pytest.mark.parametrize("empty", ["page/main", "page/tree", "page/texts/en", "assets/index-.*", "assets/Blocks-.*"])
def test_a_page_comes_though_one_of_its_modules_was_cut_in_its_headers(context, site, empty):
    """A browser takes it for an empty file: the settings never came, or this browser could not start the page."""
    with line_to(site, unlucky=rf"GET /{empty}\.js") as (_, address):
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#setting-seed")).to_be_attached()
        ask(page)
        expect(answers(page)).to_have_text("Hello!")


@pytest.mark.slow
def test_settings_come_though_a_part_of_them_was_never_answered(context, site):
    """As where a line is dead without a word: nothing failed, and nothing was said."""
    page = context.new_page()
    page.route("**/assets/Blocks-*.js", lambda route: None)
    open_page(page, site)
    expect(page.locator("#setting-seed")).to_be_attached(timeout=MENDED_MS)


@pytest.mark.slow
def test_a_page_without_one_of_its_modules_comes_also_beside_a_style_sheet_of_an_extension(browser, site):
    """Nobody may read its rules or fetch it: this browser could not start the page, it said, and waited for good."""
    sheet = f"{site.replace('127.0.0.1', 'localhost')}page/print.css"
    with browser.new_context(bypass_csp=True) as context:
        page = context.new_page()
        page.add_init_script(
            f"""new MutationObserver((_, observer) => {{
                if (!document.head) return;
                observer.disconnect();
                const link = Object.assign(document.createElement("link"), {{rel: "stylesheet", href: "{sheet}"}});
                document.head.append(link);
            }}).observe(document, {{childList: true, subtree: true}})"""
        )
        page.route("**/tree.js?*", lambda route: route.abort())
        page.goto(site)
        expect(page.get_by_text(INCOMPLETE)).to_be_visible()
        page.unroute_all()
        expect(box(page)).to_be_editable()
        expect(page.locator("#loading")).to_have_count(0)


@pytest.mark.slow
def test_on_a_slow_line_the_settings_are_waited_for(context, site):
    """On one of 4 KB/s they were asked for twice, and then it was said that they could not be loaded."""
    page, slow, slower, again = context.new_page(), [], [], []
    page.route("**/page/print.css?*", lambda route: slow.append(route))
    page.route("**/assets/index-*.js", lambda route: slower.append(route))
    page.route("**/page/again/**", lambda route: again.append(route))
    page.goto(site, wait_until="commit")
    for held, ms in ((slow, 12_000), (slower, 38_000)):
        page.wait_for_timeout(ms)
        held[0].continue_()
    expect(page.locator("#setting-seed")).to_be_attached()
    assert not again


@pytest.mark.slow
def test_a_style_sheet_that_was_cut_in_its_headers_comes_where_it_stood(context, site):
    with line_to(site, unlucky=r"GET /page/page\.css") as (_, address):
        page = open_page(context.new_page(), address)
        expect(page.locator("#chat")).to_have_css("position", "fixed")


@pytest.mark.slow
def test_a_document_that_was_cut_comes_though_all_that_it_names_was_there(context, site):
    """Nothing failed in it, so it stayed as it was."""
    with line_to(site, left=20_000, short=True) as (line, address):
        page, early = context.new_page(), []  # what would be cut together with the document
        page.route("**/page/**", lambda route: early.append(route) if line.left is not None else route.continue_())
        page.goto(address, wait_until="commit")
        while line.left is not None:
            page.wait_for_timeout(20)
        for route in early:
            route.continue_()
        expect(page.get_by_text(INCOMPLETE)).to_be_visible()
        ask(page)
        expect(answers(page)).to_have_text("Hello!")


@pytest.mark.slow
def test_code_that_a_browser_does_not_understand_is_said_and_not_asked_for_again(context, site):
    page, asked = context.new_page(), []
    page.route(
        "**/page/tree.js?*",
        lambda route: asked.append(route) or route.fulfill(body="(", content_type="text/javascript"),
    )
    page.goto(site)
    expect(page.get_by_text("This browser could not start the page.")).to_be_visible()
    page.wait_for_timeout(3_000)
    page.unroute_all()
    assert len(asked) == 1
    page.get_by_role("button", name="Reload").click()
    expect(box(page)).to_be_editable()


@pytest.mark.slow
def test_a_page_that_no_reload_mends_is_not_loaded_over_and_over(context, site):
    """As with a program between server and browser that keeps a script from running."""
    page, documents = context.new_page(), []
    page.on("framenavigated", lambda frame: documents.append(frame.url))
    page.route(
        "**/main.js?*", lambda route: (route.abort if route.request.resource_type == "script" else route.continue_)()
    )
    page.goto(site)
    page.wait_for_timeout(6_000)
    assert len(documents) == 2
    expect(page.get_by_text(INCOMPLETE)).to_be_visible()


@pytest.mark.slow
def test_a_login_of_which_a_part_was_lost_again_and_again_is_loaded_anew(context, settings):
    """It stayed empty, but for a line on settings that could not be loaded."""
    with serving(ScriptedChat(), settings, Users({"anna": hash_password("1")})) as address:
        page = context.new_page()
        page.route("**/core-*.js", lambda route: route.abort())
        page.goto(address)
        expect(page.get_by_text(INCOMPLETE)).to_be_visible()
        page.unroute_all()
        expect(page.get_by_role("button", name="Log in")).to_be_visible()
        expect(page.get_by_text(INCOMPLETE)).to_have_count(0)


@pytest.mark.slow
def test_formulas_and_colours_come_though_the_line_went_down_when_they_were_first_needed(context, perform):
    """Sources stayed, in all answers, until the page was loaded anew."""
    site = perform(ScriptedChat(say=lambda _: Scripted("$$x^2$$\n\n```python\nif x: pass\n```")))
    page, failed = context.new_page(), []
    page.on("requestfailed", lambda request: failed.append(request.url))
    for part in ("katex.mjs*", "katex.min.css", "languages/python.min.js"):
        page.route(f"**/{part}", lambda route: route.abort())
    ask(open_page(page, site))
    while len(failed) < 3:
        page.wait_for_timeout(50)
    page.unroute_all()
    expect(page.locator(".katex")).to_have_count(1)
    expect(page.locator(".katex")).to_have_css("font-family", re.compile("KaTeX"))
    coloured = page.locator("article.assistant").last.locator(".keyword")
    while not coloured.count():  # a busy machine may take longer than the page waits for colours
        ask(page)
        page.wait_for_timeout(500)
    expect(coloured).to_have_text(["if", "pass"])


@pytest.fixture
def client():
    return TestClient(assets.Assets())


def named_in(head: bytes) -> list[str]:
    return re.findall(r'(?:href|src)="page/(\S+?)"', head.decode())


def test_what_the_document_names_is_there_and_kept_for_good(client):
    for address in named_in(assets.head("de")):
        assert client.get(address).headers["cache-control"] == assets.FOR_GOOD


def test_files_come_compressed_to_whoever_can_unpack_them(site):
    document = httpx.get(site).text
    ours, gradios = (
        re.search(place, document)[1] for place in (r'src="(page/main\.js\S+?)"', r'src="\./(assets/\S+?)"')
    )
    for address in (ours, gradios):
        packed, plain = (httpx.get(site + address, headers={"Accept-Encoding": kind}) for kind in ("gzip", "identity"))
        assert packed.headers["Content-Encoding"] == "gzip"
        assert "Content-Encoding" not in plain.headers
        assert packed.text == plain.text
    assert "Content-Encoding" not in httpx.get(site + "page/state").headers


@pytest.mark.parametrize("address", ["main.js", "main.js?0123456789abcdef", "vendor/katex/katex.min.css"])
def test_what_may_change_under_its_address_is_asked_for_each_time(client, address):
    """Browsers ran old modules beside those of an update, and showed an empty page for days."""
    assert client.get(address).headers["cache-control"] == "no-cache"


def test_a_module_that_changes_has_another_address_for_the_document_and_for_other_modules(tmp_path, monkeypatch):
    for name in ("loading.js", "texts/en.js", "main.js", "tree.js", assets.LATER, *assets.STYLES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(assets, "STATIC", tmp_path)
    monkeypatch.setattr(assets, "MODULES", ["main.js", "tree.js"])
    before = assets.head("en").decode()
    (tmp_path / "tree.js").write_text("after the update")
    after = assets.head("en").decode()
    old, new = (re.findall(r"page/tree\.js\?\w+", head) for head in (before, after))
    assert len(old) == len(new) == 2  # where it is loaded, and where imports are resolved
    assert set(old).isdisjoint(new)
    assert before.replace(old[0], new[0]) == after
