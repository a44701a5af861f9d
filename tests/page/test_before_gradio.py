"""The page before Gradio's frame is there, and without it: nobody waits for Gradio to type a message."""

import pytest
from playwright.sync_api import expect

from tests.support.browser import answers, ask, box, open_page, open_settings, toast
from tests.support.scripted import ScriptedChat


@pytest.fixture
def chat():
    return ScriptedChat()


@pytest.fixture
def site(perform, chat):
    return perform(chat)


@pytest.fixture
def context(browser):
    """A browser that Gradio's code does not reach until `context.unroute_all()`."""
    with browser.new_context(color_scheme="light") as context:
        context.route("**/assets/**", lambda route: route.abort())
        yield context


@pytest.mark.slow
def test_a_message_is_answered_before_gradio_has_come(context, site):
    page = open_page(context.new_page(), site)
    ask(page)
    expect(answers(page)).to_have_text("Hello!")
    assert page.locator("gradio-app").inner_text() == ""


@pytest.mark.slow
def test_settings_that_were_kept_hold_for_the_first_message_before_their_controls_are_there(context, site, chat):
    context.unroute_all()
    page = open_page(context.new_page(), site)
    open_settings(page)
    page.get_by_role("spinbutton", name="Temperature").fill("1.5")
    context.route("**/assets/**", lambda route: route.abort())
    page.reload()
    ask(page)
    assert chat.asked[-1][1].temperature == 1.5


@pytest.mark.slow
def test_settings_that_were_asked_for_open_once_gradio_has_made_them(context, site):
    page = context.new_page()
    late = []
    context.unroute_all()
    page.route("**/assets/index-*.js", lambda route: late.append(route))
    open_page(page, site)
    page.locator("#chat").get_by_role("button", name="Settings").click()
    expect(page.locator("#settings")).to_have_count(0)
    box(page).fill("Typed meanwhile")
    page.wait_for_function("document.activeElement.value === 'Typed meanwhile'")
    while not late:
        page.wait_for_timeout(20)
    late[0].continue_()
    expect(page.get_by_role("spinbutton", name="Temperature")).to_be_visible()
    expect(box(page)).to_have_value("Typed meanwhile")


@pytest.mark.slow
def test_the_theme_that_was_chosen_stays_whatever_the_system_turns_to(visit, site):
    page = visit(site, color_scheme="light")
    page.get_by_role("button", name="Light or dark").click()
    page.locator("#setting-seed").wait_for(state="attached")
    expect(page.locator("body.dark")).to_have_count(1)
    page.emulate_media(color_scheme="dark")
    page.emulate_media(color_scheme="light")
    expect(page.locator("body.dark")).to_have_count(1)


@pytest.mark.slow
def test_a_page_whose_server_is_away_says_so_and_opens_when_it_is_back(context, site):
    page = context.new_page()
    page.route("**/page/state", lambda route: route.fulfill(status=503))
    page.goto(site)
    expect(page.get_by_text("The server cannot be reached. Trying again")).to_be_visible()
    page.unroute("**/page/state")
    expect(box(page)).to_be_editable()
    expect(page.get_by_text("The server cannot be reached. Trying again")).to_have_count(0)


@pytest.mark.slow
def test_what_gradio_lays_over_the_page_while_it_loads_is_in_nobodys_way(context, site):
    page = context.new_page()
    context.unroute_all()
    page.route("**/assets/Blocks-*", lambda route: route.abort())
    open_page(page, site)
    page.locator("gradio-app [data-testid=status-tracker]").wait_for(state="attached")
    box(page).fill("Hi")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(answers(page)).to_have_text("Hello!")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["index-*.js", "core-*.js", "Blocks-*.css", "Index-*.css"])
def test_settings_come_though_the_line_went_down_while_gradio_loaded(context, site, chat, lost):
    page = context.new_page()
    context.unroute_all()
    page.route(f"**/assets/{lost}", lambda route: route.abort())
    with page.expect_event("requestfailed"):
        open_page(page, site)
    page.unroute_all()
    expect(page.locator("#setting-seed")).to_be_attached()
    open_settings(page)
    page.get_by_role("spinbutton", name="Temperature").fill("1.5")
    ask(page)
    assert chat.asked[-1][1].temperature == 1.5


@pytest.mark.slow
def test_settings_that_do_not_come_the_second_time_either_are_a_click_away(context, site):
    page = context.new_page()
    context.unroute_all()
    page.route("**/core-*.js", lambda route: route.abort())
    open_page(page, site)
    expect(toast(page)).to_contain_text("The settings could not be loaded.", timeout=40_000)
    page.unroute_all()
    toast(page).get_by_role("button", name="Reload").click()
    expect(page.locator("#setting-seed")).to_be_attached()
