"""Answers that mean harm: texts that take for ever, and texts that would run or fetch something."""

import pytest
from playwright.sync_api import expect

from tests.support.answers import show

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
    "a table of short rows": "|" + "a|" * 300 + "\n|" + "-|" * 300 + "\n" + "x\n" * 10_000,
    "digits": "1" * 100_000,
    "an address without end": "http://a.b/" + ")" * 250_000,
    "letters before an at sign": "a" * 100_000 + "@" + "a" * 100_000,
    "marks on a letter": "e" + "\u0301" * 100_000,
    "many lines": "- x\n" * 75_000,
    "code in one line": "```js\n" + "a(" * 20_000 + "\n```",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_no_text_holds_up_the_page(answer_page, text):
    took = answer_page.evaluate(
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
    assert took < 15_000
    assert "THE END" in answer_page.evaluate("answer.textContent")


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
def test_nothing_in_an_answer_runs_or_leaves(answer_page, text):
    show(answer_page, text)
    answer_page.evaluate(
        "async (text) => { view.update(text + 'x'); await frame(); view.update(text, { done: true }); }", text
    )
    answer_page.wait_for_function(
        "!document.querySelector('.math') || document.querySelector('link[href$=\"katex.min.css\"]')"
    )
    answer_page.evaluate("async () => { for (let i = 0; i < 4; i++) await frame(); }")
    found = answer_page.evaluate(
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


LENGTHS = {
    "a rule": r"\rule{999em}{999em}",
    "many rules": r"\rule{10em}{10em}" * 50,
    "a huge rule": r"\Huge\rule{99em}{99em}",
    "raised": r"\raisebox{999em}{x}",
    "lowered": r"\raisebox{-9999em}{x}",
    "a rule below": r"\rule[-9999em]{1em}{1em}",
    "to the left": r"\kern-9999em\rule{10em}{10em}",
    "far to the right": r"a\hspace{9999em}b" * 20,
    "without its height": r"\smash{\raisebox{-40em}{\Huge X}}",
    "without its width": r"\rlap{" + "x" * 200 + r"}\llap{" + "x" * 200 + "}",
    "rows far apart": r"\begin{matrix}a\\[-999em]b\\[999em]c\end{matrix}",
    "by a macro": r"\def\n{9999}\raisebox{-\n em}{x}",
    "words": r"\text{" + "words " * 100 + "}",
    "a long fraction": r"\frac{" + "a+" * 100 + "b}{2}",
    "in many braces": r"\smash{" * 30 + r"\rule{9em}{9em}" + "}" * 30,
}


@pytest.mark.parametrize("display", ["$", "$$"], ids=["in a line", "by itself"])
def test_a_formula_paints_in_its_own_room_and_nowhere_else(answer_page, display):
    """A black square of 20 em lay over other messages, and a wide formula was cut off at the edge of the page."""
    answer_page.set_viewport_size({"width": 390, "height": 844})
    show(answer_page, "$x$")
    answer_page.wait_for_selector(".katex")  # it is loaded
    for name, formula in LENGTHS.items():
        show(answer_page, f"Before it.\n\nSee {display}{formula}{display} here.\n\nAfter it.")
        answer_page.evaluate("frame()")
        room = answer_page.evaluate(
            """() => {
              const math = document.querySelector(".math"), { left, right, height } = math.getBoundingClientRect();
              const { overflowX, overflowY, position } = getComputedStyle(math);
              const isHeld = overflowX === "auto" && overflowY === "hidden" && position === "relative";
              return { isHeld, left, right, height, page: document.documentElement.scrollWidth };
            }"""
        )
        assert room["isHeld"], name
        assert 0 <= room["left"] <= room["right"] <= room["page"] <= 390, name
        assert room["height"] < 1.5 * 844, name


def test_a_formula_in_a_line_stands_on_it_and_only_one_that_scrolls_is_a_stop_of_the_tab_key(answer_page):
    shown = show(answer_page, r"So $x$ and $T_f$, $\sqrt{\frac12}$, $\hat{y}_j$ $\frac{" + "a+" * 200 + "b}2$")
    answer_page.wait_for_selector(".katex")
    expect(shown.locator(".math[tabindex]")).to_have_count(1)
    gap = answer_page.evaluate(
        """() => {
          const mark = () => Object.assign(document.createElement("span"), { style: "display:inline-block" });
          const [inside, outside] = [mark(), mark()];
          document.querySelector(".katex-base").append(inside);
          document.querySelector(".math").after(outside);
          return inside.getBoundingClientRect().bottom - outside.getBoundingClientRect().bottom;
        }"""
    )
    assert abs(gap) < 0.5  # pixels between their base lines


@pytest.mark.parametrize(
    "text",
    ["<b>bold</b> and <br>", "<div>\n  <p>block</p>\n</div>", "<!-- a -->", "<script>\na * b * c\n\nd\n</script>"],
)
def test_html_is_shown_as_it_was_written(answer_page, text):
    assert show(answer_page, text).inner_text() == text
