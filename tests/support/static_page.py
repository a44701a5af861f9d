"""The page's modules alone, under the page's Content-Security-Policy: no model, no Gradio."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STATIC = Path(__file__).parents[2] / "llama2_chat" / "page" / "static"
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'"
)
EMPTY = "<!doctype html><html lang=en><title>modules</title>"


@contextmanager
def static_page(files: Mapping[str, str] = {"index.html": EMPTY}) -> Iterator[str]:
    """The address of a server of llama2_chat/page/static, and of a test's own files: name -> content."""
    handler = partial(
        _Handler, {f"/{name}": content.encode() for name, content in files.items()}, directory=str(STATIC)
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()
    thread.join()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, files: Mapping[str, bytes], *args, **kwargs) -> None:
        self.files = files
        super().__init__(*args, **kwargs)

    def log_message(self, *args) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        content = self.files.get(path)
        if content is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
