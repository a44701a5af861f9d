"""The files in static/ as browsers get them: the head of the document, which names them, and how long they are kept.

What the document names has a digest of its file in its address. Browsers keep it for good, and never run modules of
before an update beside those of after it.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import os
from pathlib import Path

from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from llama2_chat.page.language import IN_DOCUMENT

STATIC = Path(__file__).parent / "static"
STYLES = (
    "page.css",
    "transcript.css",
    "composer.css",
    "overlays.css",
    "screens.css",
    "sidebar.css",
    "markdown.css",
    "code.css",
    "steps.css",
    "documents.css",
    "settings.css",
    "start.css",
    "login.css",
    "completing.css",
    "compare.css",
    "forced_colors.css",
    "print.css",
)
# Loaded at once and beside each other, and not one after the other as their imports are found.
FOLDERS = ("*.js", "markdown/*.js", "vendor/marked/*.js")
OTHERS = {"loading.js", "texts.js", "markdown/highlighter-worker.js"}
MODULES = sorted({path.relative_to(STATIC).as_posix() for each in FOLDERS for path in STATIC.glob(each)} - OTHERS)
LATER = "vendor/katex/katex.mjs"
FOR_GOOD = "max-age=31536000, immutable"
LEAST_COMPRESSED, FAST = 1000, 4  # bytes; of gzip's 9 levels, since the model needs the processor, too


def head(language: str) -> bytes:
    """What stands first in the head of the page's document. language: whose texts its modules get from texts.js."""
    texts = _address(f"texts/{language}.js")
    modules = {f"./page/{name}": f"./{_address(name)}" for name in (*MODULES, LATER)}
    imports = json.dumps({"imports": {"./page/texts.js": f"./{texts}", **modules}})
    said = (f'data-{name}="{html.escape(text)}"' for name, text in IN_DOCUMENT[language].items())
    lines = [
        f"<script {' '.join(said)}>{(STATIC / 'loading.js').read_text('utf-8')}</script>",
        f'<script type="importmap">{imports}</script>',
        *(f'<link rel="stylesheet" href="{_address(name)}">' for name in STYLES),
        *(f'<link rel="modulepreload" href="{path}">' for path in [texts, *map(_address, MODULES)]),
        f'<script type="module" id="page" src="{_address("main.js")}"></script>',
    ]
    return "\n".join(lines).encode()


def _address(name: str) -> str:
    return f"page/{name}?{_version(STATIC / name)}"


def _version(path: Path) -> str:
    return _digest(path, path.stat().st_mtime_ns)


@functools.lru_cache(1_000)
def _digest(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compressed(files: ASGIApp) -> ASGIApp:
    """An app that serves files, which come in a third of their bytes where the browser can unpack them."""
    return GZipMiddleware(files, minimum_size=LEAST_COMPRESSED, compresslevel=FAST)


class Assets(StaticFiles):
    """static/, kept for good under the address of what a file holds now; under any other it is asked for again."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC)

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        is_current = scope["query_string"].decode("latin-1") == _version(Path(full_path))
        response.headers["Cache-Control"] = FOR_GOOD if is_current else "no-cache"
        return response
