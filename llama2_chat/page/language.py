"""In which language the page speaks: as the visitor chose there, else the first of their browser's that it has.

What the page says is in static/texts, a file for each language.
"""

from __future__ import annotations

import re
from pathlib import Path

from starlette.requests import HTTPConnection

GROUP = re.compile(r"^  document: \{(.+?)^  \}", re.MULTILINE | re.DOTALL)
# What stands in the document itself, for whoever lets no script run and for static/loading.js.
IN_DOCUMENT = {
    path.stem: dict(re.findall(r'(\w+): "(.+)",', GROUP.findall(path.read_text("utf-8"))[0]))
    for path in (Path(__file__).parent / "static" / "texts").glob("*.js")
}
LANGUAGES = frozenset(IN_DOCUMENT)
COOKIE = "llama2_chat_language"  # set by static/language.js
OTHERS = "en"  # for whom it has no language of theirs
MOST_READ = 50  # languages of a browser


def language_of(request: HTTPConnection) -> str:
    """One of LANGUAGES, with which de-AT is de."""
    wanted = [request.cookies.get(COOKIE, ""), *_accepted(request.headers.get("accept-language", ""))]
    spoken = (code.strip().partition("-")[0].lower() for code in wanted)
    return next((code for code in spoken if code in LANGUAGES), OTHERS)


def _accepted(header: str) -> list[str]:
    """The languages of an Accept-Language header, the best first."""
    weighed = [each.partition(";") for each in header.split(",")[:MOST_READ]]
    return [code for code, _, weight in sorted(weighed, key=lambda each: -_weight(each[2])) if _weight(weight) > 0]


def _weight(parameters: str) -> float:
    """The q of an entry, 1 where there is none."""
    name, _, value = parameters.partition("=")
    if name.strip() != "q":
        return 1
    try:
        return float(value)
    except ValueError:
        return 0
