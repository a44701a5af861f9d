"""What people see of an answer: Markdown, code, formulas, footnotes and thoughts, in a browser."""

import re
from contextlib import closing

import pytest
from playwright.sync_api import expect

from tests.support.answers import PAGE, empty, show
from tests.support.axe import assert_accessible
from tests.support.static_page import STATIC, static_page


@pytest.mark.parametrize(
    "language",
    [
        "cpp",
        "c",
        "cuda",
        "rust",
        "go",
        "sql",
        "bash",
        "yaml",
        "json",
        "latex",
        "matlab",
        "haskell",
        "python",
        "klingon",
    ],
)
def test_code_in_any_language_is_visible_and_so_is_what_follows_it(answer_page, language):
    """gr.Chatbot showed nothing of a message with a C++ block."""
    shown = show(answer_page, f"before\n\n```{language}\nint x = 42; // a\n```\n\nafter")
    expect(shown.locator("pre")).to_have_text("int x = 42; // a")
    expect(shown.locator(".language")).to_have_text(language)
    expect(shown.get_by_text("after")).to_be_visible()


@pytest.mark.parametrize(
    ("code", "piece", "kind"),
    [
        ("cpp\nint x = 42;", "int", "type"),
        ("python\ndef f(): pass", "def", "keyword"),
        ("rust\nlet x = 1;", "let", "keyword"),
        ('json\n{"a": 1}', '"a"', "type"),
        ("html\n<style>a { color: red }</style>", "style", "keyword"),
        ("diff\n+ new", "+ new", "addition"),
        ("matlab\n% note", "% note", "comment"),
    ],
)
def test_code_is_coloured(answer_page, code, piece, kind):
    shown = show(answer_page, f"```{code}\n```")
    expect(shown.locator(f"pre .{kind}").first).to_have_text(piece)


def test_tables_task_lists_and_the_rest_of_github_markdown_are_shown(answer_page):
    shown = show(
        answer_page,
        "| a | b |\n|:-:|--:|\n| 1<br>2 | **3** |\n\n- [x] did\n- [ ] did not\n\n~~gone~~ https://a.example",
    )
    expect(shown.locator("th")).to_have_text(["a", "b"])
    expect(shown.locator("td br")).to_have_count(1)
    expect(shown.locator("td.right strong")).to_have_text("3")
    expect(shown.get_by_role("checkbox", name="Done", exact=True)).to_be_checked()
    expect(shown.get_by_role("checkbox", name="Not done")).not_to_be_checked()
    expect(shown.locator("del")).to_have_text("gone")
    expect(shown.get_by_role("link", name="https://a.example")).to_have_attribute("rel", "noopener noreferrer nofollow")


def test_a_line_break_in_a_poem_is_kept(answer_page):
    assert show(answer_page, "Roses are red,\nviolets are blue.").inner_text() == "Roses are red,\nviolets are blue."


@pytest.mark.parametrize("before", ["word " * 99, "字" * 495, "word, " * 83], ids=["words", "Chinese", "commas"])
def test_an_address_far_into_a_paragraph_is_a_link(answer_page, before):
    shown = show(answer_page, f"{before}https://a.example/path and so on")
    expect(shown.get_by_role("link", name="https://a.example/path", exact=True)).to_be_visible()


@pytest.mark.parametrize(
    "formula", ["$x^2$", "\\(x^2\\)", "\\[x^2\\]", "$$x^2$$", "$$\nx^2\n\n+1\n$$", "\\[\nx^2\n\\]"]
)
def test_mathematics_is_typeset(answer_page, formula):
    shown = show(answer_page, f"So {formula} it is." if "\n" not in formula else f"So\n{formula}\nit is.")
    expect(shown.locator(".katex-mathml math")).to_have_count(1)
    expect(shown).not_to_contain_text("$")


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5, or $6 with tax.",
        "from $10-$20",
        "$PATH:$HOME",
        "US$5 and US$7",
        "`$x$`",
        "a $ b $ c",
        "$$",
        "$x",
    ],
)
def test_prices_and_variables_are_no_mathematics(answer_page, text):
    shown = show(answer_page, text)
    expect(shown.locator(".math")).to_have_count(0)
    expect(shown).to_have_text(text.replace("`", ""))


def test_a_formula_that_is_none_stays_as_it_was_written(answer_page):
    shown = show(answer_page, "$\\frac{1}{$ and $x^2$")
    expect(shown.locator(".katex")).to_have_count(1)
    expect(shown.locator(".math").first).to_have_text("$\\frac{1}{$")


def test_what_a_model_thinks_is_folded_and_stays_open_once_opened(answer_page):
    answer_page.evaluate("async () => { view.update('<think>\\nFirst'); await frame(); }")
    summary = answer_page.locator("summary")
    expect(summary).to_have_text("Thinking…")
    expect(answer_page.get_by_text("First")).to_be_hidden()
    summary.click()
    answer_page.evaluate("async () => { view.update('<think>\\nFirst, then\\n</think>\\n\\nSo.'); await frame(); }")
    expect(summary).to_have_text("Thoughts")
    expect(answer_page.get_by_text("First, then")).to_be_visible()
    expect(answer_page.get_by_text("So.")).to_be_visible()


def test_thoughts_that_were_never_closed_are_over_with_the_answer_and_open_where_there_is_nothing_else(answer_page):
    shown = show(answer_page, "<think>\nFirst, then")
    expect(shown.locator("summary")).to_have_text("Thoughts")
    expect(answer_page.get_by_text("First, then")).to_be_visible()


