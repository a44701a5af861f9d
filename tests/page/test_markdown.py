"""Answers as people see them: markdown.js in a browser, on a page of its own under the policy that the app sends."""

import re

import pytest
from playwright.sync_api import expect

from tests.support.static_page import static_page

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Answers</title><link rel="icon" href="data:,"><link rel="stylesheet" href="markdown.css">
<style>:root { color-scheme: light dark; --text: light-dark(#1c2330, #e6e9ef); --muted: light-dark(#5b6472, #a4adbb);
--line: #8888; --surface: light-dark(#fff, #12161d); --raised: light-dark(#f5f6f9, #1b212b);
--accent: light-dark(#4338ca, #a5b4fc); --radius: 8px; --mono: monospace; } body { color: var(--text);
background: var(--surface); }</style><main><div id="answer"></div></main></html>"""

# What a test has at hand: view, an AnswerView of #answer; frame(), the next frame after what it shows.
HELPERS = """
const { AnswerView } = await import("./markdown.js");
window.answer = document.querySelector("#answer");
window.view = new AnswerView(answer);
window.frame = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
"""


@pytest.fixture(scope="module")
def address():
    with static_page({"index.html": PAGE}) as address:
        yield address


@pytest.fixture(scope="module")
def tab(browser, address):
    """One tab for all tests of this file, and what went wrong in it."""
    tab, errors = browser.new_page(), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: message.type == "error" and errors.append(message.text))
    tab.on("request", lambda request: request.url.startswith((address[:-10], "data:")) or errors.append(request.url))
    tab.goto(address)
    yield tab, errors
    tab.close()


@pytest.fixture
def page(tab):
    """The tab with a new, empty answer. In the end nothing was said on its console, and no other host was asked."""
    page, errors = tab
    errors.clear()
    page.set_viewport_size({"width": 1280, "height": 844})
    page.evaluate("document.querySelector('main').innerHTML = '<div id=answer></div>'")
    page.evaluate(f"async () => {{ {HELPERS} }}")
    yield page
    assert not errors


def show(page, text):
    page.evaluate("(text) => view.update(text, { done: true })", text)
    return page.locator("#answer")


# --- what is shown --------------------------------------------------------------------------------------------------


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
def test_code_in_any_language_is_visible_and_so_is_what_follows_it(page, language):
    """gr.Chatbot showed nothing of a message with a C++ block."""
    shown = show(page, f"before\n\n```{language}\nint x = 42; // a\n```\n\nafter")
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
def test_code_is_coloured(page, code, piece, kind):
    shown = show(page, f"```{code}\n```")
    expect(shown.locator(f"pre .{kind}").first).to_have_text(piece)


def test_tables_task_lists_and_the_rest_of_github_markdown_are_shown(page):
    shown = show(
        page, "| a | b |\n|:-:|--:|\n| 1<br>2 | **3** |\n\n- [x] did\n- [ ] did not\n\n~~gone~~ https://a.example"
    )
    expect(shown.locator("th")).to_have_text(["a", "b"])
    expect(shown.locator("td br")).to_have_count(1)
    expect(shown.locator("td.right strong")).to_have_text("3")
    expect(shown.get_by_role("checkbox", name="Done", exact=True)).to_be_checked()
    expect(shown.get_by_role("checkbox", name="Not done")).not_to_be_checked()
    expect(shown.locator("del")).to_have_text("gone")
    expect(shown.get_by_role("link", name="https://a.example")).to_have_attribute("rel", "noopener noreferrer nofollow")


def test_a_line_break_in_a_poem_is_kept(page):
    assert show(page, "Roses are red,\nviolets are blue.").inner_text() == "Roses are red,\nviolets are blue."


@pytest.mark.parametrize(
    "formula", ["$x^2$", "\\(x^2\\)", "\\[x^2\\]", "$$x^2$$", "$$\nx^2\n\n+1\n$$", "\\[\nx^2\n\\]"]
)
def test_mathematics_is_typeset(page, formula):
    shown = show(page, f"So {formula} it is." if "\n" not in formula else f"So\n{formula}\nit is.")
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
def test_prices_and_variables_are_no_mathematics(page, text):
    shown = show(page, text)
    expect(shown.locator(".math")).to_have_count(0)
    expect(shown).to_have_text(text.replace("`", ""))


def test_a_formula_that_is_none_stays_as_it_was_written(page):
    shown = show(page, "$\\frac{1}{$ and $x^2$")
    expect(shown.locator(".katex")).to_have_count(1)
    expect(shown.locator(".math").first).to_have_text("$\\frac{1}{$")


def test_what_a_model_thinks_is_folded_and_stays_open_once_opened(page):
    page.evaluate("async () => { view.update('<think>\\nFirst'); await frame(); }")
    summary = page.locator("summary")
    expect(summary).to_have_text("Thinking…")
    expect(page.get_by_text("First")).to_be_hidden()
    summary.click()
    page.evaluate("async () => { view.update('<think>\\nFirst, then\\n</think>\\n\\nSo.'); await frame(); }")
    expect(summary).to_have_text("Thoughts")
    expect(page.get_by_text("First, then")).to_be_visible()
    expect(page.get_by_text("So.")).to_be_visible()


def test_footnotes_are_numbered_and_linked_both_ways(page):
    shown = show(page, "One[^b], two[^a], one again[^b], none[^c].\n\n[^a]: Second.\n[^b]: First,\n    in two lines.")
    expect(shown.locator(".footnote-mark")).to_have_text(["1", "2", "1", "[^c]"])
    expect(shown.locator(".footnote .number")).to_have_text(["2", "1"])
    shown.get_by_role("link", name="Footnote 2", exact=True).click()
    expect(page.locator(".footnote").first).to_be_focused()
    shown.get_by_role("link", name="back to the text").first.click()
    expect(page.locator(".footnote-mark").nth(1)).to_be_focused()


def test_text_from_right_to_left_stands_right(page):
    shown = show(page, "مرحبا\n\n- عنصر `a`\n\n> اقتباس\n\n| اسم |\n|---|\n| قيمة |\n\nhello")
    for selector in ("p", "li", "blockquote", "table"):
        expect(shown.locator(selector).first).to_have_css("direction", "rtl")
    expect(shown.get_by_text("hello")).to_have_css("direction", "ltr")


def test_a_wide_table_scrolls_in_its_box_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    cells = "| " + " | ".join(f"column {n}" for n in range(12)) + " |"
    shown = show(page, f"{cells}\n|{'---|' * 12}\n{cells}")
    box = shown.locator(".table")
    assert box.evaluate("(box) => box.scrollWidth > box.clientWidth + 100")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.locator("td").first.evaluate("(cell) => cell.getClientRects()[0].width") > 60  # once one letter a line
    expect(box).to_have_attribute("tabindex", "0")  # and the keyboard gets there


def test_long_code_wraps_when_asked(page):
    shown = show(page, f"```\n{'word ' * 100}\n```")
    pre = shown.locator("pre")
    expect(pre).to_have_attribute("tabindex", "0")
    shown.get_by_role("button", name="Wrap").click()
    assert pre.evaluate("(pre) => pre.scrollWidth <= pre.clientWidth")


CODE = '\tif (a < b && c > d) {\n\n  return "ü";   \n}\n\n'


@pytest.mark.parametrize("secure", [True, False])
def test_copy_gives_exactly_the_code(browser, address, secure):
    """Over plain HTTP from another machine there is no clipboard API."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"] if secure else [])
    page = context.new_page()
    page.goto(address if secure else address.replace("127.0.0.1", "chat.lan"))
    page.evaluate(f"async () => {{ {HELPERS} }}")
    shown = show(page, f"```js\n{CODE}```")
    expect(shown.locator("pre .keyword").first).to_be_visible()
    assert shown.locator("pre code").evaluate("(code) => code.textContent") == CODE[:-1]
    if not secure:
        page.evaluate("document.addEventListener('copy', () => (window.copied = document.activeElement.value))")
    shown.get_by_role("button", name="Copy").click()
    expect(shown.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard?.readText() ?? copied") == CODE[:-1]
    context.close()


# --- while it grows -------------------------------------------------------------------------------------------------

GROWING = {
    "a loose list": "- a\n- b\n- c\n- d\n- e\n\n- loose\n- x\n\ntext\n",
    "numbers": "1. a\n\n2. b\n\n10. c\n\n   text\n\n11. d\n\nend",
    "code between numbers": "1. a\n2. b\n3. c\n4. d\n```\ncode\n```\n6. f\n7. g\n8. h",
    "late links": "see [a] and [b][c].\n\n- [a]\n\n[a]: http://a.example/one\n[c]: <http://c.example> 't'\n\nx\n",
    "late title": '[a]: http://x.example\n"title"\n\n[a]\n',
    "late footnotes": "x[^1] y[^b]\n\nmore[^1]\n\n[^b]: bee\n[^1]: one\n    two\n\n    three\n\nend",
    "headings": "Title\n===\n\ntext\nmore\n---\n\n# x\n## y\ntext\n#### z",
    "a table": "a | b\n--|--\n1 | 2\n3 | 4\n5|6\n7|8\n9|10\n11 | 12\n\nafter",
    "code": "```py\nx=1\n\n\ny=2\n```\ntext\n~~~\nopen fence\n\nmore",
    "indented code": "    indented\n\n    more\n\ntext\n- a\n\n\n\n      code\n- b",
    "comments": "<!-- comment\n\nstill -->\n\ntext <!-- open",
    "html": "<div>\nhello *x*\n\n</div>\n\n<script>\n\nlet a=1;\n\n</script>\n\ndone",
    "mathematics": "$$\na\n\nb\n$$\n\n\\[\nx\n\\]\n\nprice $5, $6\n$$\nc\n$$",
    "an open formula": "$$\nnever closed\n\npara\n\n- list",
    "open formulas in a list": "- a\n  $$\n- b\n\n> $$\n> c\n\nend",
    "a list that begins anew": "\\[x\n10. a\n11. b\n1. c\n\\]\n\n1. d",
    "thoughts": "<think>\nabc\n\n- x\n- y\n\n1. z\n</think>answer\n\nmore",
    "quotations": "> quote\n> more\n\n> second\n\n> - list\n> - b\n\nlazy\n> a\nb",
    "nesting": "- a\n  - b\n    - c\n\n      para\n  - d\n- e\n\n\n- f\n* g\n+ h\n***\n- - -\n",
    "tasks": "- [ ] a\n- [x] b\n\n- [x] c",
    "words": "**bold *and ~~x~~* ** `a` \\* &copy; &nope; &#65; <br> <b>x</b>",
    "addresses": "http://x.example/a_b www.y.example a@b.example <http://z.example>",
    "returns": "a\r\nb\r\n\r\nc\r\n",
    "pictures": "![x][i]\n\n[![a](data:image/gif;base64,AA)](http://l.example)\n\n[i]: http://i.example/x.png",
}


@pytest.mark.parametrize("text", GROWING.values(), ids=GROWING)
def test_an_answer_that_grew_letter_by_letter_ends_as_if_shown_at_once(page, text):
    page.evaluate(
        """async (text) => {
          const { Blocks } = await import("./markdown/blocks.js");
          const { Footnotes } = await import("./markdown/footnotes.js");
          const show = (name, parts) => {
            const element = Object.assign(document.createElement("div"), { id: name });
            document.querySelector("main").append(element);
            const [blocks, footnotes] = [new Blocks(element), new Footnotes(element)];
            for (const [part, done] of parts) blocks.show(part, done), footnotes.number();
          };
          const letters = Array.from(text, (_, index) => [text.slice(0, index + 1), false]);
          show("grown", [...letters, [text, true]]);
          show("whole", [[text, true]]);
        }""",
        text.replace("\r\n", "\n"),
    )
    # Without the numbers that tell answers apart, and colours, which come when they are ready.
    grown, whole = (re.sub(r"footnote-\d+-|</?span[^>]*>", "", page.inner_html(f"#{id}")) for id in ("grown", "whole"))
    assert grown == whole


def test_what_is_selected_in_code_is_copied_as_it_stands(page):
    shown = show(page, f"before\n\n```js\n{CODE}```\n\nafter")
    expect(shown.locator("pre .keyword").first).to_be_visible()
    selected = page.evaluate("() => (getSelection().selectAllChildren(answer), getSelection().toString())")
    assert selected == f"before\n\n{CODE.rstrip()}\nafter"


def test_a_selection_in_what_is_finished_stays_while_the_answer_grows(page):
    """It used to be gone with the next word: 403 characters, then 0."""
    page.evaluate(
        """async () => {
          window.text = "x".repeat(403) + "\\n\\n- one\\n- two\\n\\n";
          view.update(text + "next");
          await frame();
          getSelection().selectAllChildren(answer.querySelector("p"));
        }"""
    )
    page.evaluate("async () => { for (let i = 0; i < 50; i++) { view.update((text += ' word')); await frame(); } }")
    assert page.evaluate("getSelection().toString().length") == 403
    page.evaluate("view.update(text, { done: true })")
    assert page.evaluate("getSelection().toString().length") == 403


@pytest.mark.parametrize(
    ("begin", "line", "selector"),
    [
        ("", "- item with **words** in it\n", "li"),
        ("| a | b |\n|---|---|\n", "| cell | **cell** |\n", "td"),
        ("```python\n", "print('a line of code')\n", "pre span"),
        ("", "> quoted words\n>\n", "blockquote p"),
        ("", "A paragraph with `code`.\n\n", "p"),
    ],
    ids=["list", "table", "code", "quotation", "paragraphs"],
)
def test_what_was_shown_is_not_touched_again_even_in_one_long_block(page, begin, line, selector):
    touched = page.evaluate(
        """async ({ begin, line, selector }) => {
          const text = (count) => begin + line.repeat(count);
          for (let count = 1; count <= 12; count++) view.update(text(count)), await frame();
          const first = [...answer.querySelectorAll(selector)].slice(0, 10);
          getSelection().selectAllChildren(first[1]);
          const selected = getSelection().toString();
          let touched = 0;
          for (const node of first) {
            const observer = new MutationObserver((records) => (touched += records.length));
            observer.observe(node, { subtree: true, childList: true });
          }
          for (let count = 12; count <= 30; count++) view.update(text(count)), await frame();
          view.update(text(30), { done: true });
          await frame();
          const same = first.every((node, index) => node === answer.querySelectorAll(selector)[index]);
          return { touched, same, kept: selected && getSelection().toString() === selected };
        }""",
        {"begin": begin, "line": line, "selector": selector},
    )
    assert touched["same"]
    assert selector == "pre span" or touched["kept"]  # a line of code gets its colours once, a little later
    assert selector == "pre span" or touched["touched"] == 0


def test_an_answer_of_4000_words_is_read_about_once(page):
    """The work is that of the new text: what is given to the parser does not grow with what is shown."""
    read = page.evaluate(
        """async () => {
          const { Lexer } = await import("./vendor/marked/marked.esm.js");
          const { Blocks } = await import("./markdown/blocks.js");
          let read = 0;
          const lex = Lexer.prototype.lex;
          Lexer.prototype.lex = function (text) { read += text.length; return lex.call(this, text); };
          const words = "Words that a model says, **some** of them `code`. ".repeat(6);
          const code = "```python\\nprint(1)\\n```";
          const list = "- item of a list\\n".repeat(30);
          const text = Array.from({ length: 60 }, (_, n) => [words, code, list][n % 7 > 2 ? 0 : n % 3]).join("\\n\\n");
          const blocks = new Blocks(answer);
          let updates = 0;
          for (let end = 20; end < text.length; end += 20, updates++) blocks.show(text.slice(0, end), false);
          Lexer.prototype.lex = lex;
          return { perUpdate: read / updates, words: text.split(" ").length };
        }"""
    )
    assert read["words"] > 2000
    assert read["perUpdate"] < 500


def test_an_update_that_says_nothing_new_does_nothing(page):
    changes = page.evaluate(
        """async () => {
          const text = "# a\\n\\n- b[^1] $x$\\n\\n```js\\nlet c;\\n```\\n\\n[^1]: d";
          view.update(text, { done: true });
          while (!answer.querySelector(".keyword") || !answer.querySelector(".katex")) await frame();
          const changes = [];
          new MutationObserver((records) => changes.push(...records))
            .observe(answer, { subtree: true, childList: true, attributes: true, characterData: true });
          view.update(text, { done: true });
          view.update(text);
          await frame();
          return changes.length;
        }"""
    )
    assert changes == 0


def test_an_answer_goes_on_after_its_end(page):
    """Continue goes on in the same bubble."""
    text = "One.\n\n- two\n- thr"
    show(page, text)
    page.evaluate("window.first = answer.firstChild")
    page.evaluate("async (text) => { view.update(text); await frame(); }", text + "ee\n- four")
    shown = show(page, text + "ee\n- four\n\nFive.")
    expect(shown.locator("li")).to_have_text(["two", "three", "four"])
    assert page.evaluate("first === answer.firstChild")


def test_another_text_replaces_what_was_shown(page):
    show(page, "One.\n\nTwo.\n\n[a]: http://a.example")
    expect(show(page, "[a] Three.")).to_have_text("[a] Three.")


def test_nothing_makes_an_update_throw(page):
    shown = page.evaluate(
        """async () => {
          const odd = ["", "\\ud800", "\\0", "\\u2028", "\\u0001\\u0002", "&#0; &#xFFFFFF;"];
          for (const text of [null, undefined, 7, {}, [], ...odd]) {
            view.update(text);
            await frame();
            view.update(text, { done: true });
          }
          view.update("```js\\n\\u0001\\ud800", { done: true });
          return answer.textContent;
        }"""
    )
    assert "\x01" in shown


def test_a_hidden_page_still_gets_the_end(page):
    """In a tab behind others there are no frames."""
    page.evaluate("""() => {
          const frames = window.requestAnimationFrame;
          window.requestAnimationFrame = () => 0;
          view.update("so far");
          view.update("all", { done: true });
          window.requestAnimationFrame = frames;
        }""")
    expect(page.locator("#answer")).to_have_text("all")


# --- what is done to it ---------------------------------------------------------------------------------------------

MANY = 2000
BOMBS = {
    "quotations in quotations": ">" * MANY,
    "deeper with each line": "\n".join(">" * n + " x" for n in range(300)),
    "lists in lists": "- " * MANY + "x",
    "lists and quotations": "> - 1. " * 700 + "x",
    "indented lists": "\n".join("  " * n + "- x" for n in range(200)),
    "asterisks": "*" * 10_000,
    "stars and words": "*a **b " * 1500 + "c** d* " * 1500,
    "underscores": "_a " * 5000,
    "brackets": "[" * 5000,
    "closed brackets": "[" * 2500 + "]" * 2500,
    "links in links": "[a](" * 5000,
    "pictures in pictures": "![" * 3000 + "](a)" * 3000,
    "ticks": " ".join("`" * n + "a" for n in range(1, 200)),
    "tags": "<a " * 5000,
    "comments": "<!--" * 5000,
    "dollars": "$a " * 5000,
    "formulas": "$$\n" * 3001,
    "braces": "$" + "{" * 900 + "}" * 900 + "$",
    "roots": "$" + "\\sqrt " * 150 + "x$",
    "macros": "$\\def\\a{\\a\\a}\\a$ $\\def\\x#1{#1#1}\\x{\\x{\\x{\\x{\\x{\\x{\\x{x}}}}}}}$",
    "many formulas": "$x^2$ " * 300,
    "a wide table": "|" + "a|" * 300 + "\n|" + "-|" * 300 + "\n" + ("|x" * 300 + "\n") * 20,
    "definitions": "[a]: b\n" * 3000 + "[a]",
    "footnotes": "[^1] " * 1500 + "\n\n[^1]: x",
    "footnotes in footnotes": "[^1]: " * 500,
    "spaces": "a" + " " * 30_000 + "b",
    "lines": "a\n" * 5000,
    "titles": "a\n" * 3000 + "===",
    "thoughts": "<think>\n" * 3000,
    "one long word": "a" * 200_000,
    "too long to read": "**a** " * 60_000,
    "references": "&amp;" * 10_000,
    "addresses": "http://a.b/ www.c a@d.e " * 500,
    "code in one line": "```js\n" + "a(" * 20_000 + "\n```",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_no_text_holds_up_the_page(page, text):
    took = page.evaluate(
        """async (text) => {
          const begun = performance.now();
          for (const part of [0.3, 0.6, 0.9]) view.update(text.slice(0, part * text.length)), await frame();
          view.update(text, { done: true });
          await frame();
          view.update(text + "\\n\\n\\nTHE END", { done: true });
          return performance.now() - begun;
        }""",
        text,
    )
    assert took < 5000
    assert "THE END" in page.evaluate("answer.textContent")


DATA = "data:text/html,<script>parent.hacked=1</script>"
HOSTILE = {
    "a script": "<script>window.hacked = 1</script>",
    "a handler": "<img src=x onerror=window.hacked=1>",
    "svg": "<svg onload=window.hacked=1><script>window.hacked=1</script></svg>",
    "a frame": "<iframe src=https://evil.example/ srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "a style": "<style>@import url(https://evil.example/x.css); * { background: url(https://evil.example/) }</style>",
    "a style attribute": '<b style="background:url(https://evil.example/x)">x</b>',
    "a base": '<base href="https://evil.example/"> [x](y)',
    "a refresh": '<meta http-equiv="refresh" content="0;url=https://evil.example/">',
    "a form": '<form action="https://evil.example/"><input name=p><button>x</button></form>',
    "an object": "<object data=https://evil.example/></object><embed src=https://evil.example/>",
    "mathml": "<math><mtext><table><mglyph><style><img src=x onerror=hacked=1></style></mglyph></table></mtext></math>",
    "a template": "<template><img src=x onerror=hacked=1></template>",
    "a noscript": "<noscript><p title='</noscript><img src=x onerror=hacked=1>'>",
    "html in a list": "- <img src=x onerror=window.hacked=1>\n  <details ontoggle=window.hacked=1 open>x",
    "html in a table": "| a |\n|---|\n| <img src=x onerror=window.hacked=1><br onclick=hacked=1> |",
    "html in a title": '[x](https://a.example "\\" onmouseover=hacked=1 x=\\"")',
    "javascript": "[x](javascript:window.hacked=1)",
    "javascript in capitals": "[x](JaVaScRiPt:window.hacked=1) <JAVASCRIPT:window.hacked=1>",
    "javascript in references": "[x](&#106;avascript:hacked=1) [y](javascript&colon;hacked=1)",
    "javascript with breaks": "[x](java&Tab;script:hacked=1) [y](java&NewLine;script:hacked=1)",
    "javascript after a control character": "[z](&#1;javascript:hacked=1) [z](&#x6A;avascript&#58;hacked=1)",
    "javascript by reference": "[x][a] ![y][a]\n\n[a]: javascript:window.hacked=1",
    "data": f"[x](<{DATA}>) [y](data:text/html;base64,PHNjcmlwdD4=)",
    "other schemes": "[a](vbscript:x) [b](file:///etc/passwd) [c](blob:http://x/y) [d](ftp://x)",
    "no scheme": "[a](//evil.example) [b](/logout) [c](#x) [d](?x)",
    "a picture elsewhere": "![x](https://evil.example/x.png) ![y](//evil.example/y.png) ![z](/gradio_api/z)",
    "a picture that is a page": f"![x](<{DATA}>) ![y](javascript:hacked=1)",
    "a picture in svg": "![x](data:image/svg+xml,%3Csvg%20xmlns='http://www.w3.org/2000/svg'%20onload='hacked=1'/%3E)",
    "a picture's words": '![" onerror="window.hacked=1](data:image/gif;base64,R0lGODlhAQABAAAAACw=)',
    "a link in TeX": "$\\href{javascript:window.hacked=1}{x}$ $\\url{https://evil.example}$",
    "a picture in TeX": "$\\includegraphics{https://evil.example/x.png}$",
    "html in TeX": "$\\htmlId{answer}{x} \\htmlClass{y}{x} \\htmlData{a=b}{x}$",
    "a style in TeX": "$\\htmlStyle{background:url(https://evil.example)}{x}$",
    "a colour in TeX": "$\\color{url(https://evil.example)}x$ $\\textcolor{red;background:url(https://evil.example)}{x}$",
    "TeX with html": "$\\text{<img src=x onerror=window.hacked=1>}$ $$<script>hacked=1</script>$$",
    "a language": '```"><img src=x onerror=window.hacked=1>\nx\n```',
    "a language elsewhere": "```../../../evil\nx\n```\n\n```https://evil.example/x.js\nx\n```",
    "a language of JavaScript": "```__proto__\nx\n```\n\n```constructor\nx\n```",
    "code with html": "```html\n<img src=x onerror=window.hacked=1><script>hacked=1</script>\n```",
    "names of JavaScript": "[__proto__] [constructor] x[^__proto__]\n\n[__proto__]: javascript:hacked=1",
    "a footnote with a name of JavaScript": "x[^__proto__] y[^constructor]\n\n[^__proto__]: z",
    "thoughts with html": "<think><img src=x onerror=window.hacked=1></think><think onclick=hacked=1>",
}
ALLOWED = """a p h1 h2 h3 h4 h5 h6 strong em del code pre span div ul ol li table thead tbody tr th td hr br blockquote
figure figcaption button details summary input img svg path line math semantics annotation mrow mi mo mn mtext mstyle
msup msub mfrac msqrt mspace mpadded merror menclose mphantom"""


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_in_an_answer_runs_or_leaves(page, text):
    show(page, text)
    page.evaluate(
        "async (text) => { view.update(text + 'x'); await frame(); view.update(text, { done: true }); }", text
    )
    page.wait_for_function(
        "!document.querySelector('.math') || document.querySelector('link[href$=\"katex.min.css\"]')"
    )
    page.evaluate("async () => { for (let i = 0; i < 4; i++) await frame(); }")
    found = page.evaluate(
        """(allowed) => {
          const wrong = [];
          for (const element of answer.querySelectorAll("*")) {
            if (!allowed.includes(element.localName)) wrong.push(element.outerHTML);
            const link = element.getAttribute("href") ?? "http:";
            if (!/^(https?:|mailto:|#footnote)/.test(link)) wrong.push(link);
            if (!/^data:image/.test(element.getAttribute("src") ?? "data:image")) wrong.push(element.src);
            for (const { name, value } of element.attributes) {
              if (/^on|^srcdoc$|^action$/.test(name)) wrong.push(name);
              if (name === "style" && /url/.test(value)) wrong.push(value);
            }
          }
          return { wrong, hacked: window.hacked, others: document.querySelectorAll("#answer").length };
        }""",
        ALLOWED.split(),
    )
    assert found == {"wrong": [], "hacked": None, "others": 1}


@pytest.mark.parametrize(
    "text",
    ["<b>bold</b> and <br>", "<div>\n  <p>block</p>\n</div>", "<!-- a -->", "<script>\na * b * c\n\nd\n</script>"],
)
def test_html_is_shown_as_it_was_written(page, text):
    assert show(page, text).inner_text() == text
