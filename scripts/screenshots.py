"""The pictures of the page in README.md and docs/: desktop, dark with settings, phone. Needs Playwright and a Chromium.

    python scripts/screenshots.py docs/images

The answers are written here and not by a model, so that the pictures show what the page can do and stay the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from playwright.sync_api import Browser, Page, sync_playwright

from llama2_chat.benchmark.browser_cost import SteadyChat, SteadyReply
from llama2_chat.benchmark.serving_cost import serving
from llama2_chat.settings import Settings
from llama2_chat.types import Status

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
EARLIER = ["What should I pack for three days of hiking?", "Write a short poem about a lighthouse in winter."]
QUESTION = "How far can a lighthouse be seen? Give me the formula, and a function for it."
ANSWER = r"""Light travels straight, so the curvature of the Earth sets the limit. From a height $h$ in metres, the \
horizon lies at about

$$d \approx 3.57\,\sqrt{h}\ \text{km}$$

and the distances of the lamp and of the eye add up:

```python
from math import sqrt

def visible_km(lamp_m: float, eye_m: float = 2.0) -> float:
    return 3.57 * (sqrt(lamp_m) + sqrt(eye_m))
```

| Lamp | From a boat, eye at 2 m |
|---|---|
| 20 m | 21 km |
| 60 m | 33 km |

Refraction adds some **8 %** to this on an ordinary day.
""".replace("\\\n", "")


class WrittenChat(SteadyChat):
    status = Status("ready", model="Llama-2-13b-chat-hf", precision="nf4", device="cuda:0")

    def stream_reply(self, messages, params, **options):  # type: ignore[no-untyped-def]
        answer = ANSWER if messages[-1]["content"] == QUESTION else "Gladly."
        return SteadyReply([f"{word} " for word in answer.split(" ")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with serving(_page()) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        _talk(browser, url, viewport=DESKTOP, color_scheme="light").screenshot(path=folder / "page.png")
        dark = _talk(browser, url, viewport=DESKTOP, color_scheme="dark")
        dark.locator("#chat").get_by_role("button", name="Settings").click()
        dark.screenshot(path=folder / "page-dark.png")
        options = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2}
        phone = _talk(browser, url, viewport=PHONE, color_scheme="light", **options)
        phone.screenshot(path=folder / "page-phone.png")
        browser.close()


def _page():  # type: ignore[no-untyped-def]
    from app import create_app

    return create_app(WrittenChat(), Settings())  # type: ignore[arg-type]  # as much of one as the page asks for


def _talk(browser: Browser, url: str, **options: object) -> Page:
    """A page on which three questions have been asked, the last one at its end."""
    page = browser.new_page(**options)  # type: ignore[arg-type]
    page.goto(url)
    for question in EARLIER:
        _ask(page, question)
        page.keyboard.press("Control+Shift+O")
    _ask(page, QUESTION)
    page.locator(".katex").first.wait_for()
    page.locator(".code .number").nth(1).wait_for()  # its colours, up to the last line
    page.wait_for_timeout(1_000)  # fonts
    return page


def _ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Message").fill(question)
    page.get_by_role("button", name="Send", exact=True).click()
    page.locator("article.assistant .remark span").wait_for()


if __name__ == "__main__":
    main()