def test_footnotes_are_numbered_and_linked_both_ways(answer_page):
    shown = show(
        answer_page, "One[^b], two[^a], one again[^b], none[^c].\n\n[^a]: Second.\n[^b]: First,\n    in two lines."
    )
    expect(shown.locator(".footnote-mark")).to_have_text(["1", "2", "1", "[^c]"])
    expect(shown.locator(".footnote .number")).to_have_text(["2", "1"])
    shown.get_by_role("link", name="Footnote 2", exact=True).click()
    expect(answer_page.locator(".footnote").first).to_be_focused()
    shown.get_by_role("link", name="back to the text").first.click()
    expect(answer_page.locator(".footnote-mark").nth(1)).to_be_focused()


def test_an_address_to_which_no_link_leads_is_seen_and_so_is_a_link_without_words(answer_page):
    shown = show(
        answer_page,
        "See [the docs][1], [](https://a.example/x) and [b].\n\n"
        "[1]: https://one.example/\n[2]: <https://two.example/> 'T'\n[b]: ./b.md",
    )
    expect(shown.locator("p")).to_have_text(
        ["See the docs, https://a.example/x and [b].", "[2]: <https://two.example/> 'T'", "[b]: ./b.md"]
    )
    expect(shown.get_by_role("link")).to_have_text(["the docs", "https://a.example/x", "https://two.example/"])


def test_text_from_right_to_left_stands_right(answer_page):
    shown = show(answer_page, "مرحبا\n\n- عنصر `a`\n\n> اقتباس\n\n| اسم |\n|---|\n| قيمة |\n\nhello")
    for selector in ("p", "li", "blockquote", "table"):
        expect(shown.locator(selector).first).to_have_css("direction", "rtl")
    expect(shown.get_by_text("hello")).to_have_css("direction", "ltr")


def test_a_wide_table_scrolls_in_its_box_on_a_phone(answer_page):
    answer_page.set_viewport_size({"width": 390, "height": 844})
    cells = "| " + " | ".join(f"column {n}" for n in range(12)) + " |"
    shown = show(answer_page, f"{cells}\n|{'---|' * 12}\n{cells}")
    box = shown.locator(".table")
    assert box.evaluate("(box) => box.scrollWidth > box.clientWidth + 100")
    assert answer_page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.locator("td").first.evaluate("(cell) => cell.getClientRects()[0].width") > 60  # once one letter a line
    expect(box).to_have_attribute("tabindex", "0")  # and the keyboard gets there


def test_long_code_wraps_when_asked(answer_page):
    shown = show(answer_page, f"```\n{'word ' * 100}\n```")
    pre = shown.locator("pre")
    expect(pre).to_have_attribute("tabindex", "0")
    shown.get_by_role("button", name="Wrap").click()
    assert pre.evaluate("(pre) => pre.scrollWidth <= pre.clientWidth")


CODE = '\tif (a < b && c > d) {\n\n  return "ü";   \n}\n\n'


EVERYTHING = f"""<think>
Hm.
</think>

# Heading

Words, `code`, [a link](https://a.example), $x^2$ and a note[^1].

- [x] done
- [ ] open

> quoted

```cpp
#include <map> // {"far " * 50}
template <typename T> int f(T x = 42) {{ return "text"; }}
```

```diff
+ new
- old
```

| a | b |
|---|---|
| {"far" * 40} | 2 |

$$
{"x_1 + " * 90} y
$$

[^1]: note
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "chat.lan"])
def test_copy_gives_exactly_the_code(browser, host):
    """Over plain HTTP from another machine, chat.lan here, there is no clipboard API."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"] if host == "127.0.0.1" else [])
    with static_page({"index.html": PAGE}) as address, closing(context):
        page = context.new_page()
        page.goto(address.replace("127.0.0.1", host))
        empty(page)
        shown = show(page, f"```js\n{CODE}```")
        expect(shown.locator("pre .keyword").first).to_be_visible()
        assert shown.locator("pre code").evaluate("(code) => code.textContent") == CODE[:-1]
        page.evaluate("document.addEventListener('copy', () => (window.copied = document.activeElement.value))")
        shown.get_by_role("button", name="Copy").click()
        expect(shown.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard?.readText() ?? copied") == CODE[:-1]


def test_what_is_selected_in_code_is_copied_as_it_stands(answer_page):
    shown = show(answer_page, f"before\n\n```js\n{CODE}```\n\nafter")
    expect(shown.locator("pre .keyword").first).to_be_visible()
    selected = answer_page.evaluate("() => (getSelection().selectAllChildren(answer), getSelection().toString())")
    assert selected == f"before\n\n{CODE.rstrip()}\nafter"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_an_answer_can_be_read_by_everyone(answer_page, scheme, width):
    answer_page.set_viewport_size({"width": width, "height": 844})
    answer_page.emulate_media(color_scheme=scheme)
    shown = show(answer_page, EVERYTHING)
    expect(shown.locator("pre .addition")).to_be_visible()
    expect(shown.locator(".katex").first).to_be_visible()
    expect(shown.locator("pre").first).to_have_attribute("tabindex", "0")
    shown.locator("summary").click()
    assert_accessible(answer_page)
    answer_page.emulate_media(color_scheme=None)


def test_every_library_comes_with_its_licence_and_version():
    table = (STATIC / "vendor" / "README.md").read_text("utf-8")
    for folder in (path for path in (STATIC / "vendor").iterdir() if path.is_dir()):
        assert (folder / "LICENSE").stat().st_size > 500
        assert re.search(rf"^\| `{folder.name}/` \|.*\| \d+\.\d+\.\d+ \| [\w-]+ \|", table, re.MULTILINE)
    worker = (STATIC / "markdown" / "highlighter-worker.js").read_text("utf-8")
    for grammar in (STATIC / "vendor" / "highlightjs" / "languages").iterdir():
        name = grammar.name.removesuffix(".min.js")
        assert re.search(rf'(?<![\w-])"?{name}"?: "', worker), name
