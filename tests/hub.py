"""A small Hugging Face Hub on this machine: the routes that downloading a model takes, with the real answers.

Put folders in `repos`, close doors with `gated` and `status`, slow it down with `bytes_per_s`; `requests` tells what
was asked.
"""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.accounts: dict[str, set[str]] = {"hf_reader": set()}  # token -> gated repositories it may read
        self.status: int | None = None  # answer everything with this error
        self.bytes_per_s: int | None = None
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """From here on nobody answers, as when the network is gone."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub  # HTTP 1.0: no connection outlives close()

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        if self.hub.status:
            return self._refuse(self.hub.status, "", "Something is wrong here.")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if not (info or tree or file):
            return self._refuse(404, "", "Not a route of this small Hub.")
        repo = (info or tree or file)[1]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            return self._refuse(401, "", "Invalid username or password.")
        if repo not in self.hub.repos:
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if info:
            return self._send_json({"id": repo, "sha": COMMIT, "siblings": [], "private": False, "tags": []})
        files = sorted(path for path in self.hub.repos[repo].rglob("*") if path.is_file())
        if tree:
            names = [path.relative_to(self.hub.repos[repo]).as_posix() for path in files]
            sizes = [path.stat().st_size for path in files]
            entries = zip(names, sizes, strict=True)
            return self._send_json([{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in entries])
        if repo in self.hub.gated and repo not in self.hub.accounts.get(token, ()):
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        return self._send_file(self.hub.repos[repo] / file[2])

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(
            status, b"", {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        )

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        body = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            headers["Content-Range"] = f"bytes {wanted[1]}-{len(body) - 1}/{len(body)}"
            return self._send(206, body[int(wanted[1]) :], headers)
        return self._send(200, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        step = max(1, (self.hub.bytes_per_s or 10 * len(body)) // 10)  # a tenth of a second's worth
        try:
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(0.1 if self.hub.bytes_per_s else 0)
        except ConnectionError:  # the reader left
            pass
