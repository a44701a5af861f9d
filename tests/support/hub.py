"""A small Hugging Face Hub on this machine: the routes that downloads and uploads take, with the real answers.

Put folders in `repos`, those of data sets as "datasets/name", close doors with `gated` and `status`, slow it down with
`bytes_per_s`; `requests` tells what was asked. What is uploaded lands below `uploads`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40
REPO = r"((?:models|datasets)/[^/]+/[^/]+)"


class Hub:
    def __init__(self, uploads: Path | None = None) -> None:
        self.repos: dict[str, Path] = {}
        self.uploads = uploads
        self.writers: dict[str, str] = {"hf_writer": "writer"}  # token -> who it is, who may write to who/anything
        self.revisions = {"main", COMMIT}  # of every repository
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
        if path == "/api/whoami-v2":
            name = self.hub.writers.get(self._token())
            return self._send_json({"type": "user", "name": name}) if name else self._refuse(401, "", "Invalid token")
        info = re.fullmatch(rf"/api/{REPO}(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(rf"/api/{REPO}/tree/[^/]+(?:/(.+))?", path)
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if not (info or tree or file):
            return self._refuse(404, "", "Not a route of this small Hub.")
        repo = (info or tree or file)[1].removeprefix("models/")
        token = self._token()
        if token and token not in self.hub.accounts and token not in self.hub.writers:
            return self._refuse(401, "", "Invalid username or password.")
        if repo not in self.hub.repos:
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if info and (info[2] or "main") not in self.hub.revisions:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {info[2]}")
        if info:
            return self._send_json(
                {
                    "id": repo.removeprefix("datasets/"),
                    "sha": COMMIT,
                    "siblings": [{"rfilename": entry["path"]} for entry in self._entries(repo)],
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                }
            )
        if tree:
            entries = [
                entry for entry in self._entries(repo) if entry["path"].startswith(f"{tree[2]}/" if tree[2] else "")
            ]
            return self._send_json(entries) if entries else self._refuse(404, "EntryNotFound", "No such folder")
        if repo in self.hub.gated and repo not in self.hub.accounts.get(token, ()):
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        return self._send_file(self.hub.repos[repo] / file[2])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        if self.hub.status:
            return self._refuse(self.hub.status, "", "Something is wrong here.")
        if asked := re.fullmatch(rf"/api/{REPO}/paths-info/[^/]+", path):
            names = json.loads(body)["paths"]
            entries = self._entries(asked[1].removeprefix("models/"))
            return self._send_json([entry for entry in entries if entry["path"] in names])
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        name = self.hub.writers.get(self._token())
        if path == "/api/repos/create":
            wanted = json.loads(body)
            if name is None or wanted.get("organization", name) != name:
                return self._refuse(403, "", "You don't have the rights to create a repo under this namespace")
            repo = f"{name}/{wanted['name']}"
            self.hub.repos[repo] = self.hub.uploads / repo
            self.hub.repos[repo].mkdir(parents=True, exist_ok=True)
            return self._send_json({"url": f"{self.hub.url}/{repo}", "id": repo})
        if asked := re.fullmatch(rf"/api/{REPO}/preupload/[^/]+", path):  # weights go to Git LFS, as on the Hub
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self._send_json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        if asked := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._send_json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        if asked := re.fullmatch(rf"/api/{REPO}/commit/[^/]+", path):
            folder = self.hub.repos[asked[1].removeprefix("models/")]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
                if line["key"] == "lfsFile":
                    (self.hub.uploads / line["value"]["oid"]).rename(folder / line["value"]["path"])
            url = f"{self.hub.url}/{asked[1].removeprefix('models/')}/commit/{COMMIT}"
            return self._send_json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        return self._refuse(404, "", "Not a route of this small Hub.")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        (self.hub.uploads / self.path.rpartition("/")[2]).write_bytes(body)
        return self._send(200, b"", {})

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _entries(self, repo: str) -> list[dict]:
        folder = self.hub.repos[repo]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": "0"}
            for path in files
        ]

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(
            status, b"", {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        )

    def _send_json(self, value: object, kind: str = "application/json") -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": kind})

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
