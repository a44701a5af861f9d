"""An answer while it grows: what is finished stays as it is, and the work is that of the new text."""

import re

import pytest
from playwright.sync_api import expect

from tests.support.answers import show

GROWING = {
    "a loose list": "- a\n- b\n- c\n- d\n- e\n\n- loose\n- x\n\ntext\n",
    "numbers": "1. a\n\n2. b\n\n10. c\n\n   text\n\n11. d\n\nend",
    "code between numbers": "1. a\n2. b\n3. c\n4. d\n```\ncode\n```\n6. f\n7. g\n8. h",
    "late links": "see [a] and [b][c].\n\n- [a]\n\n[a]: http://a.example/one\n[c]: <http://c.example> 't'\n\nx\n",
    "addresses of no link": "[a] [](http://b.example)\n\n[a]: http://a.example\n\n- x\n\n[c]: http://c.example\n\n[a]",
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


# Formulas are typeset when there is time.
WITH_AS_MANY_FORMULAS = """() => {
  const both = ["grown", "whole"].map((id) => document.getElementById(id));
  const [grown, whole] = both.map((element) => element.querySelectorAll("math").length);
  return grown === whole && both.map((element) => element.innerHTML);
}"""


@pytest.mark.parametrize("text", GROWING.values(), ids=GROWING)
def test_an_answer_that_grew_letter_by_letter_ends_as_if_shown_at_once(answer_page, text):
    answer_page.evaluate(
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
    both = answer_page.wait_for_function(WITH_AS_MANY_FORMULAS).json_value()
    # Without the numbers that tell answers apart, and colours, which come when they are ready.
    grown, whole = (re.sub(r"footnote-\d+-|</?span[^>]*>", "", html) for html in both)
    assert grown == whole


@pytest.mark.slow
def test_a_selection_in_what_is_finished_stays_while_the_answer_grows(answer_page):
    """It used to be gone with the next word: 403 characters, then 0."""
    answer_page.evaluate(
        """async () => {
          window.text = "x".repeat(403) + "\\n\\n- one\\n- two\\n\\n";
          view.update(text + "next");
          await frame();
          getSelection().selectAllChildren(answer.querySelector("p"));
        }"""
    )
    answer_page.evaluate(
        "async () => { for (let i = 0; i < 50; i++) { view.update((text += ' word')); await frame(); } }"
    )
    assert answer_page.evaluate("getSelection().toString().length") == 403
    answer_page.evaluate("view.update(text, { done: true })")
    assert answer_page.evaluate("getSelection().toString().length") == 403


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
def test_what_was_shown_is_not_touched_again_even_in_one_long_block(answer_page, begin, line, selector):
    touched = answer_page.evaluate(
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


def test_an_answer_of_4000_words_is_read_about_once(answer_page):
    """The work is that of the new text: what is given to the parser does not grow with what is shown."""
    read = answer_page.evaluate(
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


def test_an_update_that_says_nothing_new_does_nothing(answer_page):
    changes = answer_page.evaluate(
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


def test_an_answer_goes_on_after_its_end(answer_page):
    """Continue goes on in the same bubble."""
    text = "One.\n\n- two\n- thr"
    show(answer_page, text)
    answer_page.evaluate("window.first = answer.firstChild")
    answer_page.evaluate("async (text) => { view.update(text); await frame(); }", text + "ee\n- four")
    shown = show(answer_page, text + "ee\n- four\n\nFive.")
    expect(shown.locator("li")).to_have_text(["two", "three", "four"])
    assert answer_page.evaluate("first === answer.firstChild")


def test_another_text_replaces_what_was_shown(answer_page):
    show(answer_page, "One.\n\nTwo.\n\n[a]: http://a.example")
    expect(show(answer_page, "[a] Three.")).to_have_text("[a] Three.")


def test_nothing_makes_an_update_throw(answer_page):
    shown = answer_page.evaluate(
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


def test_a_hidden_page_still_gets_the_end(answer_page):
    """In a tab behind others there are no frames."""
    answer_page.evaluate("""() => {
          const frames = window.requestAnimationFrame;
          window.requestAnimationFrame = () => 0;
          view.update("so far");
          view.update("all", { done: true });
          window.requestAnimationFrame = frames;
        }""")
    expect(answer_page.locator("#answer")).to_have_text("all")
