"""markdown.js on a page of its own, under the policy that the app sends, and what has gone wrong there."""

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Locator, Page

from tests.support.static_page import static_page

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Answers</title><link rel="icon" href="data:,"><link rel="stylesheet" href="markdown.css">
<link rel="stylesheet" href="code.css">
<style>:root { color-scheme: light dark; --text: light-dark(#1c2330, #e6e9ef); --muted: light-dark(#5b6472, #a4adbb);
--line: #8888; --surface: light-dark(#fff, #12161d); --raised: light-dark(#f5f6f9, #1b212b);
--accent: light-dark(#4338ca, #a5b4fc); --radius: 8px; --mono: monospace; } body { color: var(--text);
background: var(--surface); }</style><main><div id="answer"></div></main></html>"""

# What a test has at hand: view, an AnswerView of #answer; frame(), the next frame after it has shown all.
HELPERS = """
const { AnswerView } = await import("./markdown.js");
window.answer = document.querySelector("#answer");
window.view = new AnswerView(answer);
window.frame = async () => {
  do await new Promise(requestAnimationFrame); while (view.frame);
  await new Promise(requestAnimationFrame);
};
"""


@contextmanager
def answer_tab(browser: Browser) -> Iterator[tuple[Page, list[str]]]:
    """A tab for answers, and its errors: what its console said, and requests to other hosts."""
    with static_page({"index.html": PAGE}) as address:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on(
            "request", lambda request: request.url.startswith((address[:-10], "data:")) or errors.append(request.url)
        )
        page.goto(address)
        yield page, errors
        page.close()


def empty(page: Page) -> None:
    """A new, empty answer."""
    page.evaluate("document.querySelector('main').innerHTML = '<div id=answer></div>'")
    page.evaluate(f"async () => {{ {HELPERS} }}")


def show(page: Page, text: str) -> Locator:
    """A finished answer."""
    page.evaluate("(text) => view.update(text, { done: true })", text)
    return page.locator("#answer")
